"""Variance-preserving schedules, alpha^2 + sigma^2 = 1, defined by discrete DDPM betas."""

import math

import torch
from torch import Tensor

from dit.noise.schedule import NoiseLevel, Schedule


class VP(Schedule):
    """alpha(k / N)^2 = prod_{i <= k} (1 - beta_i), and log alpha linear in t between (arXiv:2006.11239).

    The k-th step of DDPM, k = 1..N, stands at t = k / N; the data, before the first, at t = 0. The network is told
    the published index k - 1.

    Args:
        betas: (N,) noise added by each step, in (0, 1).

    Raises:
        ValueError: if a beta is outside (0, 1).
    """

    def __init__(self, betas: Tensor):
        betas = betas.double()
        if betas.numel() < 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas must lie in (0, 1), got {betas.min():g} to {betas.max():g}"
                if betas.numel()
                else "betas are empty: num_steps must be at least 1"
            )
        self.num_steps = betas.numel()
        self._log_alpha = torch.cat([betas.new_zeros(1), (-betas).log1p().cumsum(0) / 2])

    def __call__(self, t: Tensor) -> NoiseLevel:
        """The level at time t in [0, 1]."""
        if self._log_alpha.device != t.device:
            self._log_alpha = self._log_alpha.to(t.device)
        position = t.double() * self.num_steps
        # A time on a knot belongs to the interval before it, however k / N was rounded: the slope jumps there.
        upper = (position.detach() - 1e-3).ceil().clamp(1, self.num_steps).long()
        lower = self._log_alpha[upper - 1]
        log_alpha = lower + (position - (upper - 1)) * (self._log_alpha[upper] - lower)
        return NoiseLevel(log_alpha.exp().to(t), (-torch.expm1(2 * log_alpha)).clamp(min=0).sqrt().to(t))

    def time_input(self, t: Tensor) -> Tensor:
        """DDPM's step index, 0..N-1."""
        return t * self.num_steps - 1


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VP:
    """Betas rising linearly from beta_start to beta_end (arXiv:2006.11239, section 4)."""
    return VP(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


def cosine(num_steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> VP:
    """alpha(t)^2 = f(t) / f(0), f(t) = cos^2((t + offset) / (1 + offset) pi / 2), betas capped (arXiv:2102.09672)."""
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f = ((t + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    return VP((1 - f[1:] / f[:-1]).clamp(max=beta_max))
