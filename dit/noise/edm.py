"""The schedule of EDM: the time is the noise level."""

import torch
from torch import Tensor

from dit.noise.schedule import NoiseLevel, Schedule


class EDM(Schedule):
    """alpha = 1, sigma = t (arXiv:2206.00364, table 1).

    Args:
        sigma_max: the largest noise level, t_max.
        sigma_data: the standard deviation of the data.

    Raises:
        ValueError: if either is not positive.
    """

    def __init__(self, sigma_max: float = 80.0, sigma_data: float = 0.5):
        if not (sigma_max > 0 and sigma_data > 0):
            raise ValueError(f"sigma_max={sigma_max} and sigma_data={sigma_data} must be positive")
        self.t_max = sigma_max
        self.sigma_data = sigma_data

    def __call__(self, t: Tensor) -> NoiseLevel:
        """(1, t)."""
        return NoiseLevel(torch.ones_like(t), t)

    def rate(self, t: Tensor) -> NoiseLevel:
        """(0, 1)."""
        return NoiseLevel(torch.zeros_like(t), torch.ones_like(t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """exp(-log_snr / 2)."""
        return (-log_snr / 2).exp().clamp(max=self.t_max)

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return (t**2 + self.sigma_data**2).rsqrt()

    def time_input(self, t: Tensor) -> Tensor:
        """c_noise = log(sigma) / 4."""
        return t.log() / 4
