"""Multistep consistency sampling: say x0 at once, add noise, say it again."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit.noise.grid import pairs
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule


def sample(
    denoise: Callable[[Tensor, Tensor], Estimate],
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_s = alpha_s x0 + sigma_s z, z fresh (arXiv:2303.01469, algorithm 1, on any schedule).

    Args:
        denoise: (x_t, t) -> (x0, eps).
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: for z, on the device of x.

    Returns:
        x at times[-1].

    Raises:
        ValueError: if times do not decrease.
    """
    for t, s in pairs(times):
        alpha, sigma = schedule(s)
        x = alpha * denoise(x, t).x0
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x
