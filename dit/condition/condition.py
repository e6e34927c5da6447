"""The interface of a condition."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Condition(ABC):
    """From the fields of a batch to the keyword arguments `cond` of the network, each with leading dimension B."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`cond` from a batch of the data, or of what the user asked for."""

    @abstractmethod
    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`cond` of the same shapes that says nothing: the other half of guidance.

        Raises:
            ValueError: if there is no such thing; asked of an empty `cond`, too, so that it is known beforehand.
        """

    @abstractmethod
    def drop(self, cond: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
        """`cond` with some rows told nothing, chosen by uniform numbers u (B,)."""
