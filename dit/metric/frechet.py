"""The Frechet distance between two sets of features."""

import torch
from torch import Tensor

from dit.metric.moments import Moments
from dit.metric.seen import Seen


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64 (arXiv:1706.08500, equation 6).

    The eigenvalues of S_a S_b are the squares of the singular values of S_a^(1/2) S_b^(1/2), which are real and found
    without loss where covariances are singular, as those of fewer images than features are.

    Args:
        a: of at least two rows.
        b: the same, as wide.
    """
    roots = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    mean = (a.mean - b.mean).square().sum()
    return (mean + a.covariance.trace() + b.covariance.trace() - 2 * roots).item()


def fid(samples: Seen, reference: Seen) -> float:
    """That of pooled features (FID, arXiv:1706.08500)."""
    return frechet_distance(samples.moments["pool"], reference.moments["pool"])


def sfid(samples: Seen, reference: Seen) -> float:
    """That of features at places of the image (sFID, arXiv:2103.03841)."""
    return frechet_distance(samples.moments["spatial"], reference.moments["spatial"])


fid.moments = ("pool",)  # type: ignore[attr-defined]
sfid.moments = ("spatial",)  # type: ignore[attr-defined]


def _root(covariance: Tensor) -> Tensor:
    """The symmetric one."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
