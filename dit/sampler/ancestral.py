"""One ancestral step a time: DDPM and Euler ancestral (eta = 1), DDIM and Euler (eta = 0)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit.noise.bound import log_variance, variances
from dit.noise.grid import pairs
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule

VARIANCES = ("small", "large", "learned")


def sample(
    denoise: Callable[[Tensor, Tensor], Estimate],
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    variance: str = "small",
) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - fresh^2) eps + fresh z (arXiv:2010.02502, equation 12, for any schedule).

    fresh = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2); at eta = 1 it is the standard
    deviation of DDPM's posterior, and that of Euler ancestral.

    Args:
        denoise: (x_t, t) -> (x0, eps).
        schedule: t -> (alpha, sigma).
        x: noise at times[0], (B, C, H, W).
        times: (N + 1,), decreasing to 0, float64, on the CPU.
        generator: for z, on the device of x.
        eta: how much of the noise is drawn afresh, in [0, 1].
        variance: of the fresh noise at eta = 1: `small`, the posterior's; `large`, sigma_t^2 - (alpha_t sigma_s /
            alpha_s)^2, DDPM's beta; `learned`, where the network says between the two (arXiv:2102.09672).

    Returns:
        x at times[-1].

    Raises:
        ValueError: if eta is outside [0, 1], times do not decrease, or the variance cannot be had.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} must lie in [0, 1]: 0 is DDIM, 1 is DDPM")
    if variance not in VARIANCES:
        raise ValueError(f"sampler.variance={variance}: choose one of {', '.join(VARIANCES)}")
    if variance != "small" and eta != 1:
        raise ValueError(f"sampler.variance={variance} is that of DDPM's step: it needs sampler.eta=1, not {eta}")
    for t, s in pairs(times):
        now, following = schedule(t), schedule(s)
        x0, eps, learned = denoise(x, t)
        least, greatest = variances(now, following)
        fresh = eta * least.sqrt()
        x = following.alpha * x0 + (following.sigma**2 - fresh**2).clamp(min=0).sqrt() * eps
        if fresh > 0:
            if variance == "large":
                fresh = greatest.sqrt()
            elif variance == "learned":
                if learned is None:
                    raise ValueError(
                        "sampler.variance=learned, but the network has none: model.learn_sigma=true gives it"
                    )
                fresh = (log_variance(learned, least.to(x), greatest.to(x)) / 2).exp()
            x = x + fresh * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x
