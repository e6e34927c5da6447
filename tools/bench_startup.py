"""`python tools/bench.py startup`: how long commands take to begin, beside what they cannot do without."""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from bench_machine import spread

MISTAKE = "optimizer.lr=-1"
DIT = (sys.executable, "-m", "dit")
FLOOR = "import torch, lightning"
TRAIN = (
    "train",
    "experiment=digits",
    "run=startup",
    "metric=none",
    "logger=none",
    "trainer.max_steps=1",
    "learning_rate=constant",
)


def startup(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; the commands take turns."""
    with tempfile.TemporaryDirectory() as folder:
        train = [*DIT, *TRAIN, f"runs_dir={folder}/{{}}", f"data_dir={folder}/data"]
        ways: dict[str, Sequence[str]] = {
            "python -c pass": [sys.executable, "-c", "pass"],
            FLOOR: [sys.executable, "-c", "import torch, lightning.pytorch"],
            "dit --help": [*DIT, "--help"],
            "dit train --help": [*DIT, "train", "--help"],
            "dit train experiment=digits --cfg job": [*DIT, "train", "experiment=digits", "--cfg", "job"],
            "a mistake in the configuration": [*DIT, "train", "experiment=digits", MISTAKE],
            "dit train experiment=digits, one step and its end": train,
        }
        first: list[float] = []
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        _taken([word.format("warm") for word in train])  # packs the digits, too
        for number in range(options.repeats):
            for name, command in ways.items():
                wall, cpu, said = _taken([word.format(number) for word in command])
                seconds[name].append((wall, cpu))
                first += [float(found) for found in re.findall(r"first step after ([\d.]+) s", said)]
    print("| command | seconds (least - most) | CPU seconds |\n|---|---|---|")
    for name, found in seconds.items():
        walls, cpus = zip(*found, strict=True)
        print(f"| `{name}` | {spread(walls)} | {statistics.median(cpus):.2f} |")
    print(f"\nthe first step of training ended after {spread(first)} s")
    return {"seconds": seconds, "first_step": first}


def _taken(command: Sequence[str]) -> tuple[float, float, str]:
    """Seconds, CPU seconds, and what was said."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (2 if MISTAKE in command else 0), done.stderr
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout
