"""The interface of a latent space."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Latent(nn.Module, ABC):
    """Images in [-1, 1], (B, C, H, W), <-> z (B, c, h, h) of about zero mean and unit variance.

    An encoder gives moments (B, K, c, h, h): the mean and the log-variance of a posterior (K = 2), or, where it is
    deterministic, its answer alone (K = 1). z = (draw from the posterior - shift) * scale.

    Args:
        channels: channels of z, c.
        size: height and width of z, h.
        scale: what brings z to unit variance.
        shift: what brings z to zero mean.
    """

    def __init__(self, channels: int, size: int, scale: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.shape = (channels, size, size)
        self.scale = scale
        self.shift = shift

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """What the encoder says of images, (B, K, c, h, h), neither scaled nor shifted."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The images of z."""

    def draw(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Z of moments: mean + exp(logvar / 2) * noise, shifted and scaled; in float32."""
        mean, *logvar = moments.float().unbind(1)
        for each in logvar:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            mean = mean + (each.clamp(-30, 20) / 2).exp() * noise  # clamped as the libraries do that VAEs come from
        return (mean - self.shift) * self.scale

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Z of images; where the encoder's answer is a distribution, a draw from it."""
        return self.draw(self.moments(images), generator)

    def identity(self) -> dict[str, str] | None:
        """What tells this latent space from others: `name` and `sha256` of its weights; None: it has none."""
        return None
