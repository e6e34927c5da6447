"""Extractors at work, and the metrics that look by the same one."""

from functools import cached_property

import torch
from torch import Tensor

from dit.metric.distribution import Distribution
from dit.metric.extractor import Extractor
from dit.metric.seen import Seen
from dit.weights.identity import sha256


class Look:
    """An extractor at work.

    Args:
        extractor: on the CPU.
        device: where it is to work.
    """

    def __init__(self, extractor: Extractor, device: torch.device):
        self.about = {"name": extractor.name, "sha256": sha256(extractor), "resize": extractor.resize}
        self.extractor, self.device = extractor.eval().to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """What it sees in uint8 images (N, C, H, W), by layer (N, D)."""
        found: dict[str, Tensor] = self.extractor(images.to(self.device))
        return found

    @cached_property
    def widths(self) -> dict[str, int]:
        """By layer the number of features."""
        return {name: layer.shape[1] for name, layer in self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).items()}


class Group:
    """The metrics that look by the same extractor."""

    def __init__(self, look: Look):
        self.look = look
        self.metrics: dict[str, Distribution] = {}
        self.moments: set[str] = set()  # layers of which they read moments, of samples and reference
        self.rows: set[str] = set()  # those whose rows they read
        self.reference_rows: set[str] = set()  # of the reference
        self.reference: Seen | None = None

    def add(self, name: str, metric: Distribution) -> None:
        """Take in a metric.

        Raises:
            ValueError: if the extractor does not see what it reads.
        """
        for layer in (*metric.moments, *metric.rows):
            if layer not in self.look.extractor.layers:
                raise ValueError(
                    f"metric={name} reads {layer}, which the extractor {self.look.about['name']} does not see: choose "
                    "extractor=inception"
                )
        self.metrics[name] = metric
        self.moments |= set(metric.moments)
        self.rows |= set(metric.rows)
        self.reference_rows |= set(metric.reference_rows)

    def begin(self, of_reference: bool = False) -> Seen:
        """Nothing seen yet."""
        return Seen(sorted(self.moments), sorted(self.reference_rows if of_reference else self.rows))

    def figures(self, samples: Seen) -> dict[str, float]:
        """Of each metric, by its name unless it has several."""
        assert self.reference
        figures: dict[str, float] = {}
        for name, metric in self.metrics.items():
            found = metric.figure(samples, self.reference)
            figures |= found if isinstance(found, dict) else {name: found}
        return figures
