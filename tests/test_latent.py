import pytest
import torch

from dit.latent.autoencoder import Autoencoder
from dit.latent.pixels import Pixels


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny random VAE in the library's own format: 4 channels at stride 4."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


def test_pixels_are_left_alone():
    images = torch.randn(2, 1, 8, 8)
    latent = Pixels(1, 8)
    assert latent.shape == (1, 8, 8)
    assert torch.equal(latent.decode(latent.encode(images)), images)


def test_a_vae_draws_from_its_posterior_and_scales(vae):
    latent = Autoencoder(vae, channels=4, size=8, stride=4, scale=0.5, shift=0.1)
    images = torch.randn(2, 3, 32, 32)
    generator = torch.Generator()
    z, again = (latent.encode(images, generator.manual_seed(0)) for _ in range(2))
    assert z.shape == (2, *latent.shape) and torch.equal(z, again)
    assert not torch.equal(z, latent.encode(images, generator.manual_seed(1)))
    posterior = latent.vae.encode(images).latent_dist
    torch.testing.assert_close(z, (posterior.sample(generator.manual_seed(0)) - 0.1) * 0.5)
    torch.testing.assert_close(latent.decode(z), latent.vae.decode(z / 0.5 + 0.1).sample)
    assert not any(p.requires_grad for p in latent.parameters())


def test_what_does_not_fit_is_refused(vae):
    with pytest.raises(ValueError, match=r"4 channels at stride 4, but latent\.channels=16"):
        Autoencoder(vae, channels=16, size=8, stride=4, scale=1.0)
    with pytest.raises(ValueError, match=r"latent\.name=/nowhere"):
        Autoencoder("/nowhere", channels=4, size=8, stride=4, scale=1.0)


def test_a_missing_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'ditforge\[diffusers\]'"):
        Autoencoder("x", channels=4, size=8, stride=4, scale=1.0)


def test_a_run_trains_in_the_latent_space(config, vae, capsys):
    from dit.train.run import Run

    cfg = config(
        *("latent=sd_vae", f"latent.name={vae}", "latent.stride=4", "data.image_size=16", "data.channels=3"),
        *("model.patch_size=2", "trainer.max_steps=2", "run=latent"),
    )
    run = Run(cfg)
    assert run.fit() is None
    assert "complete" not in capsys.readouterr().out


@pytest.mark.parametrize("condition", ["label_inpainting", "label_superresolution"])
def test_pictures_are_told_in_the_latent_space(config, vae, condition):
    from dit.train.run import Run

    cfg = config(
        *("latent=sd_vae", f"latent.name={vae}", "latent.stride=4", "data.image_size=16", "data.channels=3"),
        *("model.patch_size=2", "trainer.max_steps=2", f"run={condition}", f"condition={condition}"),
        "trainer.preview_every_steps=2",
    )
    run = Run(cfg)
    assert run.parts.condition.sizes == {"num_classes": 10, "image_channels": 5}
    assert run.fit() is None
