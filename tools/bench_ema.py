"""`python tools/bench.py ema`: what averaging the weights adds to a training step."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench_machine import DEVICE, autocast, measured, ratio
from bench_peers import diffusers_average, published_average
from torch import nn

from dit.command.compose import compose
from dit.train.build import Parts, build
from dit.weights.ema import EMA, power


def ema(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; a step and each way to average take turns."""
    network, step = stepping(options)
    number = sum(p.numel() for p in network.parameters())
    print(f"{number / 1e6:.1f} M parameters in {len(list(network.parameters()))} tensors, {options.batch_size} images")
    ways = {"ours, one average": _ours(network, 1), "ours, two": _ours(network, 2)}
    if "published" in options.against:
        ways["published recipe, tensor by tensor"] = published_average(network)
    if "diffusers" in options.against:
        ways["diffusers' EMAModel"] = diffusers_average(network)
    for work in (step, *ways.values()):  # warm
        work()
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *ways)}
    for _ in range(options.repeats):
        seconds["step"].append(measured(step, options.steps))
        for name, work in ways.items():
            seconds[name].append(measured(work, 5 * options.steps))
    print(f"a step: {1000 * statistics.median(seconds['step']):.1f} ms")
    base = list(ways)[2 if options.against else 0]
    print(f"\n| | ms | share of a step (least - most) | over {base} |\n|---|---|---|---|")
    for name in ways:
        share = ratio([100 * x for x in seconds[name]], seconds["step"])
        print(f"| {name} | {1000 * statistics.median(seconds[name]):.1f} | {share} % | ", end="")
        print(f"{ratio(seconds[name], seconds[base])} |")
    return {"seconds": seconds}


def stepping(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """A network on the device, and a training step of it."""
    parts = Parts(compose("doctor", options.overrides))
    torch.manual_seed(0)
    network = parts.denoiser().network.to(DEVICE)
    optimizer = build(parts.cfg.optimizer)([p for p in network.parameters() if p.requires_grad])
    x = torch.randn(options.batch_size, parts.cfg.latent.channels, *(parts.cfg.latent.size,) * 2, device=DEVICE)
    t, label = (
        torch.randint(most, (options.batch_size,), device=DEVICE) for most in (1000, parts.cfg.data.num_classes)
    )

    def step() -> None:
        with autocast():
            loss = network(x, t, label).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return network, step


def _ours(network: nn.Module, number: int) -> Callable[[], None]:
    average = EMA(dict(network.named_parameters()), {f"ema_{i}": power(0.1) for i in range(number)})
    return lambda: average.update(1000)
