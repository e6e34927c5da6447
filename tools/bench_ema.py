"""`python tools/bench.py ema`: what averaging the weights adds to a training step, by foreach and tensor by tensor."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from dit.command.compose import compose
from dit.train.build import Parts, build
from dit.weights.ema import EMA, power

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAIVE = "tensor by tensor"


def ema(options: argparse.Namespace) -> None:
    """Measure and print; a step and each way to average take turns."""
    network, step = stepping(options)
    number = sum(p.numel() for p in network.parameters())
    print(f"{number / 1e6:.1f} M parameters in {len(list(network.parameters()))} tensors, {options.batch_size} images")
    ways = {"ours, one average": _ours(network, 1), "ours, two": _ours(network, 2), NAIVE: _naive(network)}
    for work in (step, *ways.values()):  # warm
        work()
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *ways)}
    for _ in range(options.repeats):
        seconds["step"].append(measured(step, options.steps))
        for name, work in ways.items():
            seconds[name].append(measured(work, 5 * options.steps))
    print(f"a step: {1000 * statistics.median(seconds['step']):.1f} ms, float32" + (", bf16 autocast" if GPU else ""))
    print(f"\n| | ms | share of a step (least - most) | over {NAIVE} |\n|---|---|---|---|")
    for name in ways:
        share = ratio([100 * x for x in seconds[name]], seconds["step"])
        print(f"| {name} | {1000 * statistics.median(seconds[name]):.1f} | {share} % | ", end="")
        print(f"{ratio(seconds[name], seconds[NAIVE])} |")
    print("\n" + json.dumps({"asked": {k: v for k, v in vars(options).items() if k != "run"}, **seconds}))


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
        with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
            loss = network(x, t, label).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return network, step


def ratio(a: list[float], b: list[float]) -> str:
    """Of repeats that took turns: the median, and its spread."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def _ours(network: nn.Module, number: int) -> Callable[[], None]:
    average = EMA(dict(network.named_parameters()), {f"ema_{i}": power(0.1) for i in range(number)})
    return lambda: average.update(1000)


def _naive(network: nn.Module) -> Callable[[], None]:
    """As training scripts have it."""
    averages = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update() -> None:
        for name, p in network.named_parameters():
            averages[name].mul_(0.999).add_(p.data, alpha=1 - 0.999)

    return update


def measured(work: Callable[[], None], times: int) -> float:
    """Seconds of one: of the process's CPU time, or of the GPU."""
    clock = time.perf_counter if GPU else time.process_time
    began = clock()
    for _ in range(times):
        work()
    if GPU:
        torch.cuda.synchronize()
    return (clock() - began) / times
