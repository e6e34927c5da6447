"""Nothing at all."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit.condition.condition import Condition


class Unconditional(Condition):
    """`cond = {}`: the network is told nothing besides the noise.

    Args:
        num_classes: 0, what a network without labels is built with.
    """

    def __init__(self, num_classes: int = 0):
        if num_classes != 0:
            raise ValueError(f"condition.num_classes={num_classes} must be 0 for an unconditional model")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Refused: nothing cannot be left out.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "condition=none: an unconditional model cannot be guided by its condition; take guidance.scale=1"
        )

    def drop(self, cond: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
        """Nothing, as before."""
        return dict(cond)
