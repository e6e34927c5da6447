"""Flow-map sampling: one step lands where the network was told to."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit.noise.grid import pairs
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule
from dit.noise.step import step


def sample(
    denoise: Callable[[Tensor, Tensor, Tensor], Estimate],
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_s = x_t - (t - s) u(x_t, t, s) on flow (arXiv:2505.13447, algorithm 2); otherwise `step`. Deterministic.

    Args:
        denoise: (x_t, t, s) -> the (x0, eps) with which one step lands at s.
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: unused.

    Returns:
        x at times[-1].

    Raises:
        ValueError: if times do not decrease.
    """
    for t, s in pairs(times):
        x = step(schedule, x, t, s, denoise(x, t, s))
    return x
