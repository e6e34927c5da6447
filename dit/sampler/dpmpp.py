"""DPM-Solver++ (2M), second order with one evaluation a step, and its stochastic form."""

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
    eta: float = 0.0,
) -> Tensor:
    """x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) D + sigma_s sqrt(1 - e^(-2 eta h)) z.

    h = lambda_s - lambda_t, lambda = log(alpha / sigma), and D = x0 + h / (2 h_before) (x0 - x0_before)
    (arXiv:2211.01095, algorithm 2); in the first step D = x0, and in the last, to 0, where h is infinite.

    Args:
        denoise: (x_t, t) -> (x0, eps); asked N times.
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: for z, on the device of x.
        eta: 0 is the deterministic solver, 1 that of the SDE.

    Returns:
        x at times[-1].

    Raises:
        ValueError: if eta is outside [0, 1], or times do not decrease.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} must lie in [0, 1]: 0 is DPM-Solver++, 1 its SDE form")
    before: tuple[Tensor, Tensor] | None = None  # x0 and h of the step before
    for t, s in pairs(times):
        now, following = schedule(t), schedule(s)
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        shrink = (following.sigma / now.sigma) * (now.alpha / following.alpha)  # e^(-h), 0 where h is infinite
        x0 = denoise(x, t).x0
        d = x0 if before is None or s == 0 else x0 + h / (2 * before[1]) * (x0 - before[0])
        x = following.sigma / now.sigma * shrink**eta * x + following.alpha * (1 - shrink ** (1 + eta)) * d
        if eta > 0 and s > 0:
            z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + following.sigma * (1 - shrink ** (2 * eta)).sqrt() * z
        before = x0, h
    return x
