"""Variance-preserving schedules: the betas that are in use."""

import math

import torch

from dit.noise.ddpm import VP


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
