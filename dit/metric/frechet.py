"""The Frechet distance between two sets of features."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64 (arXiv:1706.08500, equation 6).

    Args:
        a: features (N, D), N at least 2.
        b: features (M, D).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of the root is the sum of the roots of the eigenvalues, real and not negative but for rounding.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * root).item()
