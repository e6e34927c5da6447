"""`python tools/bench.py goodput`: what is left of a run's time when faults befall it."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit.train import attempts
from dit.train.goodput import skipped_steps, split

FAULTS = (signal.SIGKILL, signal.SIGTERM)  # in turn: a machine lost, a preemption


def goodput(options: argparse.Namespace) -> dict[str, Any]:
    """Train the digits for so many minutes with faults at even times, starting again at once, and print the report."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = [
            "experiment=digits",
            "run=goodput",
            f"runs_dir={folder}",
            "metric=none",
            "learning_rate=constant",  # which does not ask how long the run is
            "logger=none",
            "trainer.checkpoint_every_steps=100",  # which holds training up by a thousandth
            "data.num_workers=2",
            *options.overrides,
        ]
        began, steps, ended = time.time(), 10**9, list[int]()
        for i in range(options.faults):
            until = began + 60 * options.minutes * (i + 1) / (options.faults + 1)
            ended.append(_trained([*recipe, f"trainer.max_steps={steps}"], until, FAULTS[i % len(FAULTS)]))
        run = Path(folder) / "goodput"
        last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
        left = began + 60 * options.minutes - time.time()
        steps = last["step"] + round(left * last["images_per_second"] * last["step"] / last["images"])
        ended.append(_trained([*recipe, f"trainer.max_steps={steps}"]))
        print(f"{(time.time() - began) / 60:.1f} minutes; the starts ended with {ended}\n", flush=True)
        subprocess.run([*_dit("doctor"), "run=goodput", f"runs_dir={folder}"], check=True)
        return {"ended": ended, "seconds": split(attempts.read(run), skipped_steps(run))}


def _dit(verb: str) -> list[str]:
    return [sys.executable, "-m", "dit", verb]


def _trained(overrides: Sequence[str], until: float | None = None, signum: int = 0) -> int:
    """The exit code of a start, to which the whole group of its processes gets a signal at some time."""
    process = subprocess.Popen([*_dit("train"), *overrides], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(None if until is None else max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signum)
        return process.wait()
