import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit.metric import statistics
from dit.metric.backbone import Backbone
from dit.metric.classifier import _in_turn, judge
from dit.metric.clip import Clip
from dit.metric.frechet import fid, frechet_distance
from dit.metric.inception import Inception
from dit.metric.inception_score import inception_score
from dit.metric.kernel import cmmd, kid
from dit.metric.moments import Moments
from dit.metric.neighbours import prec_recall
from dit.metric.psnr import decibels, psnr
from dit.metric.seen import Seen
from dit.metric.small import Small
from dit.metric.subject import Subject, rows


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """For commuting covariances it is |mu|^2 + sum (s_a - s_b)^2."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0])
    b = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 2.0, 1.0]) + 1
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(3 + 1 + 0 + 4, rel=0.02)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_agrees_with_scipys_matrix_root():
    from scipy.linalg import sqrtm

    a, b = np.random.default_rng(0).normal(size=(2, 500, 8)) @ np.random.default_rng(1).normal(size=(8, 8))
    b = b * 1.3 + 0.2
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(Moments.of(torch.tensor(a)), Moments.of(torch.tensor(b))) == pytest.approx(
        expected, rel=1e-8
    )


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


@pytest.fixture(scope="module")
def features():
    """Two sets of features that differ, (N, D)."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1500, 24, generator=generator)
    return a, torch.randn(1200, 24, generator=generator) * 1.2 @ torch.randn(24, 24, generator=generator) / 5 + 0.3


def seen(rows, parts=1, **layers):
    """What was seen of rows, in parts."""
    found = Seen(("pool",), ("pool", *layers))
    for number, part in enumerate(rows.chunk(parts)):
        found.add(number, {"pool": part, **{name: value.chunk(parts)[number] for name, value in layers.items()}})
    return found


def test_moments_do_not_depend_on_the_parts(features):
    rows = features[1]
    whole = Moments.of(rows)
    for sizes in ([1200], [1, 1199], [400, 400, 400], [7] * 171 + [3]):
        parts = [Moments.of(part) for part in rows.split(sizes)]
        merged = sum(parts[1:], parts[0])
        assert merged.number == 1200
        for ours, theirs in ((merged.mean, whole.mean), (merged.covariance, whole.covariance)):
            assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()
        added = [torch.cat([torch.tensor([p.number]), p.number * p.mean]) for p in parts]
        totals = iter([sum(added)])  # what an all-reduce gives
        d = sum(added)[1:] / sum(added)[0]
        scatters = sum(p.scatter + p.number * torch.outer(p.mean - d, p.mean - d) for p in parts)
        summed = parts[0].summed(lambda tensor: next(totals, scatters))  # noqa: B023
        assert (summed.covariance - whole.covariance).abs().max() < 1e-12 * whole.covariance.abs().max()
    assert (whole.covariance - torch.from_numpy(np.cov(rows.double().numpy().T))).abs().max() < 1e-12
    with pytest.raises(ValueError, match="two images or more"):
        _ = Moments.of(rows[:1]).covariance


def test_distances_are_those_of_torch_fidelity(features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = features
    one, other = seen(a, 3), seen(b, 2)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a.double(), b.double())), False)
    assert fid(one, other) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    options = {"kid_subsets": 10, "kid_subset_size": 500, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 2020, "verbose": False}
    theirs = kid_features_to_metric(a.double(), b.double(), **options)
    ours = kid(one, other, num_subsets=10, subset_size=500)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    precision, recall = calculate_precision_recall_full(a, b, 3)
    assert prec_recall(one, other) == pytest.approx({"precision": precision, "recall": recall}, rel=1e-6)
    assert 0 < precision < 1 and 0 < recall < 1


def test_other_figures_by_hand(features):
    a, b = (F.normalize(rows.double(), dim=1).numpy() for rows in features)

    def mean(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(*map(seen, features)) == pytest.approx(expected, rel=1e-6)
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(2)) * 2
    p = logits.double().softmax(1).numpy().reshape(3, 20, 5)
    scores = np.exp((p * (np.log(p) - np.log(p.mean(1, keepdims=True)))).sum(2).mean(1))
    found = inception_score(seen(torch.randn(60, 3), 4, logits=logits), None, split_size=20)
    assert found == pytest.approx({"inception_score": scores.mean(), "inception_score_std": scores.std()}, rel=1e-6)
    assert fid(seen(features[0]), seen(features[0])) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="subset_size=1300, but there are 1200 images"):
        kid(*map(seen, features), subset_size=1300)


