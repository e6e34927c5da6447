"""Which t: drawn for training from uniform numbers u in [0, 1), and laid out for sampling.

A density is `f(schedule, u) -> t`, both (B,), through its inverse distribution function, so that keyed, stratified and
low-discrepancy numbers serve every density. A grid is `f(schedule, num_steps) -> times`, (N + 1,), decreasing from
t_max to 0, float64, on the CPU.
"""

import torch
from torch import Tensor

from dit.noise.schedule import Schedule


def uniform(schedule: Schedule, u: Tensor) -> Tensor:
    """Density: t uniform in (0, t_max]."""
    return (1 - u) * schedule.t_max


def discrete(schedule: Schedule, u: Tensor) -> Tensor:
    """Density: one of the times k / N, k = 1..N, of a schedule with N discrete steps, as DDPM draws them."""
    num_steps = getattr(schedule, "num_steps", None)
    if num_steps is None:
        raise ValueError(
            f"times=discrete needs a schedule with steps, not {type(schedule).__name__}: choose times=uniform"
        )
    return ((1 - u) * num_steps).ceil().clamp(1, num_steps) / num_steps * schedule.t_max


def logit_normal(schedule: Schedule, u: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Density: t / t_max = sigmoid(n), n ~ N(mean, std^2) (arXiv:2403.03206, section 3.1)."""
    return (mean + std * _normal(u)).sigmoid() * schedule.t_max


def log_normal(schedule: Schedule, u: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Density: log t ~ N(mean, std^2), at most t_max; EDM's, where t is sigma (arXiv:2206.00364, table 1)."""
    return (mean + std * _normal(u)).exp().clamp(max=schedule.t_max)


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones, by the inverse distribution function."""
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def evenly(schedule: Schedule, num_steps: int) -> Tensor:
    """Grid: equal steps from t_max to 0."""
    _check(num_steps)
    return torch.linspace(schedule.t_max, 0, num_steps + 1, dtype=torch.float64)


def karras(schedule: Schedule, num_steps: int, *, sigma_min: float = 0.002, rho: float = 7.0) -> Tensor:
    """Grid: equal steps in t^(1 / rho) from t_max to sigma_min, then 0; for EDM (arXiv:2206.00364, equation 5)."""
    _check(num_steps)
    if rho <= 0:
        raise ValueError(f"grid.rho={rho} must be positive, like 7")
    if not 0 < sigma_min < schedule.t_max:
        raise ValueError(f"sigma_min={sigma_min} must lie in (0, t_max={schedule.t_max:g})")
    ends = (schedule.t_max ** (1 / rho), sigma_min ** (1 / rho))
    times = torch.linspace(*ends, num_steps, dtype=torch.float64) ** rho
    return torch.cat([times, times.new_zeros(1)])


def _check(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1: sampling needs a step")
