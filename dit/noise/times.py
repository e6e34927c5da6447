"""Which t to train on: densities.

A density is `f(schedule, u) -> t`, both (B,), u uniform in [0, 1), through its inverse distribution function, so that
keyed, stratified and low-discrepancy numbers (`noise/draw.py`) serve every density.
"""

import math

import torch
from torch import Tensor

from dit.noise.schedule import Schedule


def uniform(schedule: Schedule, u: Tensor, *, shift: float = 1.0) -> Tensor:
    """T uniform in (0, t_max], then shifted."""
    return schedule.t_max * shifted(1 - u, shift)


def discrete(schedule: Schedule, u: Tensor) -> Tensor:
    """One of the times k / N, k = 1..N, of a schedule with N discrete steps, as DDPM draws them."""
    num_steps = num_discrete_steps(schedule, "times=discrete", "times=uniform")
    return ((1 - u) * num_steps).ceil().clamp(1, num_steps) / num_steps * schedule.t_max


def logit_normal(schedule: Schedule, u: Tensor, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """A time with t / t_max = sigmoid(n), n ~ N(mean, std^2) (arXiv:2403.03206, section 3.1), then shifted."""
    return shifted(_normal(u, mean, std).sigmoid(), shift) * schedule.t_max


def log_normal(schedule: Schedule, u: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log(sigma / alpha) ~ N(mean, std^2); EDM's, where that is log t (arXiv:2206.00364, table 1)."""
    return schedule.time_of(-2 * _normal(u, mean, std))


def cosine_interpolated(
    schedule: Schedule,
    u: Tensor,
    *,
    size: int,
    size_low: int = 32,
    size_high: int = 64,
    sigma_min: float = 1e-3,
    sigma_max: float = 1e3,
) -> Tensor:
    """Cosine in log SNR, shifted to a resolution that changes with the noise (arXiv:2301.11093).

    log SNR = -2 log tan(angle) + 2 log(n / size), the angle uniform from atan(sigma_min) to atan(sigma_max), log n
    going from log size_high at little noise to log size_low at much.

    Args:
        schedule: t -> (alpha, sigma).
        u: uniform numbers (B,).
        size: of what the network sees; size_low is at most that, size_high at least.
        size_low: the resolution whose cosine schedule much noise is like.
        size_high: the same of little noise.
        sigma_min: the least sigma / alpha, before shifting.
        sigma_max: the greatest.

    Raises:
        ValueError: if a size is less than 1, or the sigmas do not rise from above 0.
    """
    if min(size, size_low, size_high) < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"times.size_low={size_low} and size_high={size_high} must be at least 1, and 0 < sigma_min={sigma_min} < "
            f"sigma_max={sigma_max}"
        )
    low, high = math.log(min(size_low, size) / size), math.log(max(size_high, size) / size)
    angle = torch.lerp(torch.full_like(u, math.atan(sigma_min)), torch.full_like(u, math.atan(sigma_max)), u)
    return schedule.time_of(-2 * angle.tan().log() + 2 * (high + (low - high) * u))


def shifted(t: Tensor, shift: float) -> Tensor:
    """The shifted time, shift t / (1 + (shift - 1) t) for t in [0, 1] (arXiv:2403.03206, equation 23).

    On flow it multiplies sigma / alpha by `shift`.
    More pixels call for more noise: shift = sqrt(pixels / pixels for which shift 1 is right).

    Raises:
        ValueError: if shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift={shift} must be positive: 1 is none, more than 1 goes towards noise")
    return shift * t / (1 + (shift - 1) * t)


def num_discrete_steps(schedule: Schedule, wanted_by: str, instead: str) -> int:
    """N of a schedule with discrete steps.

    Raises:
        ValueError: if it has none, with what to choose instead of what wants them.
    """
    if schedule.num_steps is None:
        name = type(schedule).__name__
        raise ValueError(f"{wanted_by} wants noise.num_steps, but {name} has no discrete steps: choose {instead}")
    return schedule.num_steps


def _normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Normal numbers from uniform ones, by the inverse distribution function."""
    if not std > 0:
        raise ValueError(f"times.std={std} must be positive")
    return mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
