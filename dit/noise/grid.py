"""Which t to sample at: grids.

A grid is `f(schedule, num_steps) -> times`, (N + 1,), decreasing from t_max to 0, float64, on the CPU.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dit.noise.schedule import Schedule
from dit.noise.times import num_discrete_steps
from dit.noise.times import shifted as shift_times


def evenly(schedule: Schedule, num_steps: int) -> Tensor:
    """Equal steps from t_max to 0; on N discrete steps diffusers' `trailing` spacing."""
    return schedule.t_max * _fractions(num_steps)


def quadratic(schedule: Schedule, num_steps: int) -> Tensor:
    """Equal steps in sqrt(t): finer towards the data (arXiv:2010.02502, appendix D)."""
    return schedule.t_max * _fractions(num_steps) ** 2


def shifted(schedule: Schedule, num_steps: int, *, shift: float = 3.0) -> Tensor:
    """Equal steps, shifted towards the noise (shift > 1) or the data; for flow (arXiv:2403.03206, equation 23)."""
    return schedule.t_max * shift_times(_fractions(num_steps), shift)


def respaced(schedule: Schedule, num_steps: int) -> Tensor:
    """Of N discrete steps the first, the last and evenly spread others, as the published DiT samples."""
    total = num_discrete_steps(schedule, "grid=respaced", "grid=evenly")
    if not 1 <= num_steps <= total:
        raise ValueError(
            f"sampler.num_steps={num_steps} must lie between 1 and noise.num_steps={total} for grid=respaced"
        )
    indices = torch.linspace(total - 1, 0, num_steps, dtype=torch.float64).round()
    return torch.cat([(indices + 1) / total * schedule.t_max, indices.new_zeros(1)])


def karras(
    schedule: Schedule,
    num_steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float = 1000.0,
) -> Tensor:
    """Equal steps in (sigma / alpha)^(1 / rho), then 0 (arXiv:2206.00364, equation 5).

    Args:
        schedule: t -> (alpha, sigma).
        num_steps: N.
        rho: more is finer towards the data.
        sigma_min: the least sigma / alpha before 0; None: that of a schedule's first discrete step, otherwise 0.002.
        sigma_max: the greatest, if the schedule's own is greater still.
    """
    if not 0.1 <= rho <= 100:
        raise ValueError(f"grid.rho={rho} must lie between 0.1 and 100, like 7")
    first, last = (end ** (1 / rho) for end in _ends(schedule, sigma_min, sigma_max))
    return _at(schedule, torch.linspace(first, last, _checked(num_steps), dtype=torch.float64) ** rho)


def log_snr(schedule: Schedule, num_steps: int, *, sigma_min: float | None = None, sigma_max: float = 1000.0) -> Tensor:
    """Equal steps in log SNR, then 0 (arXiv:2206.00927); sigma_min and sigma_max as for `karras`."""
    first, last = _ends(schedule, sigma_min, sigma_max)
    ends = math.log(first), math.log(last)
    return _at(schedule, torch.linspace(*ends, _checked(num_steps), dtype=torch.float64).exp())


def pairs(times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps (t, s) of a grid.

    Raises:
        ValueError: if the times do not decrease.
    """
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[-1] < 0:
        raise ValueError(f"times must decrease to 0, in at least one step; got {times.tolist()}")
    return pairwise(times)


def _fractions(num_steps: int) -> Tensor:
    """1 to 0 in equal steps."""
    return torch.linspace(1, 0, _checked(num_steps) + 1, dtype=torch.float64)


def _checked(num_steps: int) -> int:
    if not 1 <= num_steps <= 100_000:
        raise ValueError(f"num_steps={num_steps} must be at least 1, and at most 100,000: sampling needs a step")
    return num_steps


def _ends(schedule: Schedule, sigma_min: float | None, sigma_max: float) -> tuple[float, float]:
    """The first and the last sigma / alpha that is not 0."""
    if not sigma_max > 0:
        raise ValueError(f"grid.sigma_max={sigma_max} must be positive")
    ends = torch.tensor([schedule.t_max, schedule.t_max / (schedule.num_steps or 1)], dtype=torch.float64)
    greatest, of_first_step = (-schedule.log_snr(ends) / 2).exp().tolist()
    if sigma_min is None:
        sigma_min = of_first_step if schedule.num_steps else 0.002
    if not 0 < sigma_min < (sigma_max := min(greatest, sigma_max)):
        raise ValueError(
            f"grid.sigma_min={sigma_min:g} must lie between 0 and the greatest sigma / alpha, {sigma_max:g}"
        )
    return sigma_max, sigma_min


def _at(schedule: Schedule, ratios: Tensor) -> Tensor:
    """The times at which sigma / alpha has these values, then 0."""
    return torch.cat([schedule.time_of(-2 * ratios.log()), ratios.new_zeros(1)])
