"""`python tools/bench.py curves`: losses of training from one seed, before and after each optimization."""

import argparse
import io
import tempfile
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dit.command.compose import compose
from dit.train.files import steps

LEAST = 50  # steps
BEFORE = "before: eager, float32, AdamW not fused"
PLAIN = {"optimizer.fused": "false", "trainer.compile": "false", "trainer.precision": "32-true"}
FAST = {"optimizer.fused": "true", "trainer.compile": "true"}
# What differs from before, and by how much of it the mean loss of the last fifth of the steps may differ.
WAYS: dict[str, tuple[dict[str, str], float]] = {
    "fused AdamW": ({"optimizer.fused": "true"}, 1e-4),
    "fused, compiled": (FAST, 1e-4),
    "fused, compiled, bf16": ({**FAST, "trainer.precision": "bf16-mixed"}, 0.01),
    "fused, compiled, float8 emulated": ({**FAST, "trainer.float8": "emulate"}, 0.02),
}


def curves(options: argparse.Namespace) -> dict[str, Any]:
    """Train once each way, and print how far the losses are from those before; `failed` names those too far.

    Raises:
        ValueError: if there are too few steps for a network to begin to learn.
        ImportError: if torchao is missing.
    """
    if options.steps < LEAST:
        raise ValueError(
            f"--steps {options.steps}: gates begin at zero, {LEAST} steps is the least that shows anything"
        )
    if find_spec("torchao") is None:
        raise ImportError("float8 needs torchao: pip install -e '.[float8]'")
    losses = {BEFORE: _losses(options, PLAIN)}
    losses |= {name: _losses(options, {**PLAIN, **changed}) for name, (changed, _) in WAYS.items()}
    print("| | mean loss, last fifth | from before | allowed | largest of a step |\n|---|---|---|---|---|")
    last = slice(-max(1, options.steps // 5), None)
    before, far = losses[BEFORE], []
    for name, found in losses.items():
        mean = found[last].mean() / before[last].mean() - 1
        step = ((found - before) / before).abs().max()
        allowed = WAYS[name][1] if name in WAYS else 0.0
        print(f"| {name} | {found[last].mean():.5f} | {mean:+.2e} | {allowed:g} | {step:.1e} |")
        far += [name] if not abs(mean) <= allowed else []
    return {"losses": {name: found.tolist() for name, found in losses.items()}, "failed": far}


def _losses(options: argparse.Namespace, changed: dict[str, str]) -> Any:
    """Of each step, (steps,)."""
    from dit.train.run import Run

    with tempfile.TemporaryDirectory() as folder:
        told = [f"runs_dir={folder}", "run=curve", "logger=none", "metric=none", "sampler.num_steps=1"]
        length = [f"trainer.max_steps={options.steps}", "trainer.log_every_steps=1"]
        often = [f"trainer.{what}_every_steps={10 * options.steps}" for what in ("preview", "checkpoint")]
        words = [f"{key}={value}" for key, value in changed.items()]
        with redirect_stdout(io.StringIO()):
            Run(compose("train", [*options.overrides, *told, *length, *often, *words])).fit()
        lines = list(steps(Path(folder) / "curve" / "metrics.jsonl"))
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)
