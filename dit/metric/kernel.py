"""Distances by kernels: maximum mean discrepancies."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.metric.seen import Seen

CHUNK = 4096  # rows at a time


def kid(
    samples: Seen, reference: Seen, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> dict[str, float]:
    """Kernel inception distance (arXiv:1801.01401): the unbiased squared MMD of k(x, y) = (x^T y / D + 1)^3.

    The mean over subsets drawn without replacement, and their standard deviation; subsets are those that
    torch-fidelity draws of the same seed.

    Args:
        samples: with rows `pool` (N, D).
        reference: the same, (M, D).
        num_subsets: how many.
        subset_size: images of each in a subset.
        seed: of the subsets.

    Raises:
        ValueError: if there are fewer images than a subset has.
    """
    x, y = samples.rows("pool").double(), reference.rows("pool").double()
    check_subsets(min(len(x), len(y)), subset_size)
    random = np.random.RandomState(seed)
    found = []
    for _ in range(num_subsets):
        a, b = (rows[random.choice(len(rows), subset_size, replace=False)] for rows in (x, y))
        found.append(_unbiased(_cubic(a, a), _cubic(b, b), _cubic(a, b)))
    return {"kid": float(np.mean(found)), "kid_std": float(np.std(found))}


def check_subsets(num_images: int, subset_size: int = 1000, **others: Any) -> None:
    """See whether there are enough images for a subset.

    Raises:
        ValueError: if not.
    """
    if not 2 <= subset_size <= num_images:
        raise ValueError(
            f"metric.kid.figure.subset_size={subset_size}, but there are {num_images} images: take at least 2, at most "
            "as many, or more images (num_samples; while training evaluation.num_images and evaluation.few_images)"
        )


kid.rows = ("pool",)  # type: ignore[attr-defined]
kid.check = check_subsets  # type: ignore[attr-defined]


def cmmd(samples: Seen, reference: Seen, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CLIP maximum mean discrepancy (arXiv:2401.09603): scale times the squared MMD of exp(-|x - y|^2 / 2 sigma^2).

    Of embeddings of length 1; the biased estimator, with the diagonals, as published.

    Args:
        samples: with rows `pool` (N, D).
        reference: the same, (M, D).
        sigma: of the kernel.
        scale: of the figure.
    """
    x, y = (torch.nn.functional.normalize(one.rows("pool").double(), dim=1) for one in (samples, reference))
    return scale * (_mean(x, x, sigma) + _mean(y, y, sigma) - 2 * _mean(x, y, sigma))


cmmd.rows = ("pool",)  # type: ignore[attr-defined]


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _unbiased(aa: Tensor, bb: Tensor, ab: Tensor) -> float:
    """Without the diagonals of the kernels of a set with itself."""
    m = len(aa)
    within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
    return (within / (m * (m - 1)) - 2 * ab.mean()).item()


def _mean(a: Tensor, b: Tensor, sigma: float) -> float:
    """The mean of the Gaussian kernel."""
    sums = [torch.exp(-torch.cdist(part, b).square() / (2 * sigma**2)).sum().item() for part in a.split(CHUNK)]
    return sum(sums) / (len(a) * len(b))
