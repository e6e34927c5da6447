"""`python tools/bench.py communication`: what processes of one machine send each other in a step, and for how long.

On GPUs the time is that of NCCL's kernels, which may run while others compute; on a CPU that of gloo's operations, in
which waiting for the other processes counts. Bytes are those that `trainer.dry_run` predicts. The rate is what
tools/scaling.py takes as --inside-gb.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from bench_machine import GPU, autocast, spread
from bench_ranks import ranks
from torch.profiler import ProfilerActivity, profile

from dit.command.compose import compose
from dit.train.build import Parts, build
from dit.train.cost import inputs_of
from dit.train.devices import strategy_of
from dit.train.layout import Layout
from dit.train.plan import Planner
from dit.train.strategy import by_layout
from dit.train.world import World

WAYS = {
    "ddp": ["trainer.strategy=ddp"],
    "fsdp": ["trainer.strategy=fsdp"],
    "fsdp, kept": ["trainer.strategy=fsdp", "trainer.reshard_after_forward=false"],
}
WARM = 2  # steps


def communication(options: argparse.Namespace) -> dict[str, Any]:
    """Measure steps of each strategy, and print what of them is communication."""
    precision = "bf16-mixed" if GPU else "32-true"
    print("| | step, ms | communication, ms | of a step | GB sent, predicted | GB/s |\n|---|---|---|---|---|---|")
    found = {}
    for name, words in WAYS.items():
        overrides = [*options.overrides, *words, f"trainer.precision={precision}"]
        steps = (options.batch_size, options.repeats)
        each = ranks(options.processes, steps_of, overrides, *steps, gpus=GPU)
        planner = Planner(Parts(compose("doctor", overrides)))
        layout = Layout(name.partition(",")[0], 1, options.processes)
        sent = sum(traffic.inside for traffic in planner(layout, options.processes * options.batch_size).traffic)
        slowest = max(each, key=lambda rank: statistics.median(rank["step"]))
        step, spent = slowest["step"], min(rank["communication"] for rank in each)  # who came last did not wait
        cells = [spread([1000 * seconds for seconds in step], ".1f"), f"{1000 * spent:.1f}"]
        cells += [f"{spent / statistics.median(step):.1%}", f"{sent / 1e9:.3f}", f"{sent / spent / 1e9:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        found[name] = {"ranks": each, "sent": sent}
    return {"ways": found}


def steps_of(overrides: list[str], batch_size: int, repeats: int) -> dict[str, Any]:
    """The seconds of this rank's steps, and those a step in which there was communication."""
    cfg = compose("doctor", [*overrides, f"trainer.accelerator={'gpu' if GPU else 'cpu'}"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")
    parts = Parts(cfg)
    strategy = strategy_of(cfg.trainer)(cfg.trainer, World(), device)
    denoiser = parts.denoiser("meta")
    network = strategy.begin(denoiser, None, seed=0)
    optimizer = build(cfg.optimizer)(by_layout(list(network.parameters())))
    strategy.start(denoiser, {"denoiser": optimizer}, micro_batches=1, max_norm=None)
    (x, times), cond = inputs_of(parts, batch_size, str(device))
    x, times, cond = x.normal_(), times.uniform_(), {name: value.zero_() for name, value in cond.items()}
    yes = torch.ones((), dtype=torch.bool, device=device)

    def step() -> float:
        _together()
        began = time.perf_counter()
        with autocast():
            loss = network(x, times, **cond).float().square().mean()
        strategy.backward(loss)
        strategy.step("denoiser", lambda *_: yes)
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(WARM):
        step()
    seconds = [step() for _ in range(repeats)]
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]) as seen:
        for _ in range(repeats):
            step()
    spent = sum(
        event.self_device_time_total if GPU else event.cpu_time_total
        for event in seen.key_averages()
        if ("nccl" in event.key.lower() and event.self_device_time_total > 0 if GPU else event.key.startswith("gloo:"))
    )
    return {"step": seconds, "communication": spent / 1e6 / repeats}


def _together() -> None:
    """Wait for all, so that no rank waits within a step for one that has not begun; not counted."""
    if GPU:
        torch.cuda.synchronize()
    dist.barrier()
