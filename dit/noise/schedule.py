"""The schedule of a diffusion or flow model, x_t = alpha(t) x0 + sigma(t) eps."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class NoiseLevel(NamedTuple):
    """How much data and how much noise x_t holds; both of the shape of t."""

    alpha: Tensor
    sigma: Tensor


class Schedule(ABC):
    """A noise schedule, t -> (alpha, sigma), with alpha(0) = 1 and sigma(0) = 0: data at 0, noise at t_max.

    Times are (B,) or (), in [0, t_max]. Writing `__call__` is enough for a new schedule.

    Attributes:
        t_max: the time of (nearly) pure noise, where sampling begins.
        sigma_data: the standard deviation of x0 that `input_scale` and the edm prediction reckon with.
        num_steps: N of a schedule with discrete steps, at t = k t_max / N; None of a continuous one.
    """

    t_max: float = 1.0
    sigma_data: float = 1.0
    num_steps: int | None = None

    @abstractmethod
    def __call__(self, t: Tensor) -> NoiseLevel:
        """The level at time t."""

    def rate(self, t: Tensor) -> NoiseLevel:
        """(d alpha / dt, d sigma / dt), by forward-mode differentiation of the schedule."""
        rate: tuple[Tensor, Tensor] = torch.func.jvp(lambda t: tuple(self(t)), (t,), (torch.ones_like(t),))[1]
        return NoiseLevel(*rate)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2): +inf at t = 0, falling with t."""
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The time at which `log_snr` has a value, at most t_max; by bisection, unless there is a closed form."""
        early, late = torch.zeros_like(log_snr), torch.full_like(log_snr, self.t_max)
        for _ in range(60 if log_snr.dtype == torch.float64 else 30):
            middle = (early + late) / 2
            too_late = self.log_snr(middle) < log_snr
            early, late = torch.where(too_late, early, middle), torch.where(too_late, middle, late)
        return late

    def straight(self, t: Tensor) -> Tensor:
        """The c for which x_t / c moves on a straight line between any two times, whatever the schedule.

        c = alpha, as x_t / alpha = x0 + (sigma / alpha) eps, EDM's coordinates; or alpha + sigma, those of flow, where
        alpha comes so near to 0 that the first step in sigma / alpha would be all there is.
        """
        alpha, sigma = self(t)
        ends_in_noise = self(torch.tensor(self.t_max, dtype=torch.float64)).alpha < 1e-3
        return alpha + sigma if ends_in_noise else alpha

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in, by which x_t is multiplied before the network sees it."""
        return torch.ones_like(t)

    def time_input(self, t: Tensor) -> Tensor:
        """c_noise, what the network is told of the time."""
        return t
