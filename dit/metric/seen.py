"""What an extractor has seen in a set of images."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dit.metric.moments import Moments


class Seen:
    """Moments of some layers, and the rows of some, of images that come in numbered parts.

    Args:
        moments: layers of which number, mean and covariance are kept.
        rows: layers whose rows themselves are kept, in the order of the parts.
    """

    def __init__(self, moments: Collection[str], rows: Collection[str]):
        self.moments: dict[str, Moments] = {}
        self._moments, self._rows = tuple(moments), tuple(rows)
        self._parts: dict[int, dict[str, Tensor]] = {}

    def add(self, part: int, layers: Mapping[str, Tensor], *, with_rows: bool = True) -> None:
        """Take in a part of the images: by layer its features (N, D), whose rows are kept unless told otherwise."""
        for name in self._moments:
            found = Moments.of(layers[name])
            self.moments[name] = self.moments[name] + found if name in self.moments else found
        if with_rows:
            self._parts[part] = {name: layers[name].float().cpu() for name in self._rows}

    def restore(self, moments: Mapping[str, Moments], rows: Mapping[str, Tensor]) -> None:
        """Take up what was seen before."""
        self.moments, self._parts = dict(moments), {0: dict(rows)}

    def rows(self, layer: str) -> Tensor:
        """The rows (N, D) of a layer, on the CPU.

        Raises:
            ValueError: if they were not kept, as in published statistics.
        """
        if layer not in self._rows:
            raise ValueError("the reference has statistics alone, without images: give one with arr_0, or shards")
        return torch.cat([self._parts[part][layer] for part in sorted(self._parts)])

    def share(self, total: Callable[[Tensor], Tensor], gathered: Callable[[Any], list[Any]]) -> None:
        """Have in every process what all have seen.

        Args:
            total: the sum of a tensor over processes.
            gathered: the values of all processes.
        """
        widths = {name: len(found.mean) for name, found in self.moments.items()}
        for name, width in {name: width for each in gathered(widths) for name, width in each.items()}.items():
            if name not in self.moments:  # this process had no part
                self.moments[name] = Moments(0, torch.zeros(width), torch.zeros(width, width))
        self.moments = {name: found.summed(total) for name, found in sorted(self.moments.items())}
        self._parts = {number: rows for parts in gathered(self._parts) for number, rows in parts.items()}
