"""UniPC-2: DPM-Solver++ whose every point is corrected by the next evaluation, at no extra cost."""

from collections.abc import Callable
from typing import NamedTuple

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
    """x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^(-h)) (x0 + sum_k rho_k D_k), B(h) = e^h - 1 (arXiv:2302.04867).

    h = lambda_s - lambda_t, lambda = log(alpha / sigma). The predictor's D is the slope of x0 over the step before; the
    corrector's, once x0 is known at s, the slope over the step itself as well.

    Args:
        denoise: (x_t, t) -> (x0, eps); asked N times.
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: unused: the solver is deterministic.

    Returns:
        x at times[-1].

    Raises:
        ValueError: if times do not decrease.
    """
    last: _Step | None = None
    for t, s in pairs(times):
        x0 = denoise(x, t).x0
        if last is not None:
            x = _moved(schedule, last.x, last.t, t, last.x0 + _correction(last, x0 - last.x0))
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        slope = None if last is None or s == 0 else (x0 - last.x0) / last.h
        d = x0 if slope is None else x0 + h / 2 * slope
        last = _Step(x, x0, t, h, None if last is None else last.h, slope)
        x = _moved(schedule, x, t, s, d)
    return x


class _Step(NamedTuple):
    """A step that was predicted, to be corrected."""

    x: Tensor
    x0: Tensor
    t: Tensor
    h: Tensor
    h_before: Tensor | None  # of the step before it
    slope: Tensor | None  # of x0 over the step before it, per unit of lambda


def _moved(schedule: Schedule, x: Tensor, t: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """From t to s with x0 = d all the way."""
    now, following = schedule(t), schedule(s)
    ratio = following.sigma / now.sigma
    return ratio * x + (following.alpha - now.alpha * ratio) * d


def _correction(step: _Step, difference: Tensor) -> Tensor:
    """Sum_k rho_k D_k of a step: from the slope over the step before it and the difference of x0 over itself."""
    if step.slope is None or step.h_before is None:
        return difference / 2
    h, phi = step.h, torch.expm1(-step.h)
    b1 = (phi / -h - 1) / phi
    b2 = 2 * ((phi / -h - 1) / -h - 1 / 2) / phi
    rho = (b2 - b1) / (-step.h_before / h - 1)
    return rho * h * step.slope + (b1 - rho) * difference
