"""`python tools/bench.py wait`: for how long steps wait for latents of local shards, at the speed of a fast GPU."""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from bench_fixtures import latents

from dit.command.compose import compose
from dit.train.build import build

NUM_SHARDS = 64


def wait(options: argparse.Namespace) -> dict[str, Any]:
    """Encode random pictures, and read the latents as training does, with a sleep as long as a step."""
    step = options.batch_size / options.rate
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"data.path={latents(Path(folder), options.samples, NUM_SHARDS)}",
            f"data.num_workers={options.workers}",
        ]
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
    return {"waits": waits}
