"""Data whose denoiser is known exactly: mixtures of round Gaussians."""

import torch

from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.grid import evenly, karras, quadratic
from dit.noise.prediction import Estimate
from dit.noise.trigonometric import Trigonometric
from dit.noise.vp import cosine, linear, scaled_linear, sigmoid, sigmoid_betas

# Every schedule, and a grid on which its solvers have their order: VP wants steps quadratic in t.
SCHEDULES = {
    "linear": (linear(), quadratic),
    "cosine": (cosine(), quadratic),
    "scaled_linear": (scaled_linear(), quadratic),
    "sigmoid": (sigmoid(), quadratic),
    "sigmoid_betas": (sigmoid_betas(), quadratic),
    "zero_terminal_snr": (scaled_linear(zero_terminal_snr=True), quadratic),
    "edm": (EDM(), karras),
    "flow": (Flow(), evenly),
    "trigonometric": (Trigonometric(), evenly),
}


class Mixture:
    """sum_k share_k N(mean_k, std^2 I), in float64.

    Args:
        means: (K, D).
        std: of every part.
        shares: (K,), evenly if None.
    """

    def __init__(self, means, std, shares=None):
        self.means = torch.tensor(means, dtype=torch.float64)
        self.std = std
        self.shares = torch.ones(len(means)) / len(means) if shares is None else torch.tensor(shares)

    def denoise(self, schedule):
        """(x_t (B, D), t) -> the exact estimate of (x0, eps)."""

        def estimate(x, t):
            alpha, sigma = schedule(t)
            variance = alpha**2 * self.std**2 + sigma**2
            distance = (x[:, None] - alpha * self.means).square().sum(-1)  # (B, K)
            share = (self.shares.log() - distance / (2 * variance)).softmax(1)
            means = self.means + alpha * self.std**2 / variance * (x[:, None] - alpha * self.means)  # (B, K, D)
            x0 = (share[..., None] * means).sum(1)
            return Estimate(x0, (x - alpha * x0) / sigma)

        return estimate

    def mean(self):
        return (self.shares[:, None] * self.means).sum(0)

    def covariance(self):
        centred = self.means - self.mean()
        return (self.shares[:, None, None] * centred[:, :, None] * centred[:, None]).sum(0) + self.std**2 * torch.eye(
            self.means.shape[1]
        )

    def cdf(self, x, alpha, sigma):
        """Of x_t, in one dimension."""
        std = (alpha**2 * self.std**2 + sigma**2).sqrt()
        return (self.shares * torch.special.ndtr((x - alpha * self.means[:, 0]) / std)).sum(-1, keepdim=True)

    def ode_end(self, schedule, x, t, s):
        """Where the sampling ODE leads from x (B, 1) at t: in one dimension it keeps the share of the data below x."""
        share = self.cdf(x, *schedule(t))
        low, high = torch.full_like(x, -200), torch.full_like(x, 200)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, *schedule(s)) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low
