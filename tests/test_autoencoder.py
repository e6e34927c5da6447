import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import losses, metrics, train, weights

from dit.command import doctor, evaluate, sample, schedule
from dit.command.compose import ConfigError, compose
from dit.command.train import check
from dit.data.image import grid
from dit.latent.autoencoder import Autoencoder
from dit.model.patchgan import PatchGAN
from dit.noise.draw import Draw
from dit.objective.autoencoding import Autoencoding
from dit.objective.objective import Batch
from dit.objective.perceptual import Perceptual
from dit.train import checkpoint
from dit.train.autoencoder import Reconstructor
from dit.train.run import Run

diffusers = pytest.importorskip("diffusers")
SMALL = ("model.channels=[4,8]", "model.norm_num_groups=2", "model.latent_channels=2")
GAN = (
    *(
        "objective=autoencoding_gan",
        "objective.perceptual.pretrained=false",
        "objective.perceptual.name=test_resnet",
        "objective.discriminator.channels=8",
    ),
    *("objective.discriminator.num_layers=1", "objective.adversarial_from=4"),
)


@pytest.fixture
def overrides(tmp_path, digits_dir):
    """Overrides of a run of a tiny VAE that takes seconds."""

    def given(*more):
        return [
            *("experiment=digits_vae", f"runs_dir={tmp_path}/runs", f"data_dir={digits_dir}", "logger=none", *SMALL),
            *("learning_rate=constant", "trainer.max_steps=12", "trainer.batch_size=32", "trainer.log_every_steps=1"),
            *("trainer.preview_every_steps=100", "trainer.checkpoint_every_steps=5", "data.num_workers=0"),
            *("evaluation.num_images=200", *more),
        ]

    return given


@pytest.fixture
def vae_config(overrides):
    return lambda *more: compose("train", overrides(*more))


def tiny_autoencoder(seed=0):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    options = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "norm_num_groups": 2}
    return Reconstructor(diffusers.AutoencoderKL(block_out_channels=(4, 8), **blocks, **options))


def batch(size=8):
    x0 = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(x0, {}, Draw(0, 0, range(4), size))


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
def test_the_loss_is_reconstruction_and_kl_over_the_values_of_an_image(reconstruction):
    """Latent diffusion's, (sum of errors + 1e-6 KL) / batch size, over CHW."""
    autoencoder, given = tiny_autoencoder(), batch()
    objective = Autoencoding(reconstruction, kl_weight=0.3)
    [(name, loss)] = objective.phases(autoencoder, given, 0)
    posterior = autoencoder.network.encode(given.x0).latent_dist
    z = posterior.mean + posterior.std * given.draw.normal("posterior", (2, 4, 4))
    difference = given.x0 - autoencoder.network.decode(z).sample
    error = difference.abs() if reconstruction == "l1" else difference**2
    expected = (error.sum() + 0.3 * posterior.kl().sum()) / len(given.x0) / (1 * 8 * 8)
    assert name == "denoiser"
    torch.testing.assert_close(loss, expected)


