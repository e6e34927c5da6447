"""Variance-preserving schedules, alpha^2 + sigma^2 = 1, defined by the betas of a discrete DDPM."""

import math

import torch
from torch import Tensor

from dit.noise.schedule import NoiseLevel, Schedule


class VP(Schedule):
    """alpha(k / N)^2 = prod_{i <= k} (1 - beta_i) (arXiv:2006.11239), the angle atan(sigma / alpha) linear between.

    The k-th step of DDPM, k = 1..N, stands at t = k / N; the data, before the first, at t = 0. The network is told
    the published index k - 1.

    Args:
        betas: (N,) noise added by each step, in (0, 1); the last may be 1.
        zero_terminal_snr: shift and stretch alpha so that nothing of the data is left at t = 1 (arXiv:2305.08891,
            algorithm 1).

    Raises:
        ValueError: if a beta is out of range.
    """

    def __init__(self, betas: Tensor, zero_terminal_snr: bool = False):
        betas = betas.double()
        if betas.numel() < 1:
            raise ValueError("betas are empty: num_steps must be at least 1")
        if not ((betas > 0) & (betas < 1))[:-1].all() or not 0 < betas[-1] <= 1:
            raise ValueError(f"betas must lie in (0, 1), got {betas.min():g} to {betas.max():g}")
        self.num_steps: int = betas.numel()
        log_alpha = (-betas).log1p().cumsum(0) / 2
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        if zero_terminal_snr and self.num_steps > 1:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            sigma = (1 - alpha**2).sqrt()
        self._angle = torch.cat([betas.new_zeros(1), torch.atan2(sigma, alpha)])

    def __call__(self, t: Tensor) -> NoiseLevel:
        """The level at time t in [0, 1]."""
        angle, _ = self._piece(t)
        return NoiseLevel(angle.cos().to(t), angle.sin().to(t))

    def rate(self, t: Tensor) -> NoiseLevel:
        """(-sin, cos) of the angle times its slope; at a step the slope before it."""
        angle, slope = self._piece(t)
        return NoiseLevel((-slope * angle.sin()).to(t), (slope * angle.cos()).to(t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The angle is atan(exp(-log_snr / 2)), and the time linear in it between two steps."""
        angle = torch.atan((-log_snr.double() / 2).exp())
        self._angle = knots = self._angle.to(log_snr.device)
        position = torch.searchsorted(knots, angle.detach()).double()
        for _ in range(2):  # just after a step the interval before goes on
            upper, lower, step = self._interval(position)
            position = upper - 1 + (angle - lower) / step
        return (position / self.num_steps).clamp(max=self.t_max).to(log_snr)

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The angle at t and its slope, in float64."""
        self._angle = self._angle.to(t.device)
        position = t.double() * self.num_steps
        upper, lower, step = self._interval(position)
        return lower + (position - (upper - 1)) * step, self.num_steps * step

    def _interval(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The interval between two steps: the number of its end, the angle at its beginning, and by how much it grows.

        A time on a knot belongs to the interval before it, however k / N was rounded: the slope jumps there.
        """
        upper = (position.detach() - 1e-3).ceil().clamp(1, self.num_steps).long()
        lower = self._angle[upper - 1]
        return upper, lower, self._angle[upper] - lower

    def time_input(self, t: Tensor) -> Tensor:
        """DDPM's step index, 0..N-1; 0 for times before the first step, too."""
        return (t * self.num_steps - 1).clamp(min=0)


def linear(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
) -> VP:
    """Betas rising linearly from beta_start to beta_end (arXiv:2006.11239, section 4)."""
    _check_rises(beta_start, beta_end)
    return VP(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64), zero_terminal_snr)


def scaled_linear(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, zero_terminal_snr: bool = False
) -> VP:
    """sqrt(beta) rising linearly, as in latent and Stable Diffusion (arXiv:2112.10752)."""
    if not (beta_start >= 0 and beta_end >= 0):
        raise ValueError(f"beta_start={beta_start} and beta_end={beta_end} must lie in (0, 1)")
    _check_rises(beta_start, beta_end)
    return VP(torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2, zero_terminal_snr)


def sigmoid_betas(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
) -> VP:
    """Betas rising along a sigmoid from beta_start to beta_end: GeoDiff's (arXiv:2203.02923), diffusers' `sigmoid`."""
    _check_rises(beta_start, beta_end)
    ramp = torch.linspace(-6, 6, num_steps, dtype=torch.float64).sigmoid()
    return VP(beta_start + (beta_end - beta_start) * ramp, zero_terminal_snr)


def cosine(
    num_steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999, zero_terminal_snr: bool = False
) -> VP:
    """alpha(t)^2 = f(t) / f(0), f(t) = cos^2((t + offset) / (1 + offset) pi / 2), betas capped (arXiv:2102.09672)."""
    if not (offset >= 0 and 0 < beta_max < 1):
        raise ValueError(f"noise.offset={offset} must not be negative, and noise.beta_max={beta_max} in (0, 1)")
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f = ((t + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    return VP((1 - f[1:] / f[:-1]).clamp(max=beta_max), zero_terminal_snr)


def sigmoid(
    num_steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    beta_max: float = 0.999,
    zero_terminal_snr: bool = False,
) -> VP:
    """alpha(t)^2 falling along a sigmoid over [start, end] / tau, betas capped (arXiv:2212.11972)."""
    if not (tau > 0 and start < end):
        raise ValueError(f"noise.tau={tau} must be positive, and noise.start={start} less than noise.end={end}")
    f = (-torch.linspace(start, end, num_steps + 1, dtype=torch.float64) / tau).sigmoid()
    f = (f - f[-1]) / (f[0] - f[-1])
    return VP((1 - f[1:] / f[:-1]).clamp(max=beta_max), zero_terminal_snr)


def _check_rises(beta_start: float, beta_end: float) -> None:
    if beta_start > beta_end:
        raise ValueError(f"noise.beta_start={beta_start} must not be more than noise.beta_end={beta_end}: noise grows")
