"""The latent space of a frozen variational autoencoder."""

import torch
from torch import Tensor

from dit.latent.latent import Latent


class Autoencoder(Latent):
    """z = (posterior sample - shift) * scale, by an `AutoencoderKL` of diffusers.

    Args:
        name: a hub name, or a folder that `save_pretrained` wrote.
        channels: channels of z, checked against the weights.
        size: height and width of z.
        stride: pixels of the image to one of z, along each side, checked against the weights.
        scale: what brings z to unit variance; 0.18215 for Stable Diffusion's.
        shift: what brings z to zero mean.

    Raises:
        ImportError: if diffusers is missing.
        ValueError: if the weights are not there, or have other channels or another stride.
    """

    def __init__(self, name: str, channels: int, size: int, stride: int, scale: float, shift: float = 0.0):
        super().__init__(channels, size)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError("latent=sd_vae needs diffusers: pip install 'ditforge[diffusers]'") from error
        try:
            self.vae = AutoencoderKL.from_pretrained(name).requires_grad_(False).eval()
        except Exception as error:  # diffusers and safetensors raise many kinds
            raise ValueError(
                f"latent.name={name} is neither a folder with a VAE nor to be had from the hub: {error}"
            ) from error
        config = self.vae.config
        found = (config.latent_channels, 2 ** (len(config.block_out_channels) - 1))
        if found != (channels, stride):
            raise ValueError(
                f"the VAE {name} has {found[0]} channels at stride {found[1]}, "
                f"but latent.channels={channels} and latent.stride={stride}"
            )
        self.scale = scale
        self.shift = shift

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw from the posterior: (B, 3, H, W) -> (B, channels, H / stride, W / stride)."""
        return (self.vae.encode(images).latent_dist.sample(generator) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 3, h stride, w stride)."""
        images: Tensor = self.vae.decode(z / self.scale + self.shift).sample
        return images
