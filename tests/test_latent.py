import pytest
import torch
from omegaconf import OmegaConf

from dit.command.compose import compose
from dit.latent.autoencoder import Autoencoder
from dit.latent.pixels import Pixels
from dit.noise.draw import Draw
from dit.train import encoding


def save(folder, seed=0, **options):
    """A tiny random VAE in the library's own format: 4 channels at stride 4, unless told otherwise."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    shape = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    diffusers.AutoencoderKL(**shape | options).save_pretrained(folder)
    return str(folder)


def save_dc(folder):
    """A tiny random deep-compression autoencoder: 8 channels at stride 4."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    widths, layers = (8, 8, 16), (1, 1, 1)
    diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save(tmp_path_factory.mktemp("vae"))


def test_pixels_are_left_alone():
    images = torch.randn(2, 1, 8, 8)
    latent = Pixels(1, 8)
    assert latent.shape == (1, 8, 8)
    assert torch.equal(latent.decode(latent.encode(images)), images)
    assert latent.moments(images).shape == (2, 1, 1, 8, 8) and not latent.name


@pytest.mark.parametrize("channels", [4, 16])
def test_a_vae_draws_from_its_posterior_and_scales(tmp_path, channels):
    """As the library itself does, with the same numbers; 16 channels as Stable Diffusion 3 and FLUX.1 have them."""
    given = {"use_quant_conv": channels == 4, "use_post_quant_conv": channels == 4}
    vae = save(tmp_path, latent_channels=channels, scaling_factor=1.5305, shift_factor=0.0609, **given)
    latent = Autoencoder(vae, channels=channels, size=8, stride=4, scale=0.5, shift=0.1)
    images = torch.randn(2, 3, 32, 32)
    generator = torch.Generator()
    z, again = (latent.encode(images, generator.manual_seed(0)) for _ in range(2))
    assert z.shape == (2, *latent.shape) and torch.equal(z, again)
    assert not torch.equal(z, latent.encode(images, generator.manual_seed(1)))
    posterior = latent.vae.encode(images).latent_dist
    torch.testing.assert_close(z, (posterior.sample(generator.manual_seed(0)) - 0.1) * 0.5)
    torch.testing.assert_close(latent.decode(z), latent.vae.decode(z / 0.5 + 0.1).sample)
    assert not any(p.requires_grad for p in latent.parameters())

    moments = latent.moments(images)
    torch.testing.assert_close(moments, torch.stack([posterior.mean, posterior.parameters.chunk(2, 1)[1]], 1))
    assert torch.equal(latent.draw(moments, generator.manual_seed(0)), z)
    torch.testing.assert_close(latent.draw(moments.half(), generator.manual_seed(0)), z, atol=5e-3, rtol=0)
    own = Autoencoder(vae, channels=channels, size=8, stride=4)
    assert (own.scale, own.shift) == (1.5305, 0.0609)
    torch.testing.assert_close(own.encode(images, generator.manual_seed(0)), (z / 0.5 + 0.1 - 0.0609) * 1.5305)


def test_the_log_variance_is_clamped():
    moments = torch.zeros(1, 2, 1, 4, 4)
    moments[:, 1] = 1000.0
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        Pixels(1, 4).draw(moments, torch.Generator().manual_seed(0)), noise * torch.tensor(10.0).exp()
    )


def test_a_deterministic_autoencoder_draws_nothing(tmp_path):
    latent = Autoencoder(save_dc(tmp_path), channels=8, size=8, stride=4, scale=None, shift=None)
    images = torch.randn(2, 3, 32, 32)
    moments, z = latent.moments(images), latent.encode(images)
    assert moments.shape == (2, 1, 8, 8, 8) and latent.scale == 0.41407 and latent.shift == 0
    torch.testing.assert_close(z, latent.vae.encode(images).latent * 0.41407)
    torch.testing.assert_close(latent.decode(z), latent.vae.decode(z / 0.41407).sample)


def test_mixed_precision_leaves_the_vae_as_it_is(vae):
    latent = Autoencoder(vae, channels=4, size=8, stride=4)
    images = torch.randn(1, 3, 32, 32)
    expected = latent.moments(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(latent.moments(images), expected)
        assert latent.decode(expected[:, 0]).dtype == torch.float32


def test_weights_tell_a_vae_from_another(vae, tmp_path):
    def identity(name, subfolder=None):
        return encoding.identity(Autoencoder(name, channels=4, size=8, stride=4, subfolder=subfolder))

    copy = save(tmp_path / "pipeline" / "copy").removesuffix("/copy")
    assert identity(vae) == {"name": vae, "sha256": identity(copy, "copy")["sha256"]}
    assert identity(copy, "copy")["name"] == f"{copy}/copy" and len(identity(vae)["sha256"]) == 64
    assert identity(save(tmp_path / "other", seed=1))["sha256"] != identity(vae)["sha256"]


def test_what_does_not_fit_is_refused(vae, tmp_path):
    has = r"latent\.channels=4, latent\.stride=4, latent\.in_channels=3"
    with pytest.raises(ValueError, match=rf"latent\.channels=16 is not what the VAE .* has: {has}"):
        Autoencoder(vae, channels=16, size=8, stride=4, scale=1.0)
    with pytest.raises(ValueError, match=rf"latent\.in_channels=1 is not what the VAE .* has: {has}"):
        Autoencoder(vae, channels=4, size=8, stride=4, in_channels=1)
    for name in ("/nowhere", "runs/no_such_run/vae"):
        with pytest.raises(ValueError, match=rf"latent\.name={name} is neither .*there is no such folder"):
            Autoencoder(name, channels=4, size=8, stride=4, scale=1.0)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="is a UNet2DModel: give one of AutoencoderKL, AutoencoderDC"):
        Autoencoder(str(tmp_path), channels=4, size=8, stride=4)


