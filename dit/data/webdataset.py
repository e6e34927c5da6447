"""Images and what belongs to them, streamed from tar shards by the webdataset package."""

import functools
import hashlib
import io
import itertools
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dit.data import index
from dit.data.image import decode

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
FIELDS: dict[str, tuple[str, Callable[[bytes], Any]]] = {  # by name: the file's extension, and what it holds
    "label": ("cls", int),
    "caption": ("txt", lambda data: data.decode().strip()),
    "text": ("text.npy", lambda data: _embedding(data, 2)),
    "pooled": ("pooled.npy", lambda data: _embedding(data, 1)),
}


class DataError(RuntimeError):
    """A sample or shard that cannot be used, met while training."""

    exit_code = 3


class WebDataset:
    """Shards of images (`.png`, `.jpg`, `.jpeg`, `.webp`) and other files of the same name, the fields of a sample.

    The fields are `label` (`.cls`, a class in ASCII), `caption` (`.txt`), and embeddings of a text, `text`
    (`.text.npy`, (L, W)) and `pooled` (`.pooled.npy`, (W,)).

    Every epoch gives each sample once, in an order that follows from (seed, epoch) and the number of workers: shards
    are shuffled and shared out among the workers, and each worker shuffles samples in a buffer. A batch may join the
    end of an epoch to the beginning of the next.

    Limits: with a given number of workers the order is exact and can be continued at any step, but with another number
    it is another order, and going to the middle of an epoch reads (without decoding) what comes before it.

    Args:
        path: the folder of the training shards.
        image_size: height and width in pixels; other images are cropped and scaled to it.
        channels: 1 (grey) or 3 (RGB).
        num_classes: classes are 0..num_classes - 1.
        fields: what is read beside the image.
        held_out: a folder of shards that are kept from training, for evaluation.
        pack: makes the two folders where they are missing.
        flip: mirror half of the samples, keyed by (seed, epoch, sample).
        shuffle_buffer: samples among which a worker picks the next.
        num_workers: processes that read and decode; 0 for none beside the training process.

    Raises:
        ValueError: if channels are neither 1 nor 3, a number is too small, or there is no such field.
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
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels} must be 1 (grey) or 3 (RGB)")
        for name, value, least in [
            ("image_size", image_size, 1),
            ("num_classes", num_classes, 1),
            ("shuffle_buffer", shuffle_buffer, 1),
            ("num_workers", num_workers, 0),
        ]:
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        if unknown := set(fields) - FIELDS.keys():
            raise ValueError(f"data.fields={list(fields)}: there is no {unknown.pop()}; choose of {', '.join(FIELDS)}")
        self.path = Path(path)
        self.held_out = Path(held_out) if held_out else None
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.fields = tuple(fields)
        self.pack = pack
        self.flip = flip
        self.shuffle_buffer = shuffle_buffer
        self.num_workers = num_workers
        self._shards = functools.cache(index.read)  # shards are hashed once, not by everyone who asks

    def check(self) -> None:
        """Check the shards against their manifests; where they can be packed and are not there yet, nothing is done.

        Raises:
            ValueError: if a folder or a shard is missing or corrupt.
        """
        for folder in (self.path, self.held_out):
            if folder is not None and not (self.pack and not folder.exists()):
                self._shards(folder)

    def prepare(self) -> None:
        """Pack the shards where they are missing and can be packed."""
        if self.pack and self.held_out and not (self.path.exists() and self.held_out.exists()):
            self.pack(self.path, self.held_out)

    def fingerprint(self) -> str:
        """What tells these training shards from others."""
        shards = "".join(shard.sha256 for shard in self._shards(self.path))
        return hashlib.sha256(shards.encode()).hexdigest()[:16]

    def batches(self, batch_size: int, seed: int, first_step: int = 0) -> Generator[dict[str, Any], None, None]:
        """Endless batches from the given step on; closing the generator ends its workers.

        Yields:
            `image`, uint8 (B, C, H, W), `key`, an array of B names, and the fields: `label`, int64 (B,), the others
            arrays of B strings or arrays.
        """
        shards = self._shards(self.path)
        workers = max(1, self.num_workers)
        epoch, offset = divmod(first_step * batch_size, sum(shard.samples for shard in shards))
        rounds, skip = _locate(_shares(shards, seed, epoch, workers), batch_size, offset)
        loader = DataLoader(
            _Chunks(self, shards, seed, batch_size, epoch, rounds),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        return _rebatch(iter(loader), batch_size, skip)

    def read(self, folder: Path, most: int | None = None) -> dict[str, Any]:
        """All samples of a folder, or the first so many, in order, as one batch."""
        samples = _samples([folder / shard.name for shard in self._shards(folder)])
        return _collate([self.decode(sample) for sample in itertools.islice(samples, most)])

    def first(self) -> dict[str, Any]:
        """The first sample, as a batch of one.

        Raises:
            ValueError: if it cannot be read.
        """
        try:
            return self.read(self.path, most=1)
        except DataError as error:
            raise ValueError(str(error)) from error

    def decode(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample's `key`, `image` and fields.

        Raises:
            DataError: naming the shard and the sample, if a file is missing or cannot be read.
        """
        where = f"sample {sample['__key__']} of {sample['__url__']}"
        try:
            image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
            decoded = {"key": sample["__key__"], "image": decode(image, self.image_size, self.channels)}
            for name in self.fields:
                extension, read = FIELDS[name]
                decoded[name] = read(sample[extension])
        except StopIteration:
            raise DataError(f"{where} has no image; expected one of {IMAGE_EXTENSIONS}") from None
        except KeyError:
            member = f"{sample['__key__']}.{extension}"
            again = "; of an older version, delete the folder and it is packed again" if self.pack else ""
            raise DataError(f"{where} has no {name}: it needs {member}, or data.fields without it{again}") from None
        except Exception as error:  # Pillow raises many kinds
            raise DataError(f"{where} cannot be read: {error}") from error
        label = decoded.get("label", 0)
        if not 0 <= label < self.num_classes:
            raise DataError(f"{where} has the class {label}, but data.num_classes={self.num_classes}")
        return decoded


