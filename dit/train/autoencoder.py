"""A run whose network is an autoencoder: what a run asks of `Parts`, without noise."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dit.latent.latent import Latent
from dit.metric.subject import Samples, Subject
from dit.sampler.pipeline import to_uint8
from dit.train.build import PIXELS, build


class Reconstructor(nn.Module):
    """Images in [-1, 1] -> the same, through the mean of the posterior.

    Args:
        network: `AutoencoderKL` of diffusers.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        reconstruction: Tensor = self.network.decode(self.network.encode(images).latent_dist.mode()).sample
        return reconstruction


class AutoencoderParts:
    """The objects that the configuration of an autoencoder describes.

    Args:
        cfg: with the nodes model, condition and latent.

    Raises:
        ValueError: if two do not fit together.
    """

    restores = True
    adapter = None

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.condition = build(cfg.condition)
        self.model = build(cfg.model)
        if self.condition.sizes or self.condition.fields:
            raise ValueError("objective=autoencoding tells nothing besides the image: choose condition=none")
        if cfg.latent._target_ != PIXELS:
            raise ValueError(
                f"objective=autoencoding sees pixels, but latent.name={cfg.latent.get('name')}: latent=pixels"
            )
        if cfg.data.get("encoded"):
            raise ValueError("objective=autoencoding sees images, but data.encoded=true: take data of images")
        for ours, theirs in {"in_channels": "channels", "input_size": "image_size"}.items():
            if (mine := cfg.model.get(ours, cfg.data[theirs])) != cfg.data[theirs]:
                raise ValueError(f"model.{ours}={mine} differs from data.{theirs}={cfg.data[theirs]}")

    def denoiser(self, device: str = "cpu") -> Reconstructor:
        """A new, untrained autoencoder: what is trained, in a denoiser's stead."""
        with torch.device(device):
            return Reconstructor(self.model())

    def learner(self, device: str = "cpu") -> Reconstructor:
        """The same, which is trained as a whole."""
        return self.denoiser(device)

    def latent(self) -> Latent:
        """Pixels."""
        latent: Latent = build(self.cfg.latent)
        return latent

    def subject(
        self,
        denoiser: Reconstructor,
        latent: Latent,
        *,
        seed: int,
        batch_size: int,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Subject:
        """What metrics judge: samples are drawn by reconstructing their images."""

        @torch.no_grad()
        def draw(samples: Samples, start: int = 0) -> Tensor:
            device = next(denoiser.parameters()).device
            with within():
                parts = [_scaled(images, device) for images in samples["image"].split(batch_size)]
                return torch.cat([to_uint8(denoiser(images)) for images in parts]).cpu()

        return Subject(lambda samples: {}, draw, None, None, latent.shape, restores=True)

    @torch.no_grad()
    def export(self, denoiser: Reconstructor, data: Any, folder: Path) -> None:
        """Write what was trained as diffusers does, to `folder/vae`, with the scale and shift of its latent space.

        Those bring draws from the posteriors of training images to unit variance and zero mean, over all channels
        (arXiv:2112.10752, section 4.3.2).
        """
        network, device = denoiser.network, next(denoiser.parameters()).device
        images = data.read("train", most=self.cfg.evaluation.num_images)["image"]
        batches = [_scaled(part, device) for part in images.split(self.cfg.evaluation.batch_size)]
        moments = torch.cat([network.encode(part).latent_dist.parameters for part in batches])
        generator = torch.Generator(device).manual_seed(self.cfg.seed)
        z = self.latent().draw(torch.stack(moments.chunk(2, dim=1), dim=1), generator)
        network.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
        final = folder / "vae"
        partial, old = final.with_suffix(".tmp"), final.with_suffix(".old")
        for stale in (partial, old):
            shutil.rmtree(stale, ignore_errors=True)
        network.save_pretrained(partial)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        print(f"dit: a latent space to train in: latent=digits_vae latent.name={final}", flush=True)


def _scaled(images: Tensor, device: torch.device) -> Tensor:
    """0..255 -> [-1, 1]."""
    return images.to(device).float() / 127.5 - 1
