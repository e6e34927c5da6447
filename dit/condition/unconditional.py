"""Nothing at all."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit.condition.condition import Condition, Encode


class Unconditional(Condition):
    """`cond = {}`: the network is told nothing besides the noise."""

    @property
    def sizes(self) -> dict[str, int]:
        """None."""
        return {}

    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
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
