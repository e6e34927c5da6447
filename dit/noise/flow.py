"""The straight path of flow matching."""

import torch
from torch import Tensor

from dit.noise.schedule import NoiseLevel, Schedule


class Flow(Schedule):
    """alpha = 1 - t, sigma = t: rectified flow (arXiv:2209.03003), with the data at t = 0.

    Args:
        t_max: where sampling begins. At 1 nothing of the data is left, so that a prediction of the noise alone cannot
            be turned into x0 there: 0.999 serves it.

    Raises:
        ValueError: if t_max is outside (0, 1].
    """

    def __init__(self, t_max: float = 1.0):
        if not 0 < t_max <= 1:
            raise ValueError(f"noise.t_max={t_max} must lie in (0, 1]")
        self.t_max = t_max

    def __call__(self, t: Tensor) -> NoiseLevel:
        """(1 - t, t)."""
        return NoiseLevel(1 - t, t)

    def rate(self, t: Tensor) -> NoiseLevel:
        """(-1, 1)."""
        return NoiseLevel(-torch.ones_like(t), torch.ones_like(t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """sigmoid(-log_snr / 2)."""
        return (-log_snr / 2).sigmoid().clamp(max=self.t_max)

    def straight(self, t: Tensor) -> Tensor:
        """1: the path is straight as it is."""
        return torch.ones_like(t)