def test_the_discriminator_is_balanced_at_the_last_layer_and_learns_by_the_hinge_loss():
    autoencoder, given, discriminator = tiny_autoencoder(), batch(), PatchGAN(1, channels=8, num_layers=1)
    objective = Autoencoding(kl_weight=0.0, discriminator=discriminator, adversarial_weight=0.5, adversarial_from=3)
    assert [name for name, _ in objective.phases(autoencoder, given, 2)] == ["denoiser"]
    (_, loss), (name, hinge) = objective.phases(autoencoder, given, 3)
    assert name == "discriminator" and objective.networks == {"discriminator": discriminator}

    posterior = autoencoder.network.encode(given.x0).latent_dist
    z = posterior.mean + posterior.std * given.draw.normal("posterior", (2, 4, 4))
    y = autoencoder.network.decode(z).sample
    error, deceit = (y - given.x0).abs().mean(), -discriminator(y).mean()
    last = autoencoder.network.decoder.conv_out.weight
    a, b = (torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (error, deceit))
    torch.testing.assert_close(loss, error + 0.5 * (a / (b + 1e-4)).clamp(max=1e4) * deceit)
    real, made = discriminator(given.x0), discriminator(y)
    torch.testing.assert_close(hinge, ((1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()) / 2)
    autoencoder.zero_grad()
    hinge.backward()
    assert all(p.grad is None for p in autoencoder.parameters())


def test_a_patchgan_judges_patches_alike_in_any_batch():
    discriminator = PatchGAN(3)
    images = torch.randn(2, 3, 64, 64)
    judged = discriminator(images)
    assert judged.shape == (2, 1, 6, 6)
    torch.testing.assert_close(discriminator(images[:1]), judged[:1])
    assert sum(p.numel() for p in PatchGAN(6).parameters()) == 2_768_705  # as published, of pairs of images
    assert torch.equal(PatchGAN(3).layers[0].weight, discriminator.layers[0].weight)
    with pytest.raises(ValueError, match=r"channels=6 must be a multiple of 8"):
        PatchGAN(3, channels=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "l3"}, "choose one of l1, l2"),
        ({"kl_weight": -1.0}, r"objective\.kl_weight=-1"),
        ({"adversarial_weight": -1.0}, r"objective\.adversarial_weight=-1"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Autoencoding(**options)


def test_a_perceptual_distance_is_that_of_unit_features():
    pytest.importorskip("timm")
    perceptual = Perceptual("test_resnet", pretrained=False)
    x, y = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = perceptual(x, y)
    assert distance.shape == (3,) and (distance > 0).all()
    assert torch.equal(perceptual(x, x), torch.zeros(3))
    torch.testing.assert_close(perceptual(y, x), distance)
    torch.testing.assert_close(Perceptual("test_resnet", pretrained=False)(x, y), distance)
    scaled = [(images.expand(-1, 3, -1, -1) / 2 + 0.5 - perceptual.mean) / perceptual.std for images in (x, y)]
    expected = 0
    for f, g in zip(*(perceptual.model(images) for images in scaled), strict=True):
        cosine = torch.nn.functional.cosine_similarity(f, g)
        expected = expected + (2 - 2 * cosine).flatten(1).mean(1)  # |f - g|^2 of unit vectors
    torch.testing.assert_close(distance, expected, atol=1e-5, rtol=1e-4)
    y.requires_grad_()
    perceptual(x, y).sum().backward()
    assert y.grad.abs().sum() > 0
    assert list(Autoencoding(perceptual=perceptual).parameters()) == []  # not in the checkpoints
    with pytest.raises(ValueError, match=r"objective\.perceptual\.name=nope is no model of timm"):
        Perceptual("nope")


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'ditforge\[perceptual\]'"):
        Perceptual("vgg16.tv_in1k")


def test_the_standard_shape_has_the_published_number_of_parameters():
    cfg = compose(
        "train", ["experiment=digits_vae", "model=autoencoder_kl_f8", "data.image_size=256", "data.channels=3"]
    )
    from dit.train.build import parts_of

    network = parts_of(cfg).denoiser("meta").network
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    assert type(network) is diffusers.AutoencoderKL


def test_a_run_leaves_a_vae_that_diffusers_reads(vae_config, tmp_path):
    run = Run(vae_config("run=mine"))
    assert run.fit() is None
    lines, summary = metrics(run.folder), json.loads((run.folder / "summary.json").read_text())
    assert lines[-1]["loss"] < lines[0]["loss"] and summary["psnr"] > 5 and "psnr_told" not in summary
    names = {path.name for path in run.folder.iterdir()} - {".lock"}
    lineage = {"lineage", "lineage.jsonl"}
    assert names == {
        "attempts",
        "config.yaml",
        "evaluation.jsonl",
        "metrics.jsonl",
        "samples",
        "summary.json",
        "checkpoints",
        "vae",
        *lineage,
    }
    vae = diffusers.AutoencoderKL.from_pretrained(run.folder / "vae")
    average = checkpoint.load_weights(checkpoint.newest(run.folder / "checkpoints"), "ema")
    assert all(torch.equal(value, average[name]) for name, value in vae.named_parameters())

    latent = Autoencoder(str(run.folder / "vae"), channels=2, size=4, stride=2, in_channels=1)
    images = run.data.read("train")["image"].float() / 127.5 - 1
    z = latent.encode(images, torch.Generator().manual_seed(1))
    assert z.mean().item() == pytest.approx(0, abs=0.05) and z.std().item() == pytest.approx(1, abs=0.05)

    before = (run.folder / "vae" / "config.json").read_text()
    assert Run(vae_config("run=mine", "trainer.max_steps=14")).fit() is None
    assert (run.folder / "vae" / "config.json").read_text() != before
    assert not list(run.folder.glob("vae.*"))


def test_previews_show_originals_above_their_reconstructions(vae_config):
    run = Run(vae_config("run=seen", "trainer.max_steps=1"))
    assert run.fit() is None
    expected = grid(run.data.read("held_out", most=10)["image"], 10)[0].numpy()
    with Image.open(run.folder / "samples" / "step-00000001.png") as file:
        picture = np.array(file)
    height, width = expected.shape
    assert picture.shape == (8 * height + 7 * 2, width)
    assert np.array_equal(picture[:height], expected)
    assert not np.array_equal(picture[height + 2 :][:height], expected)


@pytest.mark.parametrize("gan", [(), GAN], ids=["alone", "discriminator"])
def test_a_run_goes_on_bit_equal_with_all_its_optimizers(vae_config, gan):
    whole = train(vae_config("run=whole", *gan))
    train(vae_config("run=parts", "trainer.max_steps=7", *gan))
    assert losses(train(vae_config("run=parts", *gan))) == losses(whole)
    runs = Path(vae_config().runs_dir)
    for name, tensors in weights(runs / "parts").items():
        for key, value in weights(runs / "whole")[name].items():
            assert torch.equal(tensors[key], value), (name, key)
    last, undisturbed = (runs / name / "checkpoints" / "step-00000012" for name in ("parts", "whole"))
    assert checkpoint.layout(last, "optimizer") and bool(checkpoint.layout(last, "optimizer-discriminator")) == bool(
        gan
    )
    if gan:
        state = checkpoint.load_weights(last, "optimizer-discriminator")
        assert {value.item() for name, value in state.items() if name.endswith("/step")} == {8}  # from step 4 to 12
        ours, theirs = (checkpoint.load_weights(path, "objective") for path in (last, undisturbed))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert not torch.equal(ours["discriminator.layers.0.weight"], PatchGAN(1, 8, 1).layers[0].weight)


def test_micro_batches_do_not_change_the_numbers(vae_config):
    whole = train(vae_config("run=whole", "trainer.max_steps=4"))
    parts = train(vae_config("run=parts", "trainer.max_steps=4", "trainer.micro_batch_size=8"))
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_bf16_trains(vae_config):
    lines = train(vae_config("run=bf16", "trainer.precision=bf16-mixed", *GAN, "trainer.max_steps=6"))
    assert lines[3]["loss"] == pytest.approx(train(vae_config("run=fp32", *GAN))[3]["loss"], rel=0.05)


def test_a_denoiser_trains_in_a_latent_space_of_ones_own(vae_config, tiny):
    run = Run(vae_config("run=mine", "trainer.max_steps=2"))
    assert run.fit() is None
    latent = ("latent=digits_vae", f"latent.name={run.folder}/vae", "latent.channels=2", "model.patch_size=2")
    assert Run(compose("train", tiny(*latent, "trainer.max_steps=2"))).fit() is None


def test_half_an_autoencoder_is_refused_without_torch(overrides, tiny):
    for given, message in [
        (
            overrides("noise=cosine"),
            "objective=autoencoding trains an autoencoder, which knows no noise: choose noise=",
        ),
        (tiny("noise=none"), "noise=none is for objective=autoencoding alone"),
        (tiny("objective=autoencoding"), "which knows no noise: choose noise=none"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check(compose("train", given))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["condition=label"], "choose condition=none"),
        (["latent=sd_vae", "latent.name=/nowhere"], "nowhere"),
        (["model.channels=[4,8,8,8,8]"], "which does not go: take fewer"),
        (["model.norm_num_groups=3"], r"model\.norm_num_groups=3 must divide"),
        (["model.in_channels=3"], "model.in_channels=3 differs from data.channels=1"),
        (["trainer.compile=true"], "names no units to compile"),
        (["metric=likelihood"], "metric=likelihood is that of denoisers"),
    ],
)
def test_what_does_not_fit_an_autoencoder_is_refused(vae_config, more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Run(vae_config(*more))
    assert not (tmp_path / "runs").exists()


def test_networks_of_the_other_kind_are_refused(digits_dir):
    given = [f"data_dir={digits_dir}", "logger=none"]
    with pytest.raises(ValueError, match="model is an autoencoder, which does not denoise"):
        Run(compose("train", ["experiment=digits", "condition=none", "model=autoencoder_digits", *given]))
    with pytest.raises(ValueError, match="is for autoencoders, which DiT is not"):
        Run(compose("train", ["experiment=digits_vae", "model=dit_digits", *given]))


def test_verbs_know_what_an_autoencoder_is_for(vae_config, overrides, tmp_path):
    from dit.train import trained

    run = Run(vae_config("run=mine", "trainer.max_steps=2"))
    assert run.fit() is None
    named = ["run=mine", f"runs_dir={tmp_path}/runs"]
    is_one = r"run=mine is an autoencoder.* latent=digits_vae latent\.name=.*/runs/mine/vae"
    sample.prepare(named)
    with pytest.raises(ConfigError, match=is_one):
        sample.check(compose("sample", named))
    with pytest.raises(ValueError, match=is_one):
        trained.denoiser("mine", f"{tmp_path}/runs")
    with pytest.raises(ConfigError, match="run=doctor is an autoencoder"):
        doctor.main(compose("doctor", ["experiment=digits_vae"]))
    with pytest.raises(ConfigError, match="run=schedule is an autoencoder"):
        schedule.check(compose("schedule", ["experiment=digits_vae", "run=schedule"]))

    def judge(*more):
        evaluate.prepare([*named, *more])
        cfg = compose("evaluate", [*named, *more])
        evaluate.check(cfg)
        assert evaluate.main(cfg) == 0
        return json.loads((run.folder / "evaluation.jsonl").read_text().splitlines()[-1])["figures"]

    figures = judge("num_samples=200", "seed=1")  # or training's would be said again
    assert figures["psnr"] == pytest.approx(json.loads((run.folder / "summary.json").read_text())["psnr"], abs=0.01)
    with pytest.raises(ConfigError, match="metric=likelihood is that of denoisers"):
        judge("metric=likelihood")
    with pytest.raises(ConfigError, match="which knows no sampler: choose sampler=none"):
        judge("sampler=ddim")
