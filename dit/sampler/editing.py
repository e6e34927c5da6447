"""Editing without training: a sampler that starts from a picture, or keeps a part of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.noise.denoiser import expand_like
from dit.noise.grid import pairs
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule

Denoise = Callable[..., Estimate]  # (x_t, t), of a flow map (x_t, t, s)


def edited(
    sampler: Callable[..., Tensor],
    x0: Tensor,
    *,
    strength: float = 1.0,
    mask: Tensor | None = None,
    resample: int = 1,
) -> Callable[..., Tensor]:
    """A sampler, of the same signature, that edits x0.

    Args:
        sampler: the sampler.
        x0: the picture as the network sees it, (C, H, W), or one for each sample, (B, C, H, W).
        strength: how much is forgotten, in [0, 1]: so large a share of the steps is taken, from x0 noised to where they
            begin (arXiv:2108.01073). 0 returns x0, 1 begins at noise.
        mask: (H, W), true where to redraw; elsewhere x0 is kept exactly. None: everywhere.
        resample: take every step so many times, with noise added again between, so that what is drawn comes to agree
            with what is kept (arXiv:2201.09865, with jumps of one step). Samplers that remember the step before forget
            it then.

    Raises:
        ValueError: if a value is out of range, or the mask has another shape.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must lie in [0, 1]: 0 returns the picture, 1 forgets it")
    if resample < 1:
        raise ValueError(f"resample={resample} must be at least 1: every step is taken so many times")
    if mask is not None and mask.shape != x0.shape[-2:]:
        raise ValueError(f"the mask is {tuple(mask.shape)}, but the picture {tuple(x0.shape[-2:])}: height, width")

    def sample(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, *, generator: Any = None) -> Tensor:
        num_steps = round(strength * (len(times) - 1))
        if num_steps == 0:
            return x0.expand_as(x)
        sigma_0, times = schedule(times[0]).sigma, times[-num_steps - 1 :]
        if strength < 1:
            alpha, sigma = schedule(times[0])
            x = alpha * x0 + sigma / sigma_0 * x
        if mask is not None:
            denoise = keeping(denoise, schedule, x0, mask)
        if resample == 1:
            return sampler(denoise, schedule, x, times, generator=generator)
        for t, s in pairs(times):
            for again in reversed(range(resample)):
                x = sampler(denoise, schedule, x, torch.stack([t, s]), generator=generator)
                if again:
                    x = noised(schedule, x, s, t, generator)
        return x

    return sample


def keeping(denoise: Denoise, schedule: Schedule, x0: Tensor, mask: Tensor) -> Denoise:
    """A denoiser that knows x0 (B or none, C, H, W) where the mask (H, W) is false, whatever is asked."""

    def estimate(x_t: Tensor, t: Tensor, *s: Tensor) -> Estimate:
        said = denoise(x_t, t, *s)
        alpha, sigma = (expand_like(c, x_t) for c in schedule(t))
        kept = torch.where(mask, said.x0, x0)
        return Estimate(kept, torch.where(mask, said.eps, (x_t - alpha * kept) / sigma), said.variance)

    return estimate


def noised(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
    """x_t = alpha_t / alpha_s x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) z, s < t."""
    now, later = schedule(s), schedule(t)
    ratio = later.alpha / now.alpha
    z = torch.randn(x_s.shape, generator=generator, device=x_s.device, dtype=x_s.dtype)
    return ratio * x_s + (later.sigma**2 - (ratio * now.sigma) ** 2).clamp(min=0).sqrt() * z


def mixed(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """cos(angle) a + sin(angle) b, angle = share pi / 2: from noise to other noise, noise all the way."""
    angle = torch.as_tensor(share, device=a.device) * math.pi / 2
    return angle.cos() * a + angle.sin() * b


def shrunk(mask: Tensor, size: int) -> Tensor:
    """A mask (H, W) of pixels as one of a latent's cells (size, size): to redraw where any of its pixels is."""
    return F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0
