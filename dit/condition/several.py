"""Several conditions at once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit.condition.condition import Condition, Encode


class Several(Condition):
    """All that each of them says, such as a label and a picture; each is dropped for itself.

    Guidance leaves out those with a dropout; the others it keeps.

    Args:
        **conditions: by any names.

    Raises:
        ValueError: if there are none, or two would say the same.
    """

    def __init__(self, **conditions: Condition):
        if not conditions:
            raise ValueError("condition: several conditions, but none is given")
        self.conditions = conditions
        for name, condition in conditions.items():
            others = {size for other, c in conditions.items() if other != name for size in c.sizes}
            if twice := others & condition.sizes.keys():
                raise ValueError(f"condition.{name} and another condition both give the network {', '.join(twice)}")
        self.fields = tuple(dict.fromkeys(field for c in conditions.values() for field in c.fields))
        self.asks = tuple(dict.fromkeys(ask for c in conditions.values() for ask in c.asks))
        self.dropout = max(condition.dropout for condition in conditions.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Those of all."""
        return {name: size for condition in self.conditions.values() for name, size in condition.sizes.items()}

    def check(self, sample: Mapping[str, Any] | None) -> None:
        """Check each."""
        for condition in self.conditions.values():
            condition.check(sample)

    def asked(self, batch: Mapping[str, Any], draw: Any) -> Mapping[str, Any]:
        """What all would be asked."""
        return {name: value for c in self.conditions.values() for name, value in c.asked(batch, draw).items()}

    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """What all say."""
        return {name: value for c in self.conditions.values() for name, value in c(asked, draw, encode).items()}

    def part(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """What those say that are asked."""
        return {name: value for c in self.conditions.values() for name, value in c.part(asked, draw, encode).items()}

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing of what may be left out.

        Raises:
            ValueError: if nothing may be left out.
        """
        some = [condition for condition in self.conditions.values() if condition.dropout]
        for condition in some or self.conditions.values():
            cond = condition.null(cond)
        return dict(cond)

    def augment(self, cond: Mapping[str, Tensor], draw: Any) -> dict[str, Tensor]:
        """As each has it in training."""
        for condition in self.conditions.values():
            cond = condition.augment(cond, draw)
        return dict(cond)
