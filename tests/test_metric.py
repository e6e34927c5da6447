import math

import numpy as np
import pytest
import torch

from dit.metric.classifier import _in_turn, judge
from dit.metric.frechet import frechet_distance
from dit.metric.psnr import decibels, psnr
from dit.metric.subject import Subject, rows


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """For commuting covariances it is |mu|^2 + sum (s_a - s_b)^2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0])
    b = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 2.0, 1.0]) + 1
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_agrees_with_scipys_matrix_root():
    from scipy.linalg import sqrtm

    a, b = np.random.default_rng(0).normal(size=(2, 500, 8)) @ np.random.default_rng(1).normal(size=(8, 8))
    b = b * 1.3 + 0.2
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_the_judge_tells_good_samples_from_bad_ones(digits_dir):
    from dit.data.stream import Stream

    path, held_out = (str(digits_dir / "digits" / name) for name in ("train", "held_out"))
    data = Stream(path, image_size=8, channels=1, num_classes=10, held_out=held_out)
    train, held_out = (data.read(split) for split in ("train", "held_out"))
    images, labels = train["image"], train["label"]

    def real(samples, asked=None):
        asked = samples["label"] if asked is None else asked
        numbers = [torch.nonzero(labels == label)[i // 10 % 100, 0] for i, label in enumerate(asked)]
        return images[torch.stack(numbers)]

    def means(samples):
        asked = samples["label"]
        return torch.stack([images[labels == label].float().mean(0).to(torch.uint8) for label in asked])

    good, mean, wrong = (
        judge(Subject(dict, draw, None, None, (1, 8, 8)), train, held_out, num_images=1000)
        for draw in (real, means, lambda samples: real(samples, (samples["label"] + 1) % 10))
    )
    assert good["judge_accuracy"] >= 0.97
    assert good["accuracy"] > 0.99 and 0.8 < good["diversity"] < 1.2 and good["frechet"] < good["frechet_floor"]
    assert good["nearest"] == 0  # copies of training images show
    assert mean["accuracy"] > 0.9 and mean["diversity"] < 0.01  # accuracy alone is worthless
    assert mean["frechet"] > 5 * mean["frechet_floor"]
    assert wrong["accuracy"] < 0.05
    assert good["frechet_noise"] > 20 * good["frechet_floor"]


def test_psnr_has_a_known_error_and_refuses_what_it_cannot_judge():
    images = torch.randint(10, 240, (6, 1, 8, 8), dtype=torch.uint8)
    held_out = {"image": images, "label": torch.zeros(6, dtype=torch.long)}
    told = {"image": torch.cat([images.float() / 127.5 - 1, torch.zeros(6, 1, 8, 8)], dim=1)}
    subject = Subject(lambda samples: told, lambda samples: samples["image"] + 5, None, None, (1, 8, 8), True)
    figures = psnr(subject, held_out, held_out)
    assert figures["psnr"] == pytest.approx(20 * math.log10(255 / 5))
    assert figures["psnr_told"] == math.inf
    assert decibels(images, 255 - images) < decibels(images, images + 1)
    for other in (subject._replace(told=lambda samples: {}), subject._replace(shape=(4, 4, 4))):
        assert psnr(other, held_out, held_out) == {"psnr": figures["psnr"]}
    with pytest.raises(ValueError, match="judges autoencoders, and networks that restore the images they are told"):
        psnr(subject._replace(restores=False), held_out, held_out)


def test_the_judge_asks_for_each_class_in_turn():
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 1])
    assert _in_turn(labels, torch.arange(7) % 3).tolist() == [1, 2, 0, 4, 3, 5, 1]
    with pytest.raises(ValueError, match="no held-out image of class 3"):
        _in_turn(labels, torch.tensor([3]))


def test_rows_of_samples_may_be_one():
    captions = np.array(["a", "b", "c"], dtype=object)
    samples = {"image": torch.arange(3), "caption": captions}
    assert rows(samples, torch.tensor([1]))["caption"].tolist() == ["b"]
    assert rows(samples, slice(2))["caption"].tolist() == ["a", "b"]
