"""What a metric is given to judge."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Subject(NamedTuple):
    """A trained model, as far as metrics look at it."""

    draw: Callable[[Tensor], Tensor]  # labels (N,) -> uint8 images (N, C, H, W), sampled as the run is configured
    denoise: Callable[[Tensor, Tensor, Tensor], Any]  # x_t (B, C, H, W), t (B,) or (), labels (B,) -> (x0, eps)
    schedule: Any  # t -> (alpha, sigma)
    shape: tuple[int, ...]  # (C, H, W) of what the network sees