def test_singular_covariances_lose_nothing():
    """Fewer images than features."""
    rows = torch.randn(2, 20, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = (one - one.mean(0) for one in rows)
    roots = torch.linalg.svdvals(a @ b.T).sum() / 19  # of S_a S_b, as the nuclear norm of A^T B
    expected = (rows[0].mean(0) - rows[1].mean(0)).square().sum() + (a.square().sum() + b.square().sum()) / 19
    found = frechet_distance(Moments.of(rows[0]), Moments.of(rows[1]))
    assert found == pytest.approx((expected - 2 * roots).item(), rel=1e-6)


def test_extractors_see_images():
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    small = Small()
    assert torch.equal(torch.get_rng_state(), state)  # training draws what it would have drawn
    found = small(images)
    assert {name: tuple(layer.shape) for name, layer in found.items()} == {
        "pool": (3, 64),
        "spatial": (3, 112),
        "logits": (3, 10),
    }
    assert torch.equal(found["pool"], Small()(images.expand(-1, 3, -1, -1))["pool"])
    backbone = Backbone("vit_tiny_patch16_224", size=32, pretrained=False)
    assert backbone(images)["pool"].shape == (3, 192) and "bicubic to 32" in backbone.resize
    with pytest.raises(ValueError, match="no_such_net cannot be had from timm"):
        Backbone("no_such_net")


def test_clip_sees_images(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.image_size, config.patch_size, config.projection_dim = 32, 16, 8
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    clip = Clip(str(tmp_path))
    assert clip(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))["pool"].shape == (2, 8)
    with pytest.raises(ValueError, match="is no CLIP that can be had"):
        Clip(str(tmp_path / "none"))


def test_inception_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    """With weights of chance in its form, as the published ones cannot be had here."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.raises(ValueError, match=r"extractor\.path=nowhere\.pth: there is no such file; download https"):
        Inception("nowhere.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": print}))
    with pytest.raises(ValueError, match="is no file of weights alone"):
        Inception(str(tmp_path / "evil.pth"))

    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "empty.pth")
    found = Inception(str(tmp_path / "empty.pth"))
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    layers = found(images)
    assert {name: tuple(layer.shape) for name, layer in layers.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 17 * 17 * 7),
        "logits": (2, 1008),
    }
    pool, logits = found.network(images)
    assert torch.equal(pool, layers["pool"]) and torch.equal(logits, layers["logits"])


def test_files_of_adms_form(tmp_path, features):
    one = seen(features[0])
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "reference.npz"
    statistics.write(path, one.moments, images, {"number": 1500})
    with np.load(path) as file:
        assert {name: (file[name].dtype, file[name].shape) for name in file.files} == {
            "mu": (np.float64, (24,)),
            "sigma": (np.float64, (24, 24)),
            "arr_0": (np.uint8, (5, 8, 8, 3)),
        }
        assert np.abs(file["sigma"] - np.cov(features[0].double().numpy().T)).max() < 1e-12
    had = statistics.read(path)
    assert np.array_equal(had.images, images)
    assert frechet_distance(had.moments["pool"], one.moments["pool"]) == pytest.approx(0, abs=1e-10)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3))
    foreign = statistics.read(tmp_path / "foreign.npz").moments["pool"]
    assert torch.allclose(foreign.covariance, torch.eye(3, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file; make it by dit evaluate reference="),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "is no .npz that can be read, get it anew"),
        (lambda path: np.savez(path, x=np.zeros(3)), "has neither mu and sigma nor arr_0"),
        (lambda path: np.savez(path, arr_0=np.zeros((2, 3))), r"arr_0 is float64 \(2, 3\), expected uint8"),
        (lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(2)), "are no mean and covariance"),
        (lambda path: np.savez(path, arr_0=np.array([print])), "cannot be loaded when allow_pickle=False|is no .npz"),
    ],
)
def test_references_that_will_not_do(tmp_path, make, message):
    make(tmp_path / "it.npz")
    with pytest.raises(ValueError, match=message):
        statistics.read(tmp_path / "it.npz")


def test_a_reference_that_was_cut_off(tmp_path, features):
    path = tmp_path / "cut.npz"
    statistics.write(path, seen(features[0]).moments, None, {})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="get it anew"):
        statistics.read(path)
