"""The latent space of a frozen autoencoder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.latent.latent import Latent

KINDS = ("AutoencoderKL", "AutoencoderDC")  # of diffusers: with a posterior, and deterministic


class Autoencoder(Latent):
    """z = (posterior sample - shift) * scale, by an `AutoencoderKL` or `AutoencoderDC` of diffusers, in float32.

    Args:
        name: a hub name, or a folder that `save_pretrained` wrote.
        channels: channels of z, checked against the weights.
        size: height and width of z.
        stride: pixels of the image to one of z, along each side, checked against the weights.
        in_channels: channels of the images, checked against the weights.
        scale: what brings z to unit variance; None: the `scaling_factor` that the weights come with.
        shift: what brings z to zero mean; None: their `shift_factor`.
        subfolder: where the autoencoder is, in a pipeline.

    Raises:
        ImportError: if diffusers is missing.
        ValueError: if the weights are not there, of another kind, or have other channels or another stride.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        size: int,
        stride: int,
        in_channels: int = 3,
        scale: float | None = None,
        shift: float | None = None,
        subfolder: str | None = None,
    ):
        try:
            import diffusers
        except ImportError as error:
            raise ImportError("a VAE needs diffusers: pip install 'ditforge[diffusers]', or latent=pixels") from error
        config = _read(diffusers.AutoencoderKL.load_config, name, subfolder=subfolder)
        kind = config.get("_class_name")
        if kind not in KINDS:
            raise ValueError(f"latent.name={name} is a {kind}: give one of {', '.join(KINDS)}")
        load = getattr(diffusers, kind).from_pretrained
        vae = _read(load, name, subfolder=subfolder, low_cpu_mem_usage=False)  # which would want accelerate
        widths = vae.config["encoder_block_out_channels" if kind == "AutoencoderDC" else "block_out_channels"]
        found = {
            "channels": vae.config.latent_channels,
            "stride": 2 ** (len(widths) - 1),
            "in_channels": vae.config.in_channels,
        }
        for key, value in {"channels": channels, "stride": stride, "in_channels": in_channels}.items():
            if value != found[key]:
                facts = ", ".join(f"latent.{key}={value}" for key, value in found.items())
                raise ValueError(f"latent.{key}={value} is not what the VAE {name} has: {facts}")
        if scale is None:
            scale = vae.config.scaling_factor
        if shift is None:
            shift = vae.config.get("shift_factor") or 0.0
        super().__init__(channels, size, scale, shift)
        self.vae = vae.requires_grad_(False).eval()
        self.name = f"{name}/{subfolder}" if subfolder else name

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, channels, H / stride, W / stride), K = 2, or 1 of a deterministic encoder."""
        with torch.autocast(images.device.type, enabled=False):  # of the network, whose training it sits in
            encoded = self.vae.encode(images)
        if "latent_dist" not in encoded:
            latent: Tensor = encoded.latent
            return latent[:, None]
        return torch.stack(encoded.latent_dist.parameters.chunk(2, dim=1), dim=1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, C, h stride, w stride)."""
        with torch.autocast(z.device.type, enabled=False):
            images: Tensor = self.vae.decode(z / self.scale + self.shift).sample
        return images


def _read(read: Any, name: str, **options: Any) -> Any:
    try:
        folder = name.startswith((".", "/")) or name.count("/") > 1 or ("/" in name and Path(name).parent.exists())
        if folder and not Path(name).exists():
            raise OSError("there is no such folder")  # and no need to ask the hub
        return read(name, **options)
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise ValueError(
            f"latent.name={name} is neither a folder with a VAE (a run that trains one writes it at its end) nor to be "
            f"had from the hub (offline, or a wrong name): {' '.join(str(error).split())[:300]}"
        ) from error
