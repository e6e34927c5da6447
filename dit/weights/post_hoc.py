"""Averages of any length after training, of snapshots of two that were kept (arXiv:2312.02696, section 3.2)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit.weights.ema import exponent


class Average(NamedTuple):
    """By a power profile."""

    step: int  # finished optimizer steps
    std: float  # of the profile


def coefficients(snapshots: Sequence[Average], target: Average) -> list[float]:
    """How much of each snapshot makes the best approximation of another average, in the least squares of the profiles.

    With p_i(t) the share that weights of step t have in average i, and <p, q> the integral of p q: the solution x of
    sum_j <p_i, p_j> x_j = <p_i, target> (arXiv:2312.02696, algorithm 3), in float64.

    Raises:
        ValueError: if a std is out of range, there are no snapshots, or none is as far as the target.
    """
    if not snapshots:
        raise ValueError("there are no snapshots of averages to reconstruct another from")
    if target.step > max(snapshot.step for snapshot in snapshots):
        raise ValueError(f"no snapshot is as far as step {target.step}: choose an earlier step, or train on")
    steps = np.array([a.step for a in (*snapshots, target)], dtype=np.float64)
    gammas = np.array([exponent(a.std) for a in (*snapshots, target)])
    products = _inner(steps[:, None], gammas[:, None], steps, gammas)
    # Relative to their lengths, as those of early and narrow profiles are much larger.
    scale = products.diagonal() ** -0.5
    products *= scale[:, None] * scale
    solution = np.linalg.lstsq(products[:-1, :-1], products[:-1, -1], rcond=None)[0]
    return [float(x) for x in solution * scale[:-1] / scale[-1]]


def reconstruct(parts: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The sum of coefficient * tensors, in float32.

    Args:
        parts: a coefficient, and the tensors of a snapshot by their names; best a generator, so that one snapshot at a
            time is in memory.

    Raises:
        ValueError: if two have not the same names and shapes.
    """
    total: dict[str, Tensor] = {}
    for coefficient, tensors in parts:
        if not total:
            total = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tensors.items()}
        if {n: t.shape for n, t in total.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError("snapshots of averages differ in names or shapes: are they of one run?")
        for name, tensor in tensors.items():
            total[name].add_(tensor, alpha=coefficient)
    return total


def _inner(
    t_a: NDArray[np.float64], gamma_a: NDArray[np.float64], t_b: NDArray[np.float64], gamma_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The integral of p_a p_b, for p = (gamma + 1) t^gamma / t_end^(gamma + 1) on [0, t_end], and 0 beyond."""
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    share = (earlier / later) ** np.where(t_a < t_b, gamma_b, gamma_a)  # of the one that ends later, at the other's end
    product: NDArray[np.float64] = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * share / later
    return product
