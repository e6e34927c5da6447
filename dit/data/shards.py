"""The samples of indexed shards, by number."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dit.data import caption, index, picture
from dit.data.scan import Table
from dit.data.store import DataError, Store

MAX_FILE_BYTES = 2**28
MAX_BYTES = {"image": picture.MAX_BYTES, "caption": caption.MAX_BYTES, "label": 20}

Wanted = Mapping[str, tuple[str, ...]]  # by name: the extensions of which a sample has one


class BadSample(DataError):
    """A sample that cannot be used, though its files are there."""


class Shards:
    """The shards of one or several folders, numbered one behind the other, and their samples.

    Args:
        folders: paths or URLs.
        indices: the folders of their indices; None: beside the shards.
        cache: where shards of URLs are kept.
        cache_bytes: how much of them.

    Raises:
        ValueError: if there are not as many of both.
        ImportError: if what a URL needs is missing.
    """

    def __init__(
        self,
        folders: Sequence[str],
        indices: Sequence[str] | None = None,
        cache: str | Path | None = None,
        cache_bytes: int = 2**36,
    ):
        if not folders or len(indices or folders) != len(folders):
            raise ValueError(f"data.index={indices} must name one folder for each of data.path={list(folders)}")
        self.stores = [Store(folder, cache, cache_bytes) for folder in folders]
        self.places = [Store(place) for place in indices or folders]
        self.keep = 256  # tables
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._spots: dict[int, dict[tuple[tuple[str, ...], ...], np.ndarray]] = {}

    @cached_property
    def indices(self) -> list[index.Index]:
        """Of the folders, checked once.

        Raises:
            ValueError: if a folder or a shard is missing or damaged.
        """
        return [index.read(a.folder, b.folder) for a, b in zip(self.stores, self.places, strict=True)]

    @cached_property
    def all(self) -> list[index.Shard]:
        """The shards of all folders."""
        return [shard for found in self.indices for shard in found.shards]

    @cached_property
    def sources(self) -> list[int]:
        """Of each shard the number of its folder."""
        return [number for number, found in enumerate(self.indices) for _ in found.shards]

    @cached_property
    def total(self) -> int:
        """The number of samples."""
        return sum(shard.samples for shard in self.all)

    def key(self, shard: int, sample: int) -> str:
        """The name of a sample."""
        return bytes(self._table(shard).keys[sample]).decode()

    def where(self, shard: int, sample: int) -> str:
        """A sample, as messages name it."""
        return f"sample {self.key(shard, sample)} of the shard {self._url(shard)}"

    def files(self, shard: int, sample: int, wanted: Wanted) -> dict[str, bytes]:
        """Files of a sample, all of which it must have.

        Raises:
            BadSample: if one is too large.
            DataError: if the shard cannot be read, or is not the one that was indexed.
        """
        spots = self._spots_of(shard, tuple(wanted.values()))[sample].tolist()
        for name, (_, size) in zip(wanted, spots, strict=True):
            if size > (most := MAX_BYTES.get(name, MAX_FILE_BYTES)):
                raise BadSample(f"its {name} has {size:,} bytes; at most {most:,} are read")
        return dict(zip(wanted, self._read(shard, spots), strict=True))

    def whole(self, shard: int, sample: int) -> dict[str, bytes]:
        """All files of a sample, by their extensions.

        Raises:
            BadSample: if one is too large.
            DataError: if the shard cannot be read, or is not the one that was indexed.
        """
        found = self._table(shard)
        there = np.flatnonzero(found.offsets[sample] >= 0)
        spots = np.stack([found.offsets[sample, there], found.sizes[sample, there]], axis=1)
        if spots[:, 1].max() > MAX_FILE_BYTES:
            raise BadSample(f"it has a file of {spots[:, 1].max():,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return dict(zip([found.extensions[i] for i in there], self._read(shard, spots.tolist()), strict=True))

    def prefetch(self, shard: int) -> None:
        """Begin to fetch a shard that will be read soon."""
        described = self.all[shard]
        self.stores[self.sources[shard]].prefetch(described.name, described.bytes, described.sha256)

    def _read(self, shard: int, spots: list[tuple[int, int]]) -> list[bytes]:
        """What lies at each (offset, size) of a shard."""
        described = self.all[shard]
        handle = self.stores[self.sources[shard]].open(described.name, described.bytes, described.sha256)
        try:
            parts = [os.pread(handle, size, offset) for offset, size in spots]
        except OSError as error:
            raise DataError(f"the shard {self._url(shard)} cannot be read: {error}") from error
        for part, (_, size) in zip(parts, spots, strict=True):
            if len(part) != size:
                raise DataError(f"the shard {self._url(shard)} was cut since it was indexed")
        return parts

    def _url(self, shard: int) -> str:
        return self.stores[self.sources[shard]].url(self.all[shard].name)

    def _table(self, shard: int) -> Table:
        if shard not in self._tables:
            self._tables[shard] = index.table(self.places[self.sources[shard]], self.all[shard])
            if len(self._tables) > self.keep:
                self._spots.pop(self._tables.popitem(last=False)[0], None)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _spots_of(self, shard: int, wanted: tuple[tuple[str, ...], ...]) -> np.ndarray:
        """(N, files, 2) where each of the wanted files of a shard's samples lies, and its size."""
        found = self._table(shard)
        of_shard = self._spots.setdefault(shard, {})
        if wanted not in of_shard:
            columns = np.stack([found.column(extensions) for extensions in wanted], axis=1)  # (N, files)
            if (columns < 0).any():
                row, file = np.argwhere(columns < 0)[0]
                raise DataError(f"{self.where(shard, int(row))} has no .{' or .'.join(wanted[file])}")
            places = [np.take_along_axis(a, columns, axis=1) for a in (found.offsets, found.sizes)]
            of_shard[wanted] = np.stack(places, axis=-1)
        return of_shard[wanted]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read."""
        return {**self.__dict__, "_tables": OrderedDict(), "_spots": {}}
