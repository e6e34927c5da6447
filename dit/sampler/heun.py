"""Heun's method, second order, with optional churn: EDM's sampler on any schedule."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit.noise.grid import pairs
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule
from dit.noise.step import mean, step

MOST_CHURN = math.sqrt(2) - 1


def sample(
    denoise: Callable[[Tensor, Tensor], Estimate],
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """x_s / c_s = x_t / c_t + d(alpha / c) x0 + d(sigma / c) eps, (x0, eps) the mean of both ends (arXiv:2206.00364).

    In the coordinates x / c the path from x0 to eps is straight (`Schedule.straight`). Where c = alpha, as on EDM and
    DDPM's linear schedule, this is the paper's algorithm 2, whose churn here stops at t_max; on flow it is Heun's
    method in t. The last step, to 0, is Euler's.

    Args:
        denoise: (x_t, t) -> (x0, eps); asked 2 N - 1 times.
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: for the churn, on the device of x.
        churn: before each step noise is added until sigma / alpha is 1 + churn times what it was: the paper's S_churn
            / N, at most sqrt(2) - 1; 0 is deterministic.
        churn_min: the least sigma / alpha at which noise is added.
        churn_max: the greatest.
        churn_noise: the standard deviation of that noise.

    Returns:
        x at times[-1].

    Raises:
        ValueError: if an option is out of range, or times do not decrease.
    """
    if not 0 <= churn <= MOST_CHURN:
        raise ValueError(f"sampler.churn={churn} must lie in [0, sqrt(2) - 1]: EDM's S_churn over the number of steps")
    if not (0 <= churn_min <= churn_max and churn_noise >= 0):
        raise ValueError(
            f"sampler.churn_min={churn_min} must not exceed churn_max={churn_max}, and churn_noise={churn_noise} "
            "must not be negative"
        )
    for t, s in pairs(times):
        now = schedule(t)
        if churn > 0 and now.alpha > 0 and churn_min <= now.sigma / now.alpha <= churn_max:
            x, t = _noisier(schedule, x, t, churn, churn_noise, generator)
        estimate = denoise(x, t)
        predicted = step(schedule, x, t, s, estimate)
        x = step(schedule, x, t, s, mean(estimate, denoise(predicted, s))) if s > 0 else predicted
    return x


def _noisier(
    schedule: Schedule, x: Tensor, t: Tensor, gain: float, std: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """X with noise added until sigma / alpha is 1 + gain times what it was, at most that of t_max; and its time."""
    later = torch.maximum(schedule.time_of(schedule.log_snr(t) - 2 * math.log1p(gain)), t)
    now, then = schedule(t), schedule(later)
    added = (then.sigma**2 - (then.alpha / now.alpha * now.sigma) ** 2).clamp(min=0).sqrt()
    z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return then.alpha / now.alpha * x + std * added * z, later
