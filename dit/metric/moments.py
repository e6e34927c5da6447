"""Mean and covariance of features that come in parts."""

from collections.abc import Callable

import torch
from torch import Tensor


class Moments:
    """Number n, mean and scatter S = sum (x - mean)(x - mean)^T of rows x, in float64.

    Two of them are merged without loss: with d the difference of the means, S = S_a + S_b + n_a n_b / n d d^T (Chan et
    al., 1979, `Updating formulae and a pairwise algorithm`), so that it hardly matters in which parts rows come.

    Args:
        number: of rows.
        mean: (D,).
        scatter: (D, D).
    """

    def __init__(self, number: int, mean: Tensor, scatter: Tensor):
        self.number, self.mean, self.scatter = number, mean.double(), scatter.double()

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Those of rows (N, D)."""
        rows = rows.double()
        mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    @property
    def covariance(self) -> Tensor:
        """S / (n - 1), (D, D).

        Raises:
            ValueError: if there is but one row.
        """
        if self.number < 2:
            raise ValueError(f"a covariance needs two images or more, and there are {self.number}")
        return self.scatter / (self.number - 1)

    def __add__(self, other: "Moments") -> "Moments":
        """Those of the rows of both."""
        number = self.number + other.number
        if not number:
            return self
        d = other.mean - self.mean
        scatter = self.scatter + other.scatter + self.number * other.number / number * torch.outer(d, d)
        return Moments(number, self.mean + other.number / number * d, scatter)

    def summed(self, total: Callable[[Tensor], Tensor]) -> "Moments":
        """Those of the rows of all processes, each of which has its own.

        Args:
            total: the sum of a tensor over processes.
        """
        counted = total(torch.cat([self.mean.new_tensor([self.number]), self.number * self.mean]))
        mean = counted[1:] / counted[0]
        d = self.mean - mean
        return Moments(round(counted[0].item()), mean, total(self.scatter + self.number * torch.outer(d, d)))
