"""One ancestral step a time: DDPM (eta = 1), DDIM (eta = 0), and Euler's method on EDM and flow (eta = 0)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

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
    clip: float | None = None,
) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - fresh^2) eps + fresh z (arXiv:2010.02502, equation 12, for any schedule).

    fresh = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2); at eta = 1 it is the standard
    deviation of DDPM's posterior.

    Args:
        denoise: (x_t, t) -> (x0, eps).
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: for z, on the device of x.
        eta: how much of the noise is drawn afresh, in [0, 1].
        clip: pixels only: keep x0 within [-clip, clip], with eps to match.

    Returns:
        x at times[-1].

    Raises:
        ValueError: if eta is outside [0, 1], clip is not positive, or times do not decrease.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} must lie in [0, 1]: 0 is DDIM, 1 is DDPM")
    if clip is not None and clip <= 0:
        raise ValueError(f"sampler.clip={clip} must be positive, or null")
    if not (times.diff() < 0).all():
        raise ValueError(f"times must decrease, got {times.tolist()}")
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        x0, eps = denoise(x, t)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = (x - alpha_t * x0) / sigma_t
        fresh = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
        x = alpha_s * x0 + (sigma_s**2 - fresh**2).clamp(min=0).sqrt() * eps
        if fresh > 0:
            x = x + fresh * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x