class _Chunks(IterableDataset):
    """A worker's share of every epoch in chunks of a batch's size; every worker gives as many chunks as the busiest."""

    def __init__(self, data: WebDataset, shards: list[index.Shard], seed: int, chunk: int, epoch: int, rounds: int):
        self.data, self.shards, self.seed, self.chunk, self.epoch, self.rounds = (
            data,
            shards,
            seed,
            chunk,
            epoch,
            rounds,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.rounds
        for epoch in itertools.count(self.epoch):
            shares = _shares(self.shards, self.seed, epoch, workers)
            samples = _samples([self.data.path / shard.name for shard in shares[worker]])
            samples = _shuffle(samples, self.data.shuffle_buffer, f"{self.seed} {epoch} {worker}")
            samples = itertools.islice(samples, first * self.chunk, None)
            left = max(0, sum(shard.samples for shard in shares[worker]) - first * self.chunk)
            for _ in range(first, _num_rounds(shares, self.chunk)):
                chunk = [self.data.decode(sample) for sample in itertools.islice(samples, self.chunk)]
                if len(chunk) != min(self.chunk, left):
                    names = ", ".join(shard.name for shard in shares[worker])
                    raise DataError(f"fewer samples than the manifest says in {self.data.path}, one of {names}")
                left -= len(chunk)
                if self.data.flip:
                    chunk = [{**s, "image": self._maybe_flip(s["image"], epoch, s["key"])} for s in chunk]
                yield _collate(chunk)
            first = 0

    def _maybe_flip(self, image: Tensor, epoch: int, key: str) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed} {epoch} {key}".encode(), digest_size=1).digest()
        return image.flip(-1) if digest[0] & 1 else image


def _shares(shards: list[index.Shard], seed: int, epoch: int, workers: int) -> list[list[index.Shard]]:
    """The shuffled shards of each worker in an epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    return [[shards[i] for i in order[worker::workers]] for worker in range(workers)]


def _num_rounds(shares: list[list[index.Shard]], chunk: int) -> int:
    """How many chunks each worker gives in an epoch."""
    return max(-(-sum(shard.samples for shard in share) // chunk) for share in shares)


def _locate(shares: list[list[index.Shard]], chunk: int, offset: int) -> tuple[int, int]:
    """(whole rounds, samples after them) that come before a sample of the epoch."""
    counts = [sum(shard.samples for shard in share) for share in shares]
    for rounds in range(_num_rounds(shares, chunk)):
        given = sum(min(chunk, max(0, count - rounds * chunk)) for count in counts)
        if offset < given:
            return rounds, offset
        offset -= given
    raise AssertionError("the offset lies beyond the epoch")


def _samples(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """The samples of shards, undecoded, in order."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for path in paths:
        try:
            with path.open("rb") as stream:  # opened here: webdataset would run a shell for some names
                yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        except Exception as error:  # webdataset and tarfile raise many kinds
            raise DataError(f"the shard {path} cannot be read: {error}") from error


def _shuffle(samples: Iterator[dict[str, Any]], buffer: int, key: str) -> Iterator[dict[str, Any]]:
    from webdataset.filters import shuffle

    return iter(shuffle(buffer, initial=buffer, rng=random.Random(key))(samples))


def _embedding(data: bytes, dimensions: int) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim != dimensions:
        raise ValueError(f"an embedding of shape {array.shape}, expected {dimensions} dimensions")
    return array  # a worker passes tensors on by a file descriptor each, of which there are not enough


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch: images and labels as tensors, the others as arrays of objects, which may differ in size."""
    batch: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        if name == "image":
            batch[name] = torch.stack(values)
        elif name == "label":
            batch[name] = torch.tensor(values)
        else:
            batch[name] = np.empty(len(values), dtype=object)
            for i, value in enumerate(values):
                batch[name][i] = value
    return batch


def _rebatch(chunks: Iterator[dict[str, Any]], batch_size: int, skip: int) -> Generator[dict[str, Any], None, None]:
    """Chunks of any size joined and cut into batches, less the first `skip` samples."""
    held: dict[str, Any] = {}
    for chunk in filter(None, chunks):
        held = {name: _joined(held[name], value) for name, value in chunk.items()} if held else chunk
        number = len(held["key"])
        held, skip = {name: value[skip:] for name, value in held.items()}, max(0, skip - number)
        while len(held["key"]) >= batch_size:
            yield {name: value[:batch_size] for name, value in held.items()}
            held = {name: value[batch_size:] for name, value in held.items()}


def _joined(a: Any, b: Any) -> Any:
    return torch.cat([a, b]) if isinstance(a, Tensor) else np.concatenate([a, b])


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process, but only the parent decides when to stop."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
