"""`python tools/bench.py data`: samples a second beside the webdataset package's reader, and going on at a step."""

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_machine import ratio
from PIL import Image

from dit.data import index
from dit.data.image import decode, encode_png
from dit.data.order import Shuffled
from dit.data.shards import Shards
from dit.data.stream import Stream
from dit.data.writer import write_shards

WANTED = {"image": ("jpg",), "label": ("cls",)}
LANES, BATCH = 8, 256


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; everything is in the page cache, and one process reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        _pack(path / "shards", options.samples, options.samples // 16)
        size = sum(shard.bytes for shard in index.read(path / "shards").shards) / options.samples
        print(
            f"{options.samples:,} samples of {size / 1000:.1f} kB in 16 shards, one process, {options.repeats} repeats"
        )
        print("\n| | reader | samples/s | ours over it (least - most) |\n|---|---|---|---|")
        results = {}
        for name, work in {"files alone": None, "decoded and cropped to 256 px": _decoded}.items():
            results[name] = _compared(name, path / "shards", work, options)
        resumed = _resumed(path, options)
    return {"rates": results, "seconds": resumed}


def _pack(folder: Path, number: int, samples_per_shard: int) -> None:
    """Smooth pictures of 500 x 375 pixels, as photographs are, in JPEG files of about 20 kB."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(0, 255, (10, 14, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    write_shards(folder, ({"jpg": files[i % 64], "cls": b"1"} for i in range(number)), samples_per_shard)


def _decoded(sample: dict[str, bytes]) -> torch.Tensor:
    return decode(sample["image"], 256, 3)


def _ours(folder: Path) -> Iterator[dict[str, bytes]]:
    """Every sample of an epoch, shuffled."""
    shards = Shards([str(folder)])
    order = Shuffled([shard.samples for shard in shards.all], seed=0, lanes=LANES, batch_size=BATCH)
    for step in itertools.count():
        for lane in range(LANES):
            for shard, sample in zip(*(part.tolist() for part in order.at(step, lane)), strict=True):
                shards.key(shard, sample)
                yield shards.files(shard, sample, WANTED)


def _theirs(folder: Path) -> Iterator[dict[str, bytes]]:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000):
        yield {"image": sample["jpg"], "label": sample["cls"]}


def _compared(
    name: str, folder: Path, work: Callable[[dict[str, bytes]], object] | None, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Samples a second of each reader, one after the other, and again."""
    number = options.samples if work is None else options.samples // 8
    readers = {"ours": _ours} | ({"webdataset": _theirs} if options.against else {})
    rates: dict[str, list[float]] = {reader: [] for reader in readers}
    for repeat in range(options.repeats + 1):
        for reader, samples in readers.items():
            began = time.process_time()
            for sample in itertools.islice(samples(folder), number):
                if work is not None:
                    work(sample)
            if repeat:  # the first warms the page cache
                rates[reader].append(number / (time.process_time() - began))
    for reader, found in rates.items():
        print(f"| {name} | {reader} | {statistics.median(found):,.0f} | {ratio(rates['ours'], found)} |", flush=True)
    return rates


def _resumed(path: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds from nothing to the first batch, in a million samples, at several positions."""
    one, many = path / "one", path / "many"
    tiny = encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8))
    write_shards(one, ({"png": tiny, "cls": b"1"} for _ in range(1000)), 1000)
    many.mkdir()
    [shard] = index.read(one).shards
    shards = []
    for number in range(1000):  # a thousand names of the same file
        os.link(one / shard.name, many / f"{number:04d}.tar")
        os.link(one / "000000.index.npz", many / f"{number:04d}.index.npz")
        shards.append(shard._replace(name=f"{number:04d}.tar"))
    index.commit(many, shards, {})
    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for position in (10**3, 10**6, 10**9):
            began = time.process_time()
            stream = Stream(str(many), 8, 1, 2)
            assert len(next(stream.batches(200, 0, position // 200, lanes=LANES))["key"]) == 200
            seconds.setdefault(f"{position:,}", []).append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print("\n| going on after so many of 1,000,000 samples | ms to the first batch of 200 | ratio |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.1f} | {median / first:.2f} |")
    state = json.dumps({"step": 10**9 // 200, "data": stream.fingerprint()})  # which a checkpoint's manifest has
    print(f"\nstate: {len(state)} bytes, {state}")
    return {f"resumed at {name}": values for name, values in seconds.items()}
