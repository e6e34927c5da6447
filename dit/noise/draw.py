"""Random numbers keyed by (seed, step, lane, purpose) instead of drawn from a global stream."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draw:
    """The random numbers of one batch at one step.

    The global batch is split evenly among a fixed number of lanes, and every lane has its own generator for every
    purpose. A sample's numbers therefore do not depend on how many devices or micro-batches share the global batch,
    nor on what else was drawn, and resuming needs no generator state.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        lanes: the lanes whose samples make up this batch, in order, with equally many rows each.
        batch: the number of rows B.
        device: where the numbers are drawn. Devices of different kinds draw different numbers.
    """

    def __init__(self, seed: int, step: int, lanes: Sequence[int], batch: int, device: torch.device | str = "cpu"):
        assert batch % len(lanes) == 0, f"{batch} rows do not divide among {len(lanes)} lanes"
        self.key = (seed, step)
        self.lanes = lanes
        self.rows = batch // len(lanes)
        self.device = torch.device(device)

    def generator(self, purpose: str, lane: int = 0) -> torch.Generator:
        """A generator for one purpose in one lane."""
        entropy = np.random.SeedSequence([*self.key, lane, zlib.crc32(purpose.encode())])
        return torch.Generator(self.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def uniform(self, purpose: str) -> Tensor:
        """(B,) numbers in [0, 1)."""
        return torch.cat([self._rows(torch.rand, (), purpose, lane) for lane in self.lanes])

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal numbers."""
        return torch.cat([self._rows(torch.randn, shape, purpose, lane) for lane in self.lanes])

    def _rows(self, draw, shape: Sequence[int], purpose: str, lane: int) -> Tensor:  # type: ignore[no-untyped-def]
        return draw((self.rows, *shape), generator=self.generator(purpose, lane), device=self.device)
