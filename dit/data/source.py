"""The interface of a set of training data."""

import itertools
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dit.data.sample import Augmentation, BadSample, Decoder, collate
from dit.data.unheard import SIGNALS, unheard


class Source(ABC):
    """Images and their fields, as endless batches for training, and as they are for evaluation.

    Args:
        decoder: from files to samples.
        paths: the folders of the training shards.
        held_out: the folder of shards that are kept from training; None: there are none.
        pack: makes the first and the last of these where they are missing.
        num_workers: processes that read and decode; 0 for none beside the training process.

    Raises:
        ValueError: if num_workers is less than 0.
    """

    def __init__(
        self,
        decoder: Decoder,
        paths: list[str],
        held_out: str | None,
        pack: Callable[[Path, Path], None] | None,
        num_workers: int,
    ):
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} must be at least 0")
        self.decoder = decoder
        self.paths = paths
        self.held_out = held_out
        self.num_workers = num_workers
        self.about: dict[str, Any] = {}  # of encoded shards, by what they were encoded
        self.replaced = 0  # samples that could not be used, since the beginning of the process
        self._pack = pack

    @property
    def there(self) -> bool:
        """Whether the shards are there; otherwise `prepare` packs them."""
        return not self._pack or all(Path(folder).exists() for folder in (*self.paths, self.held_out) if folder)

    def prepare(self) -> None:
        """Pack the shards where they are missing and can be packed."""
        if self._pack and self.held_out and not self.there:
            self._pack(Path(self.paths[0]), Path(self.held_out))

    @abstractmethod
    def check(self, batch_size: int = 1, lanes: int = 1, world_size: int = 1) -> None:
        """Check the shards; where they can be packed and are not there yet, nothing is done.

        Args:
            batch_size: of the global batch.
            lanes: among which a global batch is divided.
            world_size: number of devices.

        Raises:
            ValueError: if a folder, a shard or a file of a sample is missing or damaged, or they cannot be shared out.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells these training samples from others."""

    def fingerprint_of_images(self, split: str) -> str:
        """What tells the images of a split from others; of encoded shards these lie elsewhere."""
        return f"{split} {self.fingerprint()}"

    def count(self, split: str) -> int | None:
        """The number of images of a split; None, where nobody knows."""
        return None

    @abstractmethod
    def batches(
        self,
        batch_size: int,
        seed: int,
        first_step: int = 0,
        *,
        lanes: int = 1,
        rank: int = 0,
        world_size: int = 1,
        skip: Collection[int] = (),
    ) -> Generator[dict[str, Any], None, None]:
        """Endless batches from the given step on; closing the generator ends its workers.

        Args:
            batch_size: of the global batch.
            seed: of the order, crops and flips.
            first_step: how many batches come before.
            lanes: among which a global batch is divided.
            rank: of the device; it gets the lanes rank * lanes / world_size and so on, one behind the other.
            world_size: number of devices.
            skip: steps whose batches are left out.

        Yields:
            `image`, uint8 (B, C, H, W), or `latent`, (B, K, c, h, w), and `key`, an array of B names, and the fields:
            `label`, int64 (B,), `noise`, (B, c, h, w), the others arrays of B strings or arrays.
        """

    def has_images(self, split: str) -> bool:
        """Whether there are images of a split, `train` or `held_out`."""
        return True

    def check_images(self) -> None:
        """See whether there are images by which to judge; where shards are not packed yet, nothing is done.

        Raises:
            ValueError: if not.
        """
        for split, key in {"train": "images", "held_out": "held_out"}.items():
            if self.there and not self.has_images(split):
                raise ValueError(f"the metric needs images, and the {split} shards have none: give data.{key}=<folder>")

    @abstractmethod
    def _files(
        self, split: str, own: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[int, str, str, dict[str, bytes]]]:
        """All samples of a split in order, or those of some numbers.

        Of each its number, how messages name it, the key, the files (images, not latents).
        """

    def _loader(
        self, batches: Dataset[dict[str, Any]], steps: Iterable[int] | None = None
    ) -> DataLoader[dict[str, Any]]:
        """What reads whole batches in processes of their own, those of the steps if these are asked for."""
        return _Loader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=self.num_workers,
            prefetch_factor=2 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
        )

    @abstractmethod
    def first(self) -> dict[str, Any]:
        """The first training sample that can be used, as a batch of one.

        Raises:
            ValueError: if there is none among the first so many.
        """

    def read(self, split: str, most: int | None = None) -> dict[str, Any]:
        """All samples of `train` or `held_out`, or the first so many, in order, as one batch; bad ones are left out.

        They have `image`, if there are images of the split, and the fields.
        """
        found = next(self.parts(split, most), None)
        if found is None:
            raise ValueError(f"there is no sample that can be read among the {split} shards")
        return found[1]

    def parts(
        self, split: str, size: int | None, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples of `train` or `held_out` in order, in parts of a size, as `read` has them; bad ones are left out.

        Args:
            split: which.
            size: of a part; None: all are one.
            rank: of this process; it gets every world_size-th part, this one the first.
            world_size: number of processes.

        Yields:
            The number of a part, and its samples; a part of bad samples alone is left out.
        """
        assert split in ("train", "held_out")
        decode, bad = self.decoder.of_images(), 0

        def part_of(number: int) -> int:
            return 0 if size is None else number // size

        files = self._files(split, lambda number: part_of(number) % world_size == rank)
        for part, some in itertools.groupby(files, lambda found: part_of(found[0])):
            samples = []
            for _, where, key, data in some:
                try:
                    samples.append(decode(key, data, Augmentation()))
                except BadSample as error:
                    bad += 1
                    print(f"dit: WARNING: {where}: {error}; left out, {bad} so far", flush=True)
            if samples:
                yield part, collate(samples)


class _Loader(DataLoader[dict[str, Any]]):
    """One whose workers leave signals to the parent, which decides when to stop, while they still import, too."""

    def __iter__(self) -> Any:
        with unheard():
            return super().__iter__()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Where they are forked by a server that was there before."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
