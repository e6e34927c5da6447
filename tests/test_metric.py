import pytest
import torch

from dit.metric.classifier import judge
from dit.metric.frechet import frechet_distance
from dit.metric.subject import Subject


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """For commuting covariances it is |mu|^2 + sum (s_a - s_b)^2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0])
    b = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 2.0, 1.0]) + 1
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_agrees_with_scipys_matrix_root():
    import numpy as np
    from scipy.linalg import sqrtm

    a, b = np.random.default_rng(0).normal(size=(2, 500, 8)) @ np.random.default_rng(1).normal(size=(8, 8))
    b = b * 1.3 + 0.2
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_the_judge_tells_good_samples_from_bad_ones(digits_dir):
    from dit.data.webdataset import WebDataset

    data = WebDataset("", image_size=8, channels=1, num_classes=10)
    train, held_out = (data.read(digits_dir / "digits" / name) for name in ("train", "held_out"))
    images, labels = train

    def real(asked):
        rows = [torch.nonzero(labels == label)[i // 10 % 100, 0] for i, label in enumerate(asked)]
        return images[torch.stack(rows)]

    def means(asked):
        return torch.stack([images[labels == label].float().mean(0).to(torch.uint8) for label in asked])

    good, mean, wrong = (
        judge(Subject(draw, None, None, (1, 8, 8)), train, held_out, num_images=1000)
        for draw in (real, means, lambda y: real((y + 1) % 10))
    )
    assert good["judge_accuracy"] >= 0.97
    assert good["accuracy"] > 0.99 and 0.8 < good["diversity"] < 1.2 and good["frechet"] < good["frechet_floor"]
    assert good["nearest"] == 0  # copies of training images show
    assert mean["accuracy"] > 0.9 and mean["diversity"] < 0.01  # accuracy alone is worthless
    assert mean["frechet"] > 5 * mean["frechet_floor"]
    assert wrong["accuracy"] < 0.05
    assert good["frechet_noise"] > 20 * good["frechet_floor"]
