"""Indexed tar shards as endless batches whose order is a pure function, and that go on at any step."""

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dit.data import index
from dit.data.order import WINDOW, Order, Resampled, Shuffled, share, uniform
from dit.data.sample import FLIPPED, IMAGE_EXTENSIONS, Augmentation, BadSample, Decoder, collate
from dit.data.shards import Shards, Wanted
from dit.data.source import Source
from dit.data.store import DataError, Store

CROPS = ("centre", "random")
ORDERS = ("shuffled", "resampled")
MAX_IN_A_ROW = 100  # bad samples
LISTED = 20
AUGMENTATION = 4  # the purpose of random numbers, other than those of the order


class Stream(Source):
    """Shards of images (`.png`, `.jpg`, `.jpeg`, `.webp`) and other files of the same name, the fields of a sample.

    The fields are `label` (`.cls`, a class in ASCII), `caption` (`.txt`), and embeddings of a text, `text`
    (`.text.npy`, (L, W)) and `pooled` (`.pooled.npy`, (W,)). Encoded shards have `.latent.npy` in place of images, and
    those of pairs `noise` (`.noise.npy`, (c, h, w)), which leads to it.

    The samples of a step, their order, crops and flips follow from (seed, step, lane) alone (`order.py`): they are the
    same with any number of workers and devices, and going on at a step is arithmetic and a seek. A sample that cannot
    be used is replaced by the one after it in its window, named and counted; too many end the run.

    Args:
        path: the folder of the training shards, a path or a URL (s3, gs, https, hf), or several.
        image_size: height and width in pixels; other images are cropped and scaled to it.
        channels: 1 (grey) or 3 (RGB).
        num_classes: classes are 0..num_classes - 1.
        fields: what is read beside the image.
        held_out: a folder of shards that are kept from training, for evaluation.
        pack: makes both folders where they are missing.
        encoded: the training shards hold what a VAE has made of the images, by `dit encode`.
        images: the folder of the training images, for evaluation, where the training shards are encoded.
        crop: `centre`, or `random`, the square that is cut from an image.
        flip: mirror half of the samples.
        order: `shuffled`, every epoch each sample once, or `resampled`, with replacement.
        weights: of several folders that are resampled; None: each as much as it has samples.
        window: shards among which a lane shuffles its samples.
        index: the folder of the index, or several, if it does not lie beside the shards.
        cache: where shards of a URL are kept; None: ~/.cache/dit.
        cache_gb: how much of them, in 10^9 bytes.
        max_bad: the share of the samples that may be bad; more of them, beyond chance, or 100 in a row, end the run.
        num_workers: processes that read and decode; 0 for none beside the training process.

    Raises:
        ValueError: if a value is out of range, or two do not fit together.
        ImportError: if what a URL needs is missing.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        image_size: int,
        channels: int,
        num_classes: int,
        fields: Sequence[str] = ("label",),
        held_out: str | None = None,
        pack: Callable[[Path, Path], None] | None = None,
        encoded: bool = False,
        images: str | None = None,
        crop: str = "centre",
        flip: bool = False,
        order: str = "shuffled",
        weights: Sequence[float] | None = None,
        window: int = WINDOW,
        index: str | Sequence[str] | None = None,
        cache: str | None = None,
        cache_gb: float = 50.0,
        max_bad: float = 0.001,
        num_workers: int = 0,
    ):
        paths, indices = _folders("path", path), _folders("index", index) if index is not None else None
        for name, folder in {"held_out": held_out, "images": images}.items():
            if folder is not None:
                _folders(name, folder)
        super().__init__(
            Decoder(image_size, channels, num_classes, fields, encoded), paths, held_out, pack, num_workers
        )
        for name, value, choices in [("crop", crop, CROPS), ("order", order, ORDERS)]:
            if value not in choices:
                raise ValueError(f"data.{name}={value}: choose one of {', '.join(choices)}")
        if weights and (order != "resampled" or len(weights) != len(paths)):
            raise ValueError(
                f"data.weights={list(weights)} goes with data.order=resampled and one number for each folder of "
                f"data.path={paths}"
            )
        if encoded and crop == "random":
            raise ValueError(
                "data.crop=random, but encoded shards are cropped already (data.encoded=true): take data.crop=centre"
            )
        if flip and "noise" in fields:
            raise ValueError("data.flip=true, but the noise of a pair leads to its image as it is: data.flip=false")
        if len(set(paths)) < len(paths):
            raise ValueError(f"data.path={paths} names a folder twice: take data.order=resampled and data.weights")
        if max_bad > 1:
            raise ValueError(f"data.max_bad={max_bad} is a share: give at most 1")
        for name, number, least in [("window", window, 1), ("max_bad", max_bad, 0)]:
            if number < least:
                raise ValueError(f"data.{name}={number} must be at least {least}")
        self.images = images
        self.random_crop = crop == "random"
        self.flip = flip
        self.order = order
        self.weights = weights
        self.window = window
        self.max_bad = max_bad
        self.shards = Shards(paths, indices, cache, int(cache_gb * 1e9))
        self._others: dict[str, Shards] = {}  # by their split

    def check(self, batch_size: int = 1, lanes: int = 1, world_size: int = 1) -> None:
        """Check the shards against their index, and that every sample has all that is read of it."""
        if not self.there:
            return
        for store in self.shards.stores:
            if self.decoder.encoded and not store.remote and not Path(store.folder).exists():
                pairs = "run=<a teacher> num_images=<how many>"
                source = pairs if "noise" in self.decoder.fields else "data=<shards of images> latent=<a VAE>"
                raise ValueError(
                    f"data.path={store.folder} does not exist: dit encode {source} out={store.folder} writes it"
                )
        self.ordered(batch_size, 0, lanes)
        share(lanes, 0, world_size)
        self._check_cache(lanes)
        again = "; of an older version, delete the folder and it is packed again" if self._pack else ""
        told = ("latent", "text", "pairs")
        abouts = [{k: v for k, v in found.about.items() if k in told} for found in self.shards.indices]
        if any(about != abouts[0] for about in abouts):
            raise ValueError(f"the shards of data.path={self.paths} were encoded differently: {abouts}")
        self.about = abouts[0]
        if self.decoder.encoded and "latent" not in self.about:
            raise ValueError(f"data.path={self.paths[0]} holds images, not latents: take data.encoded=false")
        if "latent" in self.about and not self.decoder.encoded:
            raise ValueError(f"data.path={self.paths[0]} holds latents: take data=latents, or the folder of the images")
        for place, found in zip(self.shards.places, self.shards.indices, strict=True):
            for flip in {False, self.flip and self.decoder.encoded}:
                check_files(place, found.shards, self.decoder.files(flip), again)
        self.decoder.latent_shape = tuple(self.about["latent"]["shape"]) if self.decoder.encoded else None
        if self.held_out:
            held_out, wanted = self._of("held_out"), self.decoder.of_images().files()
            if not self.has_images("held_out"):
                wanted.pop("image")
            check_files(held_out.places[0], held_out.all, wanted, again)

    def _check_cache(self, lanes: int) -> None:
        """See whether what is read at a time fits into the cache."""
        largest = max(shard.bytes for shard in self.shards.all)
        needed, there = 2 * lanes * self.window * largest, self.shards.stores[0].cache_bytes
        if any(store.remote for store in self.shards.stores) and there < needed:
            raise ValueError(
                f"data.cache_gb={there / 1e9:g} is too little for {lanes} lanes, each with a window of {self.window} "
                f"shards and the next one, of up to {largest / 1e9:.3g} GB a shard: give data.cache_gb="
                f"{needed / 1e9:.3g}, or a smaller data.window"
            )

    def fingerprint(self) -> str:
        """What tells these training samples from others."""
        return "+".join(found.fingerprint for found in self.shards.indices)

    def fingerprint_of_images(self, split: str) -> str:
        """That of the shards of images of a split."""
        return "+".join(found.fingerprint for found in self._of(split).indices)

    def count(self, split: str) -> int:
        """The number of samples of a split."""
        return self._of(split).total

    def first(self) -> dict[str, Any]:
        """The first training sample that can be used, as a batch of one."""
        wanted = self.decoder.files()
        for sample in range(min(MAX_IN_A_ROW, self.shards.all[0].samples)):
            try:
                files = self.shards.files(0, sample, wanted)
                return collate([self.decoder(self.shards.key(0, sample), files, Augmentation())])
            except BadSample as error:
                reason = f"{self.shards.where(0, sample)}: {error}"
        raise ValueError(f"none of the first samples can be used, the last being {reason}")

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
        """Endless batches from the given step on, see `Source.batches`."""
        own = share(lanes, rank, world_size)
        self.shards.keep = 2 * len(own) * (self.window + 1)
        steps = _Steps(self, self.ordered(batch_size, seed, lanes), own)
        return self._watched(iter(self._loader(steps, (step for step in count(first_step) if step not in skip))))

    def ordered(self, batch_size: int, seed: int, lanes: int) -> Order:
        """Which sample when."""
        counts = [shard.samples for shard in self.shards.all]
        options: dict[str, Any] = {"seed": seed, "lanes": lanes, "batch_size": batch_size, "window": self.window}
        if self.order == "shuffled":
            return Shuffled(counts, **options)
        weights = self.weights or np.bincount(self.shards.sources, counts).tolist()
        return Resampled(counts, self.shards.sources, weights, **options)

    def _watched(self, batches: Iterator[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
        """Batches, whose bad samples are named and counted.

        Raises:
            DataError: with a list of them, if there are too many.
        """
        seen = replaced = 0
        bad: dict[str, str] = {}
        for batch in batches:
            if "error" in batch:
                raise DataError(batch["error"])
            for where, reason in batch.pop("bad"):
                replaced += 1
                if where not in bad:
                    bad[where] = reason
                    print(f"dit: WARNING: {where}: {reason}; replaced by the next, {len(bad)} so far", flush=True)
            seen += len(batch["key"])
            allowed = self.max_bad * seen
            self.replaced = replaced
            if replaced > allowed + 3 * math.sqrt(allowed) + 3:  # more than chance makes of the share
                raise DataError(
                    f"too many samples cannot be used, {replaced:,} of {seen:,} that were read since this start, more "
                    f"than data.max_bad={self.max_bad} allows: mend them, leave them out by dit pack, or raise it"
                    + _listed(bad.items())
                )
            yield batch

    def has_images(self, split: str) -> bool:
        """Whether there are images of a split, which those of encoded shards may lack."""
        return any(set(IMAGE_EXTENSIONS) & shard.files.keys() for shard in self._of(split).all)

    def _of(self, split: str) -> Shards:
        """The shards of a split, of images if there are some."""
        folder = self.held_out if split == "held_out" else self.images
        if folder is None and split == "held_out":
            raise ValueError("data.held_out=null: give the folder of these images, which evaluation needs")
        if folder is None:
            return self.shards
        if split not in self._others:
            store = self.shards.stores[0]
            self._others[split] = Shards([folder], None, store.cache, store.cache_bytes)
        return self._others[split]

    def _files(
        self, split: str, own: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[int, str, str, dict[str, bytes]]]:
        """The number, the shard, the key and the files of samples of a split; of others nothing is read."""
        shards, wanted = self._of(split), self.decoder.of_images().files()
        if not self.has_images(split):
            wanted.pop("image")
        places = ((shard, sample) for shard, found in enumerate(shards.all) for sample in range(found.samples))
        for number, place in enumerate(places):
            if own(number):
                yield number, shards.where(*place), shards.key(*place), shards.files(*place, wanted)


def check_files(place: Store, shards: Sequence[index.Shard], wanted: Wanted, again: str) -> None:
    """See whether every sample has all files that are wanted of it.

    Raises:
        ValueError: naming the first sample that has not, with the way out.
    """
    for name, extensions in wanted.items():
        leave = f"leave such samples out by dit index path={place.folder} lenient=true"
        way_out = f": give data.fields without {name}, or {leave} 'fields=[{name}]'{again}"
        if extensions == (FLIPPED,):
            way_out = ": encode again with data.flip=true, or take data.flip=false"
        elif name in ("image", "latent"):
            way_out = f": {leave}"
        index.check_files(place, shards, extensions, name, way_out)


def _folders(name: str, value: Any) -> list[str]:
    """One or several folders.

    Raises:
        ValueError: if they are none.
    """
    folders = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise ValueError(f"data.{name}={'null' if value is None else value}: give a folder, a URL, or a list of them")
    return folders


class _Steps(Dataset):
    """A device's share of the batch of any step."""

    def __init__(self, stream: Stream, order: Order, lanes: range):
        self.stream, self.order, self.lanes = stream, order, lanes
        self.remote = any(store.remote for store in stream.shards.stores)
        self.wanted = {flip: stream.decoder.files(flip) for flip in (False, True)}

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Batch, with `bad`, what was replaced and why; or `error`, as a worker's own would come with its traceback."""
        try:
            return self._batch(step)
        except (DataError, ValueError) as error:
            return {"error": str(error)}

    def _batch(self, step: int) -> dict[str, Any]:
        samples: list[dict[str, Any]] = []
        bad: list[tuple[str, str]] = []
        for lane in self.lanes:
            if self.remote:
                for shard in self.order.coming(step, lane):
                    self.stream.shards.prefetch(shard)
            chance = uniform([AUGMENTATION, self.order.seed, step, lane], self.order.rows, 3)
            for row, place in enumerate(zip(*(part.tolist() for part in self.order.at(step, lane)), strict=True)):
                samples.append(self._sample(step, lane, row, place, chance[row].tolist(), bad))
        return {**collate(samples), "bad": bad}

    def _sample(
        self, step: int, lane: int, row: int, place: tuple[int, int], chance: list[float], bad: list[tuple[str, str]]
    ) -> dict[str, Any]:
        """The sample at a place, or the first after it that can be used."""
        stream = self.stream
        flip = stream.flip and chance[0] < 0.5
        middle = (0.5, 0.5)
        augmentation = Augmentation((chance[1], chance[2]) if stream.random_crop else middle, flip)
        for shard, sample in islice(chain([place], self.order.instead(step, lane, row)), MAX_IN_A_ROW):
            try:
                files = stream.shards.files(shard, sample, self.wanted[flip])
                return stream.decoder(stream.shards.key(shard, sample), files, augmentation)
            except BadSample as error:
                bad.append((stream.shards.where(shard, sample), str(error)))
        raise DataError(f"{MAX_IN_A_ROW} samples in a row cannot be used:" + _listed(bad[-MAX_IN_A_ROW:]))


def _listed(bad: Iterable[tuple[str, str]]) -> str:
    """Bad samples, a line each."""
    lines = [f"\n  {where}: {reason}" for where, reason in bad]
    return "".join(lines[:LISTED]) + (f"\n  and {len(lines) - LISTED} more" if len(lines) > LISTED else "")