def test_channels_of_the_data_are_those_of_the_vae(config):
    from dit.train.run import Run

    cfg = config("latent=sd_vae", "latent.name=/nowhere", "data.image_size=64", "run=grey")
    with pytest.raises(ValueError, match=r"latent\.in_channels=3 differs from data\.channels=1"):
        Run(cfg)


def test_a_missing_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'ditforge\[diffusers\]'"):
        Autoencoder("x", channels=4, size=8, stride=4, scale=1.0)


def test_the_standard_vae_compresses_48_times():
    cfg = compose("train", ["run=x", "data=webdataset", "data.path=x", "latent=sd_vae", "model=dit_xl_2"])
    image = cfg.data.channels * cfg.data.image_size**2
    z = cfg.latent.channels * cfg.latent.size**2
    assert (cfg.data.image_size, cfg.latent.stride, cfg.latent.size, cfg.latent.channels) == (256, 8, 32, 4)
    assert (image, z, image / z) == (256 * 256 * 3, 32 * 32 * 4, 48)
    assert (cfg.model.input_size, cfg.model.in_channels) == (32, 4)


@pytest.mark.parametrize(
    ("name", "channels", "size", "scale", "shift"),
    [
        ("sd_vae_mse", 4, 32, 0.18215, 0.0),
        ("sdxl_vae", 4, 32, 0.13025, 0.0),
        ("sd3_vae", 16, 32, 1.5305, 0.0609),
        ("flux_vae", 16, 32, 0.3611, 0.1159),
        ("dc_ae", 32, 8, 0.41407, 0.0),
    ],
)
def test_published_vaes_have_their_scale_and_shift(name, channels, size, scale, shift):
    latent = compose("train", ["run=x", "data=webdataset", "data.path=x", f"latent={name}"]).latent
    assert (latent.channels, latent.size, latent.scale, latent.shift) == (channels, size, scale, shift)
    assert latent.subfolder == ("vae" if channels == 16 else None) and "/" in latent.name


IN_LATENTS = ("latent.stride=4", "data.image_size=16", "data.channels=3", "model.patch_size=2")


def test_a_run_trains_in_the_latent_space(config, vae, capsys):
    from dit.train.run import Run

    cfg = config("latent=sd_vae", f"latent.name={vae}", *IN_LATENTS, "trainer.max_steps=2", "run=latent")
    run = Run(cfg)
    assert run.fit() is None
    assert "complete" not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_moments_of_shards_give_the_same_z_as_encoding_on_the_fly(config, vae, precision):
    from dit.train.build import Parts, build
    from dit.train.module import DiffusionModule
    from dit.train.strategy import Strategy
    from dit.train.world import World

    cfg = config("latent=sd_vae", f"latent.name={vae}", *IN_LATENTS, "run=x")
    parts = Parts(cfg)
    latent = parts.latent()
    makers = [build(cfg[name]) for name in ("optimizer", "learning_rate", "ema")]
    options = {"seed": 3, "lanes": 4, "num_micro_batches": 2}
    strategy = Strategy(cfg.trainer, World(), torch.device("cpu"))
    module = DiffusionModule(
        parts.denoiser, strategy, build(cfg.objective), parts.condition, latent, *makers, **options
    )
    module.step = 5
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    common = {"key": [str(i) for i in range(8)], "label": torch.zeros(8, dtype=torch.long)}
    moments = latent.moments(images.float() / 127.5 - 1)  # in another division, as a tool would
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        flying = list(module._micro_batches({**common, "image": images}))
        stored = list(module._micro_batches({**common, "latent": moments}))
    assert [len(part.x0) for part in stored] == [4, 4]
    for a, b in zip(flying, stored, strict=True):
        torch.testing.assert_close(a.x0, b.x0, atol=1e-5, rtol=0)
    keyed = Draw(3, 5, range(4), 8).apply("latent", latent.draw, moments)
    torch.testing.assert_close(torch.cat([part.x0 for part in stored]), keyed)


@pytest.mark.parametrize("condition", ["label_inpainting", "label_superresolution"])
def test_pictures_are_told_in_the_latent_space(config, vae, condition):
    from dit.train.run import Run

    cfg = config(
        *("latent=sd_vae", f"latent.name={vae}", *IN_LATENTS, "trainer.max_steps=2"),
        *(f"run={condition}", f"condition={condition}", "trainer.preview_every_steps=2"),
    )
    run = Run(cfg)
    assert run.parts.condition.sizes == {"num_classes": 10, "image_channels": 5}
    assert run.fit() is None


def test_restored_images_are_judged_in_the_latent_space_too(config, vae):
    from dit.train.run import Run

    told = ("condition=superresolution", "metric=psnr", "run=judged", "evaluation.num_images=100")
    run = Run(config("latent=sd_vae", f"latent.name={vae}", *IN_LATENTS, "trainer.max_steps=1", *told))
    assert run.fit() is None
    summary = OmegaConf.load(run.folder / "summary.json")
    assert summary.psnr > 0 and "psnr_told" not in summary
