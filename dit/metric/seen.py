"""What an extractor has seen in a set of images."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dit.metric.moments import Moments


class Seen:
    """Moments of some layers, and the rows of some, of images that come in numbered parts; on the CPU.

    Args:
        moments: layers of which number, mean and covariance are kept.
        rows: layers whose rows themselves are kept, in the order of the parts.
    """

    def __init__(self, moments: Collection[str], rows: Collection[str]):
        self.moments: dict[str, Moments] = {}
        self._moments, self._rows = tuple(moments), tuple(rows)
        self._parts: dict[int, dict[str, Tensor]] = {}

    def add(self, part: int, layers: Mapping[str, Tensor], chosen: Tensor | None = None) -> None:
        """Take in a part of the images.

        Args:
            part: its number.
            layers: by layer its features (N, D).
            chosen: which rows are kept, (N,), bool; None: all.
        """
        for name in self._moments:
            found = Moments.of(layers[name])
            found = Moments(found.number, found.mean.cpu(), found.scatter.cpu())
            self.moments[name] = self.moments[name] + found if name in self.moments else found
        kept = {name: layers[name].float().cpu() for name in self._rows}
        self._parts[part] = kept if chosen is None else {name: rows[chosen] for name, rows in kept.items()}

    def restore(self, moments: Mapping[str, Moments], rows: Mapping[str, Tensor]) -> None:
        """Take up what was seen before."""
        self.moments, self._parts = dict(moments), {0: dict(rows)}

    def rows(self, layer: str) -> Tensor:
        """The rows (N, D) of a layer that were kept."""
        return torch.cat([self._parts[part][layer] for part in sorted(self._parts)])

    def share(self, world: Any, size: int) -> None:
        """Have in every process what all have seen.

        Args:
            world: the processes, with `sum` of a tensor and `gathered` values.
            size: how many of them look at different parts; others, as of tensor parallelism, look at the same.
        """
        widths = {name: len(found.mean) for name, found in self.moments.items()}
        for name, width in {name: width for each in world.gathered(widths) for name, width in each.items()}.items():
            if name not in self.moments:  # this process had no part
                self.moments[name] = Moments(0, torch.zeros(width), torch.zeros(width, width))

        def total(tensor: Tensor) -> Tensor:
            found: Tensor = world.sum(tensor) * size / world.size
            return found

        self.moments = {name: found.summed(total) for name, found in sorted(self.moments.items())}
        self._parts = {number: rows for parts in world.gathered(self._parts) for number, rows in parts.items()}
