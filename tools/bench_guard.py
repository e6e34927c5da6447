"""`python tools/bench.py guard`: what watching over the gradients adds to a training step."""

import argparse
import statistics
from typing import Any

import torch
from bench_ema import stepping
from bench_machine import DEVICE, measured, ratio

from dit.train.guard import Guard


def guard(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; steps and the guard's part of them take turns.

    The norm of the gradient is no part of it: it is taken for metrics.jsonl in any case.
    """
    _, step = stepping(options)
    watching = Guard()
    norm, loss = torch.tensor(1.5, device=DEVICE), torch.tensor(0.5, device=DEVICE, requires_grad=True)
    keys = [str(i) for i in range(options.batch_size)]

    def watch() -> None:
        (loss * (1 + 0 * loss.detach())).backward()
        used = watching.allows("denoiser", norm)
        if not used.is_cuda:
            bool(used)
        watching.note(1, used, norm, loss, keys)
        list(watching.bad())

    for work in (step, watch):
        work()
    seconds: dict[str, list[float]] = {"step": [], "guard": []}
    for _ in range(options.repeats):
        seconds["step"].append(measured(step, options.steps))
        seconds["guard"].append(measured(watch, 100))
    print(f"a step: {1000 * statistics.median(seconds['step']):.1f} ms, {options.batch_size} images")
    share = ratio([100 * x for x in seconds["guard"]], seconds["step"])
    print(f"the guard: {1000 * statistics.median(seconds['guard']):.3f} ms, {share} % of a step (least - most)")
    return {"seconds": seconds}
