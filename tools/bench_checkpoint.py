"""`python tools/bench.py checkpoint`: for how long a save holds training up, written beside it and not."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_machine import spread
from torch import Tensor, nn

from dit.command.compose import compose
from dit.train.build import Parts
from dit.train.checkpoint import Saver

MODEL = ["model=dit_b_2", "model.hidden_size=960"]  # 200 million parameters


def checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """Save the weights of a DiT, their average and the state of AdamW, now at once, now beside steps, in turns.

    What is beside the steps holds them up by the call, which copies; then by what they wait for locks, the
    interpreter's above all; and by the cores that it takes, if there are not enough: what all that makes the steps
    slower than steps before it. The first two are the stall.
    """
    network = Parts(compose("doctor", MODEL)).denoiser().network
    weights: dict[str, Tensor] = {name: p.detach() for name, p in network.named_parameters()}
    tensors = {
        "model": weights,
        "ema": {name: p.clone() for name, p in weights.items()},
        "optimizer": {f"{name}/{key}": p.clone() for name, p in weights.items() for key in ("exp_avg", "exp_avg_sq")},
    }
    number = sum(p.numel() for p in weights.values())
    size = sum(value.nbytes for values in tensors.values() for value in values.values())
    step = _step()
    alone: list[float] = []
    written: list[float] = []
    waits: dict[str, list[float]] = {name: [] for name in ("synchronous", "call", "stall", "slower")}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        synchronous = Saver(Path(folder) / "synchronous", keep=1, asynchronous=False)
        asynchronous = Saver(Path(folder) / "asynchronous", keep=1)
        for i in range(options.repeats + 1):
            os.sync()
            began = time.perf_counter()
            synchronous.save(i, tensors, {})
            waits["synchronous"].append(time.perf_counter() - began)
            os.sync()
            [seconds, blocked] = _steps(step, lambda done: done < options.steps)
            alone.append(seconds / options.steps)
            began = time.perf_counter()
            asynchronous.save(i, tensors, {})
            waits["call"].append(time.perf_counter() - began)
            number_of_steps = 0

            def on(done: int) -> bool:
                nonlocal number_of_steps
                number_of_steps = done
                return asynchronous.busy

            [seconds, locked] = _steps(step, on)
            asynchronous.wait()
            written.append(time.perf_counter() - began)
            lost = max(0.0, locked - blocked / options.steps * number_of_steps)
            waits["stall"].append(waits["call"][-1] + lost)
            waits["slower"].append(waits["call"][-1] + seconds - number_of_steps * alone[-1])
            if problem := synchronous.problem or asynchronous.problem:
                raise SystemExit(problem)
    print(
        f"{number:,} parameters, {size / 1e9:.2f} GB, {options.repeats} repeats, after a first that makes the buffers"
    )
    print(
        f"a step alone {1000 * statistics.median(alone):.1f} ms; written in {statistics.median(written):.1f} s beside"
    )
    print("\n| | s (least - most) | of the synchronous save (least - most) | first, s |\n|---|---|---|---|")
    rows = {
        "synchronous": "synchronous save",
        "call": "asynchronous: the call",
        "stall": "the call, and waiting for locks",
        "slower": "these, and cores",
    }
    for key, name in rows.items():
        seconds_of = waits[key]
        ratios = [a / b for a, b in zip(seconds_of[1:], waits["synchronous"][1:], strict=True)]
        print(f"| {name} | {spread(seconds_of[1:], '.2f')} | {spread(ratios, '.1%')} | {seconds_of[0]:.2f} |")
    return {"bytes": size, "seconds": waits, "step": alone, "written": written}


def _step() -> Callable[[], None]:
    """A small training step of many operations."""
    network = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.SiLU()) for _ in range(16)))
    x = torch.randn(64, 256)

    def step() -> None:
        network(x).square().mean().backward()
        network.zero_grad()

    return step


def _steps(step: Callable[[], None], on: Callable[[int], bool]) -> tuple[float, float]:
    """Steps for as long as asked: the seconds of all, and those in which this thread neither ran nor lacked a core."""
    done, began, before = 0, time.perf_counter(), _on_core()
    while on(done):
        step()
        done += 1
    seconds = time.perf_counter() - began
    return seconds, seconds - (_on_core() - before)


def _on_core() -> float:
    """The seconds for which this thread has run, or waited for a core to run on (Linux)."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return (int(ran) + int(waited)) / 1e9
