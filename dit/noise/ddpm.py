"""The variance-preserving schedule, alpha^2 + sigma^2 = 1, of the betas of a discrete DDPM."""

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
