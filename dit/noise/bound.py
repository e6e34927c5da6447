"""The variational bound on likelihood, one step of it, and the variance of an ancestral step.

q(x_s | x_t, x0) = N(mean, least) and p(x_s | x_t) = N(mean with x0_hat, variance), s < t, for any schedule
(arXiv:2107.00630, appendix A), with sigma_ts^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.
"""

import math

import torch
from torch import Tensor

from dit.noise.denoiser import expand_like
from dit.noise.prediction import Estimate
from dit.noise.schedule import NoiseLevel, Schedule


def variances(now: NoiseLevel, following: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The least and the greatest variance of an ancestral step, sigma_s^2 / sigma_t^2 sigma_ts^2 and sigma_ts^2.

    Right for data that are a point and for data that are white noise; DDPM's beta~ and beta (arXiv:2006.11239,
    section 3.2).
    """
    greatest = (now.sigma**2 - (now.alpha / following.alpha * following.sigma) ** 2).clamp(min=0)
    return (following.sigma / now.sigma) ** 2 * greatest, greatest


def log_variance(learned: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """A learned variance between these, in the logarithm, at (1 + learned) / 2 (arXiv:2102.09672, equation 15)."""
    return torch.lerp(least.log().expand_as(learned), greatest.log().expand_as(learned), (1 + learned) / 2)


def nats(schedule: Schedule, estimate: Estimate, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x0) | p(x_s | x_t)); at s = 0, -log p(x0 | x_t) of pixels in steps of 2 / 255.

    Args:
        schedule: t -> (alpha, sigma).
        estimate: the denoiser's, at x_t. Without a learned variance the least one is taken.
        x0: the data (B, C, H, W), in [-1, 1].
        t: (B,).
        s: (B,), less than t.

    Returns:
        (B, C, H, W), in nats.
    """
    now, following = (NoiseLevel(*(expand_like(c, x0) for c in schedule(at.double()))) for at in (t, s))
    least, greatest = variances(now, following)
    # The least variance is 0 where s is; the published code takes that of the step before it in sampling, 2 t -> t.
    before = NoiseLevel(*(expand_like(c, x0) for c in schedule((2 * t.double()).clamp(max=schedule.t_max))))
    decoder = expand_like(s == 0, x0)
    least = torch.where(decoder, variances(before, now)[0], least)
    log_q = least.log().to(x0).expand_as(x0)
    log_p = log_q if estimate.variance is None else log_variance(estimate.variance, least.to(x0), greatest.to(x0))
    scale = (following.alpha * greatest / now.sigma**2).to(x0)  # of x0 in the mean
    difference = scale * (estimate.x0 - x0)
    kl = (log_p - log_q + (log_q - log_p).exp() - 1 + difference**2 * (-log_p).exp()) / 2
    return torch.where(decoder, _pixel_nats(x0, estimate.x0, (log_p / 2).exp()), kl)


def _pixel_nats(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-log of the normal distribution's share of each value's bin, of 256 bins in [-1, 1], the outer ones open."""
    above = torch.where(x0 > 0.999, math.inf, (x0 + 1 / 255 - mean) / std)
    below = torch.where(x0 < -0.999, -math.inf, (x0 - 1 / 255 - mean) / std)
    # Far from the mean a bin's share is below what the difference of two numbers near 1 can show: take the lower tail.
    far = torch.where(below + above > 0, -1.0, 1.0)
    low, high = torch.minimum(far * below, far * above), torch.maximum(far * below, far * above)
    return -(torch.special.ndtr(high) - torch.special.ndtr(low)).clamp(min=1e-12).log()
