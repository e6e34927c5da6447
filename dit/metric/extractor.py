"""The interface of a network that sees features in images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


class Extractor(nn.Module, ABC):
    """A frozen network, and how images are made for it.

    Attributes:
        name: what it is, beside the hash of its weights.
        resize: in words, how images are brought to its size.
        layers: those of `pool` (N, D), `spatial` (N, D) and `logits` (N, classes) that it has.
    """

    name: str
    resize: str
    layers: Sequence[str] = ("pool",)

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Uint8 images (N, C, H, W) -> by layer, features (N, D)."""


def coloured(images: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) with three channels; others as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def check_file(path: str | Path, key: str, way_out: str) -> Path:
    """A file of weights that must be there, and hold nothing that could run code, as libraries would let it.

    Raises:
        ValueError: if it does not.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key}={path}: there is no such file; {way_out}")
    if Path(path).suffix != ".safetensors":
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise ValueError(f"{key}={path} is no file of weights alone; {way_out}") from error
    return Path(path)
