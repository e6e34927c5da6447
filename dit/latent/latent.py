"""The interface of a latent space."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Latent(nn.Module, ABC):
    """Images in [-1, 1], (B, C, H, W), <-> z (B, c, h, h) of about zero mean and unit variance.

    Args:
        channels: channels of z, c.
        size: height and width of z, h.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.shape = (channels, size, size)

    @abstractmethod
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Z of images; where the encoder's answer is a distribution, a draw from it."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The images of z."""
