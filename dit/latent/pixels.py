"""Pixels as they are."""

import torch
from torch import Tensor

from dit.latent.latent import Latent


class Pixels(Latent):
    """The identity."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) -> the same."""
        return images

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return z
