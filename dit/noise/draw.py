"""Random numbers keyed by (seed, step, lane, purpose) instead of drawn from a global stream."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SPREADS = ("independent", "stratified", "low_discrepancy")


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
        num_lanes: the lanes of the global batch; None: these are all.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        lanes: Sequence[int],
        batch: int,
        device: torch.device | str = "cpu",
        num_lanes: int | None = None,
    ):
        assert batch % len(lanes) == 0, f"{batch} rows do not divide among {len(lanes)} lanes"
        self.key = (seed, step)
        self.lanes = lanes
        self.rows = batch // len(lanes)
        self.device = torch.device(device)
        self.num_lanes = num_lanes or len(lanes)

    def generator(self, purpose: str, lane: int = 0) -> torch.Generator:
        """A generator for one purpose in one lane."""
        entropy = np.random.SeedSequence([*self.key, lane, zlib.crc32(purpose.encode())])
        return torch.Generator(self.device).manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def uniform(self, purpose: str, spread: str = "independent") -> Tensor:
        """(B,) numbers in [0, 1), each uniform.

        Args:
            purpose: what they are for.
            spread: how they lie to each other over the global batch of n rows, i = 0..n - 1: `independent` u_i;
                `stratified`, (i + u_i) / n + w; `low_discrepancy`, i / n + w (arXiv:2107.00630), modulo 1,
                one w for all of them and anew at every step.
        """
        assert spread in SPREADS
        if spread == "low_discrepancy":
            u = torch.zeros(self.rows * len(self.lanes), device=self.device)
        else:
            u = torch.cat([self._rows(torch.rand, (), purpose, lane) for lane in self.lanes])
        if spread == "independent":
            return u
        row = torch.arange(self.rows, device=self.device)
        i = torch.cat([row * self.num_lanes + lane for lane in self.lanes])
        w = torch.rand((), generator=self.generator(f"{purpose} {spread}"), device=self.device)
        return ((i + u) / (self.rows * self.num_lanes) + w) % 1

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal numbers."""
        return torch.cat([self._rows(torch.randn, shape, purpose, lane) for lane in self.lanes])

    def apply(self, purpose: str, function: Callable[[Tensor, torch.Generator], Tensor], x: Tensor) -> Tensor:
        """A function of rows (B, ...) and a generator, with the numbers of each lane for its own rows."""
        parts = zip(self.lanes, x.chunk(len(self.lanes)), strict=True)
        return torch.cat([function(part, self.generator(purpose, lane)) for lane, part in parts])

    def seed_layers(self) -> None:
        """Seed torch's own stream, of which dropout draws: after each call a network draws the same masks again."""
        torch.manual_seed(self.generator("layers", self.lanes[0]).initial_seed())

    def _rows(self, draw, shape: Sequence[int], purpose: str, lane: int) -> Tensor:  # type: ignore[no-untyped-def]
        return draw((self.rows, *shape), generator=self.generator(purpose, lane), device=self.device)
