"""Tar shards without an index, streamed by the webdataset package's own reader."""

import hashlib
import itertools
import random
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from dit.data.order import permutation, share
from dit.data.sample import Augmentation, Decoder, collate
from dit.data.source import Source
from dit.data.store import DataError


class WebDataset(Source):
    """Shards as `Stream` reads them, from local folders, without an index.

    Limits: the order depends on the number of workers and devices. A run that goes on begins a new pass through the
    shuffled shards, so that samples of the pass that was cut short are missed or seen again. Damage is met when it is
    reached, a cut shard is not always noticed, and a sample that cannot be used ends the run.

    Args:
        path: the folder of the training shards.
        image_size: height and width in pixels; other images are cropped and scaled to it.
        channels: 1 (grey) or 3 (RGB).
        num_classes: classes are 0..num_classes - 1.
        fields: what is read beside the image.
        held_out: a folder of shards that are kept from training, for evaluation.
        pack: makes both folders where they are missing.
        flip: mirror half of the samples.
        shuffle_buffer: samples among which a worker picks the next.
        num_workers: processes that read and decode; 0 for none beside the training process.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        channels: int,
        num_classes: int,
        fields: Sequence[str] = ("label",),
        held_out: str | None = None,
        pack: Callable[[Path, Path], None] | None = None,
        flip: bool = False,
        shuffle_buffer: int = 1000,
        num_workers: int = 0,
    ):
        super().__init__(Decoder(image_size, channels, num_classes, fields), [path], held_out, pack, num_workers)
        if shuffle_buffer < 1:
            raise ValueError(f"data.shuffle_buffer={shuffle_buffer} must be at least 1")
        self.flip = flip
        self.shuffle_buffer = shuffle_buffer

    def check(self, batch_size: int = 1, lanes: int = 1, world_size: int = 1) -> None:
        """See whether there are shards, and enough of them."""
        if not self.there:
            return
        if self.held_out:
            _shards(self.held_out)
        shards, readers = _shards(self.paths[0]), max(1, self.num_workers) * world_size
        if len(shards) < readers:
            raise ValueError(
                f"{len(shards)} shards are fewer than the {readers} readers of {world_size} devices: take "
                f"data.num_workers={len(shards) // world_size}, or data=shards, which shares them out by sample"
            )

    def fingerprint(self) -> str:
        """What tells these shards from others, by their names and sizes."""
        found = "".join(f"{path.name} {path.stat().st_size}\n" for path in _shards(self.paths[0]))
        return hashlib.sha256(found.encode()).hexdigest()[:16]

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
        """Endless batches, each device's of its share of the shards."""
        self.check(batch_size, lanes, world_size)
        rows = batch_size * len(share(lanes, rank, world_size)) // lanes
        batches = _Batches(self, _shards(self.paths[0]), rows, seed, first_step, rank, world_size)
        for step, batch in enumerate(self._loader(batches), first_step):
            if step not in skip:
                yield batch

    def first(self) -> dict[str, Any]:
        """The first sample of the first shard, as a batch of one."""
        return self.read("train", most=1)

    def _files(
        self, split: str, own: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[int, str, str, dict[str, bytes]]]:
        """Samples of a split; all are read."""
        folder = self.held_out if split == "held_out" else self.paths[0]
        if folder is None:
            raise ValueError("data.held_out=null: give the folder of these images, which evaluation needs")
        samples = enumerate(self.samples(_shards(folder)))
        return ((number, *found) for number, found in samples if own(number))

    def samples(self, paths: Sequence[Path]) -> Iterator[tuple[str, str, dict[str, bytes]]]:
        """The samples of shards, undecoded, in order: as messages name it, the key, the files."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for path in paths:
            try:
                with path.open("rb") as stream:  # opened here: webdataset would run a shell for some names
                    for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                        where, files = f"sample {sample['__key__']} of the shard {path}", {}
                        for name, extensions in self.decoder.files().items():
                            if not (there := [extension for extension in extensions if extension in sample]):
                                raise DataError(f"{where} has no {name} (.{' or .'.join(extensions)})")
                            files[name] = sample[there[0]]
                        yield where, sample["__key__"], files
            except DataError:
                raise
            except Exception as error:  # webdataset and tarfile raise many kinds
                raise DataError(f"the shard {path} cannot be read: {error}") from error


class _Batches(IterableDataset):
    """A worker's share of the batches of a device."""

    def __init__(
        self, data: WebDataset, shards: list[Path], rows: int, seed: int, first_step: int, rank: int, world_size: int
    ):
        self.data, self.shards, self.rows, self.seed, self.first_step = data, shards, rows, seed, first_step
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader, readers = self.rank * workers + worker, self.world_size * workers
        rng = random.Random(f"{self.seed} {self.first_step} {reader}")
        samples = self._shuffled(reader, readers, rng)
        while True:
            batch = []
            for where, key, files in itertools.islice(samples, self.rows):
                try:
                    augmentation = Augmentation(flip=self.data.flip and rng.random() < 0.5)
                    batch.append(self.data.decoder(key, files, augmentation))
                except DataError as error:
                    raise DataError(f"{where}: {error}") from error
            yield collate(batch)

    def _shuffled(self, reader: int, readers: int, rng: random.Random) -> Iterator[tuple[str, str, dict[str, bytes]]]:
        """Endless samples of a reader's share of the shards, shuffled anew in every pass."""
        from webdataset.filters import shuffle

        for epoch in itertools.count():
            order = permutation([self.seed, self.first_step, epoch], len(self.shards))
            own = [self.shards[i] for i in order[reader::readers]]
            samples = self.data.samples(own)
            some = False
            for sample in shuffle(self.data.shuffle_buffer, initial=self.data.shuffle_buffer, rng=rng)(samples):
                some = True
                yield sample
            if not some:
                raise DataError(f"there is no sample in {', '.join(map(str, own))}")


def _shards(folder: str) -> list[Path]:
    """The shards of a folder.

    Raises:
        ValueError: if there is none.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"the data folder {folder} does not exist: give the one that holds the .tar shards")
    if not (found := sorted(Path(folder).glob("*.tar"))):
        raise ValueError(f"{folder} holds no .tar shard")
    return found
