"""Pixels as they are."""

from torch import Tensor

from dit.latent.latent import Latent


class Pixels(Latent):
    """The identity."""

    def moments(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, C, H, W)."""
        return images[:, None]

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return z
