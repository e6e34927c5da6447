"""`python tools/bench.py memory`: bytes of a rank under FSDP2, beside those of one process and those predicted.

Read from torch, after real steps on the CPU: the storages of local tensors, and what is alive between forward and
backward. The memory of the process is not looked at, since allocators and libraries have a part in it.
"""

import argparse
import gc
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from bench_ranks import ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dit.command.compose import compose
from dit.train.build import Parts, build
from dit.train.cost import Alive, inputs_of
from dit.train.devices import strategy_of
from dit.train.layout import Layout
from dit.train.plan import Planner
from dit.train.strategy import by_layout
from dit.train.world import World

STATES = ("parameters", "gradients", "optimizer", "ema")
MOST = 0.30  # of the single process's, on 4 ranks
TOLERANCE = 0.10  # of the prediction


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one process and several; print both beside the prediction."""
    overrides = [*options.overrides, "trainer.precision=32-true"]
    began = time.perf_counter()
    [single] = ranks(1, bytes_of_a_step, overrides, options.batch_size)
    each = ranks(options.processes, bytes_of_a_step, overrides, options.batch_size)
    seconds = time.perf_counter() - began
    most = {part: max(rank[part] for rank in each) for part in single}
    planner = Planner(Parts(compose("doctor", overrides)))
    world = options.processes
    plan = planner(Layout("fsdp", 1, world), world * options.batch_size).memory._asdict()
    alone = planner(Layout(), options.batch_size).memory._asdict()
    print(f"{' '.join(overrides)}: FSDP2 on {world} processes, {options.batch_size} images each, {seconds:.0f} s\n")
    print("| MiB | one process | predicted | off | largest rank | predicted | off | rank over one process |")
    print("|---" * 8 + "|")
    for part in single:
        one, several = single[part], most[part]
        cells = [f"{one / 2**20:,.1f}", f"{alone[part] / 2**20:,.1f}", f"{alone[part] / one - 1:+.2%}"]
        cells += [f"{several / 2**20:,.1f}", f"{plan[part] / 2**20:,.1f}", f"{plan[part] / several - 1:+.2%}"]
        print(f"| {part} | " + " | ".join([*cells, f"{several / one:.3f}"]) + " |")
    share = sum(most[part] for part in STATES) / sum(single[part] for part in STATES)
    off = max(abs(plan[part] / most[part] - 1) for part in single)
    print(f"\n{', '.join(STATES)} together: {share:.4f} of the single process's (at most {MOST} on 4)")
    print(f"the prediction is off by at most {off:.2%} (at most {TOLERANCE:.0%})")
    return {"single": single, "ranks": each, "predicted": plan, "share": share, "off": off}


def bytes_of_a_step(overrides: list[str], batch_size: int) -> dict[str, int]:
    """What this rank has after a step, by part; with FSDP2 over all ranks if there is a process group."""
    cfg = compose("doctor", [*overrides, "trainer.accelerator=cpu"])
    cfg.trainer.strategy = "fsdp" if dist.is_initialized() else "single"
    parts = Parts(cfg)
    strategy = strategy_of(cfg.trainer)(cfg.trainer, World(), torch.device("cpu"))
    network = strategy.begin(parts.denoiser("meta"), None, seed=0)
    optimizer = build(cfg.optimizer)(by_layout(list(network.parameters())))
    average = build(cfg.ema)(strategy.averaged(network))
    with Alive() as alive:
        _pass(alive, network, parts, batch_size)
        optimizer.step()
        average.update(1)
        once, twice = (_pass(alive, network, parts, number * batch_size) for number in (1, 2))
    return {
        "parameters": _bytes([*network.parameters(), *network.buffers()]),
        "gradients": _bytes(p.grad for p in network.parameters() if p.grad is not None),
        "optimizer": _bytes(tree_leaves(optimizer.state_dict()["state"])),
        "ema": _bytes(tree_leaves(average.averages)),
        "activations": twice - once,  # so that nothing counts that does not grow with the batch
    }


def _pass(alive: Alive, network: nn.Module, parts: Parts, batch_size: int) -> int:
    """Forward and backward: the bytes kept in between."""
    gc.collect()
    before = alive.bytes
    (x, time_), cond = inputs_of(parts, batch_size, "cpu")
    cond = {name: value.zero_() for name, value in cond.items()}  # a class that there is
    loss = network(x.normal_(), time_.uniform_(), **cond).square().mean()
    gc.collect()
    kept = alive.bytes - before
    loss.backward()
    return kept


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Iterable[Any]) -> int:
    """Of the storages of tensors, each once."""
    storages = [_local(t).untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
