"""`python tools/bench.py wait`: for how long steps wait for latents of local shards, at the speed of a fast GPU."""

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from bench_sample import vae
from PIL import Image

from dit.command import encode
from dit.command.compose import compose
from dit.data.writer import write_shards
from dit.train.build import build

NUM_SHARDS = 64


def wait(options: argparse.Namespace) -> None:
    """Encode random pictures, and read the latents as training does, with a sleep as long as a step."""
    step = options.batch_size / options.rate
    with tempfile.TemporaryDirectory() as folder:
        words = [f"data.path={_encoded(Path(folder), options.samples)}", f"data.num_workers={options.workers}"]
        cfg = compose("train", ["experiment=imagenet256_dit_xl_2", "data=latents", *words])
        data = build(cfg.data)
        data.check(options.batch_size, NUM_SHARDS)
        waits = list[float]()
        with closing(data.batches(options.batch_size, 0, lanes=NUM_SHARDS)) as batches:
            next(batches)  # which starts the workers
            for _ in range(options.steps):
                began = time.perf_counter()
                next(batches)
                waits.append(time.perf_counter() - began)
                time.sleep(step)
    shares = [seconds / (seconds + step) for seconds in waits]
    share = sum(waits) / (sum(waits) + step * len(waits))
    print(
        f"{options.workers} workers on {len(os.sched_getaffinity(0))} cores, {options.rate:g} images/s, "
        f"{options.batch_size} a step of {1000 * step:.0f} ms: waits for data are {share:.2%} of the time "
        f"(median of steps {statistics.median(shares):.2%}, most {max(shares):.2%})"
    )
    asked = {name: value for name, value in vars(options).items() if name != "run"}
    print("\n" + json.dumps({"asked": asked, "waits": waits}))


def _encoded(folder: Path, number: int) -> Path:
    """Shards of latents, both of a picture and of its mirror image, as `dit encode` leaves them."""
    rng, files = np.random.default_rng(0), []
    for _ in range(16):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    pictures = ({"jpg": picture, "cls": b"1"} for picture in itertools.islice(itertools.cycle(files), number))
    write_shards(folder / "images", pictures, -(-number // NUM_SHARDS))
    vae(folder / "vae")
    words = ["data=shards", f"data.path={folder}/images", "data.image_size=256", "data.num_classes=1000"]
    words += ["latent=sd_vae", f"latent.name={folder}/vae", f"out={folder}/latents"]
    cfg: Any = compose("encode", words)
    with redirect_stdout(io.StringIO()):
        assert encode.main(cfg) == 0
    return folder / "latents"
