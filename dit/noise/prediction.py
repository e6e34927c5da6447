"""What the network outputs, F = a(t) x0 + b(t) eps, and how (x0, eps) are solved from it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dit.noise.schedule import NoiseLevel, Schedule


class Coefficients(NamedTuple):
    """The row (a, b) of F = a x0 + b eps."""

    a: Tensor
    b: Tensor


class Estimate(NamedTuple):
    """The denoiser's answer, each (B, C, H, W).

    `variance`, where it was learned, is -1 for the least and 1 for the greatest variance of an ancestral step
    (`noise/bound.py`).
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None

    @property
    def velocity(self) -> Tensor:
        """Of the straight path, eps - x0."""
        return self.eps - self.x0


Prediction = Callable[[Schedule, Tensor], Coefficients]


def eps(schedule: Schedule, t: Tensor) -> Coefficients:
    """The noise, F = eps (arXiv:2006.11239)."""
    return Coefficients(torch.zeros_like(t), torch.ones_like(t))


def x0(schedule: Schedule, t: Tensor) -> Coefficients:
    """The data, F = x0."""
    return Coefficients(torch.ones_like(t), torch.zeros_like(t))


def v(schedule: Schedule, t: Tensor) -> Coefficients:
    """The velocity of progressive distillation, F = alpha eps - sigma x0 (arXiv:2202.00512)."""
    level = schedule(t)
    return Coefficients(-level.sigma, level.alpha)


def flow(schedule: Schedule, t: Tensor) -> Coefficients:
    """The path's time derivative, F = alpha' x0 + sigma' eps; eps - x0 on the straight path (arXiv:2210.02747)."""
    return Coefficients(*schedule.rate(t))


def edm(schedule: Schedule, t: Tensor) -> Coefficients:
    """EDM's preconditioned output, F = (sigma x0 / s - alpha s eps) / r, s = sigma_data, r^2 = alpha^2 s^2 + sigma^2.

    With alpha = 1 this is table 1 of arXiv:2206.00364 solved for F: D = c_skip x_t + c_out F, and the paper's weighted
    loss is the plain mean square in F. F has unit variance and is uncorrelated with x_t.
    """
    alpha, sigma = schedule(t)
    s = schedule.sigma_data
    r = (alpha**2 * s**2 + sigma**2).sqrt()
    return Coefficients(sigma / (s * r), -alpha * s / r)


def determinant(coefficients: Coefficients, level: NoiseLevel) -> Tensor:
    """Det = alpha b - sigma a: an error dF of the output is an error -sigma dF / det of x0."""
    return level.alpha * coefficients.b - level.sigma * coefficients.a


def solve(coefficients: Coefficients, level: NoiseLevel, f: Tensor, x_t: Tensor) -> Estimate:
    """Invert x_t = alpha x0 + sigma eps, F = a x0 + b eps; coefficients and level must broadcast with f and x_t."""
    (a, b), (alpha, sigma) = coefficients, level
    det = determinant(coefficients, level)
    return Estimate((b * x_t - sigma * f) / det, (alpha * f - a * x_t) / det)
