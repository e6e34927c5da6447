"""dit doctor: what a recipe costs, before anything is spent; or how a run went."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dit.command import train
from dit.command.compose import ConfigError, check_run_name, user_errors
from dit.train import attempts, goodput, saved
from dit.train.kind import check_denoiser

if TYPE_CHECKING:
    from dit.train.build import Parts
    from dit.train.cost import Memory

GIB, MIB = 2**30, 2**20
LISTED = 20


def prepare(overrides: Sequence[str] | None) -> None:
    """See that it is asked of a run or of a recipe, not of both.

    Raises:
        ConfigError: if it is.
    """
    keys = [override.partition("=")[0] for override in overrides or []]
    others = [key for key in keys if key not in ("run", "runs_dir") and not key.startswith("hydra")]
    if "run" in keys and others:
        raise ConfigError(
            f"run=<name> reports on a run that was trained, {others[0]}=... changes a recipe: ask for one at a time"
        )


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    if cfg.run is None:
        return train.check(_recipe(cfg))
    check_run_name(cfg.run)
    with user_errors():
        saved.config(Path(cfg.runs_dir) / str(cfg.run))
    return None


def _recipe(cfg: DictConfig) -> DictConfig:
    """What is not a run yet, with a name."""
    named = cfg.copy()
    named.run = "doctor"
    return named


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Nothing: the jobs of a multirun write nothing but what they print."""


def main(cfg: DictConfig) -> int:
    """Print parameters, operations and memory, or how a run went; the exit code."""
    if cfg.run is not None:
        print("\n".join(run_lines(Path(cfg.runs_dir) / str(cfg.run))))
        return 0
    cfg = _recipe(cfg)
    with user_errors():
        check_denoiser(cfg)
        from dit.train.build import Parts
        from dit.train.cost import memory, multiply_adds
        from dit.train.devices import settled

        cfg.trainer.dry_run = True  # a GPU need not be there
        cfg = settled(cfg)
        parts = Parts(cfg)
        batch_size = cfg.trainer.micro_batch_size or cfg.trainer.batch_size
        macs, need = multiply_adds(parts), memory(parts, batch_size)
    print("\n".join(network_lines(parts, macs) + memory_lines(cfg, need, batch_size)))
    return 0


def run_lines(folder: Path) -> list[str]:
    """Where a run's time has gone, how each start of it ended, its newest checkpoint, and what was left out."""
    starts, skipped = attempts.read(folder), goodput.skipped_steps(folder)
    checkpoints = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    lines = [f"{folder}", *goodput.table(starts, skipped)[1]]
    lines.append(f"  {'newest checkpoint':<18} {checkpoints[-1] if checkpoints else 'none'}")
    if replaced := sum(start["replaced"] for start in starts):
        lines.append(f"  {'replaced samples':<18} {replaced}, those of steps that were redone each time")
    if left_out := sorted({step for start in starts for step in start["left_out"]}):
        lines.append(f"  {'steps left out':<18} {', '.join(map(str, left_out))}, by trainer.poison_step=skip")
    if skipped:
        lines.append(f"  {'steps skipped':<18} {len(skipped)}")
        lines += [f"    {step:<16} {_reason(entry)}" for step, entry in sorted(skipped.items())[:LISTED]]
        lines += [f"    and {len(skipped) - LISTED} more, see {folder / 'skipped.jsonl'}"] * (len(skipped) > LISTED)
    lines.append("  starts" if starts else "  starts             none noted, as by an older version")
    for start in starts:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["began"]))
        nodes, job = ", ".join(start["environment"]["nodes"]), f", job {start['job']}" if start["job"] else ""
        lines.append(
            f"    {start['attempt']:<4} {began} on {nodes}{job}: step {start['from_step']} to {start['step']} in "
            f"{goodput.duration(start['seen'] - start['began'])}, {attempts.how_ended(start)}"
        )
    return lines


def _reason(entry: dict[str, Any]) -> str:
    """Why a step was skipped, and the first of its samples."""
    keys = [str(key) for key in entry.get("keys") or []]
    return f"{entry.get('reason')}" + (f": {', '.join(keys[:4])}{', ...' * (len(keys) > 4)}" if keys else "")


def network_lines(parts: "Parts", macs: int) -> list[str]:
    """The network, what it sees and what it is told; its parameters and operations."""
    cfg, told = parts.cfg, parts.condition.sizes
    size, inside = cfg.data.image_size, cfg.latent.size
    sees = f"{size} x {size} pixels" + (f" as {cfg.latent.channels} x {inside} x {inside}" if inside != size else "")
    said = ", ".join(f"{name}={value}" for name, value in told.items()) or "nothing"
    parameters = list(parts.learner("meta").parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    digits = ",.2f" if macs >= 1e8 else ".3g"
    operations = f"{2 * macs / 1e9:{digits}} GFLOP = {macs / 1e9:{digits}} GMAC"
    return [
        f"{cfg.model._target_.rpartition('.')[2]}, {sees}, told {said}",
        f"  parameters         {sum(p.numel() for p in parameters):,}, of which {trained:,} are trained",
        f'  an image forward   {operations} (multiply-adds, the "Gflops" of the papers)',
    ]


def memory_lines(cfg: DictConfig, need: "Memory", batch_size: int, of: str = "") -> list[str]:
    """The memory of a training step, by its parts, of which trifles are left out."""
    options = " ".join(f"trainer.{key}={cfg.trainer[key]}" for key in ("precision", "activation_checkpointing"))
    lines = [f"  memory of a training step{of}, {batch_size} images at a time, {options}"]
    notes = {
        "optimizer": cfg.optimizer._target_.rpartition(".")[2],
        "copies": "not for each image: parameters in bfloat16",
        "activations": f"kept for the backward pass, {need.activations / batch_size / MIB:,.1f} MiB an image",
        "passing": "the most that comes and goes besides",
        "gathered": "the most parameters of other ranks, and gradients on their way, at a time",
    }
    digits = ".2f" if need.total >= GIB else ".4f"
    for name, num_bytes in (need._asdict() | {"total": need.total}).items():
        if num_bytes >= need.total / 1000:
            lines.append(f"    {name:<12} {num_bytes / GIB:10{digits}} GiB   {notes.get(name, '')}".rstrip())
    without = "trainer.compile" + (", the VAE" if cfg.latent.get("stride", 1) > 1 else "")
    return [
        *lines,
        f"    counted without running, with fused attention; without {without}, data and the device's own needs",
    ]
