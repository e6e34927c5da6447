"""Which sample when: pure functions of (seed, step), whatever the number of devices and workers.

A global batch of B rows is divided among L lanes, and lane l has the rows of the endless sequence of samples whose
number n is l modulo L: n = (step B / L + row) L + l. Nothing is carried from step to step, so that going on is
arithmetic, at any number of devices that divides L.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WINDOW = 4


class Window(NamedTuple):
    """Samples that follow each other in a lane, shuffled among themselves."""

    first: int  # how many samples of the lane come before
    shard: np.ndarray  # (n,)
    sample: np.ndarray  # (n,) its number in the shard


class Order(ABC):
    """The samples of every step, lane by lane.

    Args:
        counts: samples of each shard.
        seed: of the order.
        lanes: L, fixed for a run.
        batch_size: B, a multiple of L.
        window: shards among which samples are shuffled.

    Raises:
        ValueError: if there is no sample, a number is out of range, or B is no multiple of L.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, lanes: int, batch_size: int, window: int = WINDOW):
        self.counts = np.asarray(counts, dtype=np.int64)
        if not self.counts.sum():
            raise ValueError("there is no sample in the shards")
        if window < 1:
            raise ValueError(f"data.window={window} must be at least 1")
        if lanes < 1 or batch_size % lanes:
            raise ValueError(f"trainer.batch_size={batch_size} must be a multiple of trainer.lanes={lanes}")
        self.seed = seed
        self.lanes = lanes
        self.rows = batch_size // lanes
        self.window = window
        self._latest: dict[int, Window] = {}
        self._told: dict[int, int] = {}

    def at(self, step: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards and the numbers in them, each (B / L,), of a lane's samples at a step."""
        number, stop = step * self.rows, (step + 1) * self.rows
        parts = []
        while number < stop:
            window = self._around(lane, number)
            part = slice(number - window.first, stop - window.first)
            parts.append((window.shard[part], window.sample[part]))
            number += len(parts[-1][0])
        shard, sample = zip(*parts, strict=True)
        return np.concatenate(shard), np.concatenate(sample)

    def instead(self, step: int, lane: int, row: int) -> Iterator[tuple[int, int]]:
        """What takes the place of a sample that cannot be used, without end.

        It is the sample after it in its window, which is a ring, then the one after that, then those of later windows.
        """
        number = step * self.rows + row
        window = self._around(lane, number)
        turn = number - window.first + 1
        for other in (*range(turn, len(window.shard)), *range(turn - 1)):
            yield int(window.shard[other]), int(window.sample[other])
        while True:
            window = self._make(lane, window.first + len(window.shard))
            yield from zip(window.shard.tolist(), window.sample.tolist(), strict=True)

    def coming(self, step: int, lane: int) -> list[int]:
        """The shards of a lane's window at a step, and of the one after; told once a window, and then nothing."""
        window = self._around(lane, step * self.rows)
        if self._told.get(lane) == window.first:
            return []
        self._told[lane] = window.first
        after = self._make(lane, window.first + len(window.shard))
        return [*np.unique(window.shard).tolist(), *np.unique(after.shard).tolist()]

    def _around(self, lane: int, number: int) -> Window:
        """The window with the lane's sample of a number; each lane's latest is kept."""
        window = self._latest.get(lane)
        if window is None or not 0 <= number - window.first < len(window.shard):
            window = self._latest[lane] = self._make(lane, number)
        return window

    @abstractmethod
    def _make(self, lane: int, number: int) -> Window:
        """The window with the lane's sample of a number."""


class Shuffled(Order):
    """Every epoch has each sample once, in an order of its own.

    Epoch e is the samples e N ... e N + N - 1 of the sequence, N being the number of samples; where B does not divide
    N, a batch joins the end of an epoch to the beginning of the next. The shards are shuffled, laid end to end and cut
    into L stretches, one a lane, of equal lengths but for one sample.

    Raises:
        ValueError: if there are fewer shards than lanes, too.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, lanes: int, batch_size: int, window: int = WINDOW):
        super().__init__(counts, seed=seed, lanes=lanes, batch_size=batch_size, window=window)
        if len(counts) < lanes:
            raise ValueError(
                f"{len(counts)} shards are fewer than trainer.lanes={lanes}, each of which reads shards of its own: "
                f"take trainer.lanes={_divisor(batch_size, len(counts))}, pack into more and smaller shards, or take "
                "data.order=resampled"
            )
        self.total = int(self.counts.sum())

    def _make(self, lane: int, number: int) -> Window:
        epoch = (number * self.lanes + lane) // self.total
        order, ends, firsts, stretches = self._epoch(epoch)
        begin, end = int(stretches[lane]), int(stretches[lane + 1])  # of the lane, in the shards laid end to end
        first_piece = int(np.searchsorted(ends, begin, "right"))
        piece = int(np.searchsorted(ends, begin + number - firsts[lane], "right"))
        turn = (piece - first_piece) // self.window
        pieces = range(first_piece + turn * self.window, min(first_piece + (turn + 1) * self.window, len(order)))
        shards, samples = [], []
        for i in pieces:
            zero = int(ends[i]) - int(self.counts[order[i]])
            inside = np.arange(max(begin, zero), min(end, int(ends[i]))) - zero
            shards.append(np.full(len(inside), order[i]))
            samples.append(inside)
        first = int(firsts[lane]) + max(begin, int(ends[pieces[0]]) - int(self.counts[order[pieces[0]]])) - begin
        shard, sample = np.concatenate(shards), np.concatenate(samples)
        mixed = permutation([1, self.seed, epoch, lane, turn], len(shard))
        return Window(first, shard[mixed], sample[mixed])

    @lru_cache(maxsize=3)  # noqa: B019 - an order lives as long as its run
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of an epoch: the shuffled shards, where each ends, each lane's first number, where its stretch begins."""
        order = permutation([2, self.seed, epoch], len(self.counts))
        lane = np.arange(self.lanes)
        firsts, nexts = (-((lane - e * self.total) // self.lanes) for e in (epoch, epoch + 1))
        return order, self.counts[order].cumsum(), firsts, np.concatenate([[0], (nexts - firsts).cumsum()])


class Resampled(Order):
    """Samples drawn with replacement, for mixtures: a source by its weight, in it each sample alike.

    A window is as many samples as that many shards hold on average. Each is drawn by the weights from one of the
    sources, of which so many shards are drawn, by size, for each window.

    Args:
        counts: samples of each shard.
        sources: of each shard, the number of its source.
        weights: of each source.
        seed: of the order.
        lanes: L, fixed for a run.
        batch_size: B, a multiple of L.
        window: shards of a source that are drawn together.

    Raises:
        ValueError: if the weights are not one positive number for each source, too.
    """

    def __init__(
        self,
        counts: Sequence[int],
        sources: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        lanes: int,
        batch_size: int,
        window: int = WINDOW,
    ):
        super().__init__(counts, seed=seed, lanes=lanes, batch_size=batch_size, window=window)
        source = np.asarray(sources)
        if len(weights) != source.max() + 1 or not all(weight > 0 for weight in weights):
            raise ValueError(
                f"data.weights={list(weights)} must be one positive number for each of {source.max() + 1} folders"
            )
        self.until = np.cumsum(weights) / np.sum(weights)
        self.of_source = [np.flatnonzero(source == number) for number in range(len(weights))]
        self.length = max(1, round(window * self.counts.sum() / len(counts)))

    def _make(self, lane: int, number: int) -> Window:
        turn = number // self.length
        key = [3, self.seed, lane, turn]
        chance = uniform(key, 3, self.length)
        drawn = uniform([5, *key], len(self.of_source), self.window)
        shards = np.stack([
            own[_pick(self.counts[own].cumsum() / self.counts[own].sum(), row)]
            for own, row in zip(self.of_source, drawn, strict=True)
        ])  # (sources, window)  # fmt: skip
        shard = shards[_pick(self.until, chance[0]), (chance[1] * self.window).astype(np.int64)]
        return Window(turn * self.length, shard, (chance[2] * self.counts[shard]).astype(np.int64))


def _pick(until: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Numbers 0, 1, ... by their cumulative probabilities."""
    return np.searchsorted(until, chance, "right").clip(max=len(until) - 1)


def share(lanes: int, rank: int, world_size: int) -> range:
    """The lanes of one of several devices.

    Raises:
        ValueError: if they cannot be shared out evenly.
    """
    if lanes % world_size:
        divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
        raise ValueError(
            f"trainer.lanes={lanes} cannot be shared out evenly among {world_size} devices: take as many devices as "
            f"one of {divisors}, or begin a run with trainer.lanes a multiple of {world_size}"
        )
    each = lanes // world_size
    return range(rank * each, (rank + 1) * each)


def uniform(key: Sequence[int], *shape: int) -> np.ndarray:
    """Numbers in [0, 1) that follow from a key alone."""
    return (_raw(key, int(np.prod(shape))) >> np.uint64(11)).reshape(shape) * 2.0**-53


def permutation(key: Sequence[int], number: int) -> np.ndarray:
    """The numbers 0..number - 1 in an order that follows from the key alone."""
    return np.argsort(_raw(key, number), kind="stable")


def _raw(key: Sequence[int], number: int) -> np.ndarray:
    """64-bit numbers of a counter-based generator, whose values numpy promises to keep, unlike those of its shuffle."""
    return np.random.Philox(np.random.SeedSequence(list(key))).random_raw(number)


def _divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)
