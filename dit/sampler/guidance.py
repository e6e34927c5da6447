"""Guidance: a wrapped denoiser, same call in, same call out."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser
from dit.noise.prediction import Estimate


class ClassifierFree:
    """estimate = nothing + scale (told - nothing): classifier-free guidance (arXiv:2207.12598), all channels.

    Scale 1 is no guidance, and then costs nothing. The two halves run as one batch of 2B. As both halves share x_t,
    the same image results whatever the network predicts.

    Args:
        denoiser: (x_t, t, **cond) -> (x0, eps).
        null: cond -> cond of the same shapes that says nothing.
        scale: 1 or more to sharpen; 0 ignores the condition.

    Raises:
        ValueError: if scale is negative.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        scale: float = 1.0,
    ):
        if scale < 0:
            raise ValueError(f"guidance.scale={scale} must not be negative: 1 is no guidance")
        self.denoiser = denoiser
        self.null = null
        self.scale = scale

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Estimate:
        """The guided estimate of (x0, eps)."""
        if self.scale == 1:
            return self.denoiser(x_t, t, **cond)
        null = self.null(cond)
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        doubled = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]) if t.ndim else t, **both)
        halves = (part.chunk(2) for part in doubled)
        return Estimate(*(nothing + self.scale * (told - nothing) for told, nothing in halves))
