"""Checkpoints that are either whole or not there: written aside, synced, committed by rename, verified when read."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """There are checkpoints, but none is intact."""

    exit_code = 4


def save(
    root: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    states: Mapping[str, Any],
    *,
    data: str = "",
    keep: int = 2,
) -> Path:
    """Commit `root/step-<step>`, and remove all but the newest `keep` checkpoints.

    Args:
        root: the folder of the run's checkpoints.
        step: finished optimizer steps.
        weights: tensors by name, each mapping a `.safetensors` file.
        states: nested tensors and primitives, each a `.pt` file that `weights_only` reads.
        data: the fingerprint of the training data.
        keep: how many checkpoints to keep, this one included.
    """
    final = root / f"step-{step:08d}"
    if final.exists():
        return final
    partial = final.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in weights.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial / f"{name}.safetensors")
    for name, state in states.items():
        torch.save(state, partial / f"{name}.pt")
    manifest = {
        "step": step,
        "data": data,
        "versions": {"torch": torch.__version__, "lightning": version("lightning")},
        "files": {path.name: _fingerprint(path) for path in sorted(partial.iterdir())},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    partial.rename(final)
    _sync(root)
    for old in committed(root)[:-keep]:
        shutil.rmtree(old)
    return final


def committed(root: Path) -> list[Path]:
    """The checkpoints that were committed, oldest first."""
    return sorted(path for path in root.glob("step-*") if not path.suffix)


def newest(root: Path) -> Path | None:
    """The newest intact checkpoint; None where there never was one. What is not intact is passed over, loudly.

    Raises:
        CheckpointError: if there are checkpoints but none is intact.
    """
    for path in reversed(committed(root)):
        if not (problem := verify(path)):
            return path
        print(f"dit: WARNING: passing over the checkpoint {path}: {problem}", flush=True)
    if committed(root):
        raise CheckpointError(f"no checkpoint in {root} is intact; move the folder away to start anew")
    return None


def clean(root: Path, resume_from: Path) -> None:
    """Remove what a killed save left, and put aside as `step-*.corrupt` what was passed over for resume_from.

    Only for the process that trains the run.
    """
    for stale in root.glob("step-*.tmp"):
        shutil.rmtree(stale)
    for path in committed(root):
        if step_of(path) > step_of(resume_from):
            aside = path.with_suffix(".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is what was saved."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if not {"model.safetensors", "run.pt"} <= files.keys():
            return f"{MANIFEST} lists too few files"
        for name, fingerprint in files.items():
            if _fingerprint(path / name) != fingerprint:
                return f"{name} is not what was saved"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{error}"
    return None


def step_of(path: Path) -> int:
    """The finished optimizer steps of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def data_of(path: Path) -> str:
    """The fingerprint of the data with which a checkpoint was trained."""
    fingerprint: str = json.loads((path / MANIFEST).read_text())["data"]
    return fingerprint


def load_weights(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one `.safetensors` file of a checkpoint."""
    tensors: dict[str, Tensor] = load_file(path / f"{name}.safetensors")
    return tensors


def load_state(path: Path, name: str) -> Any:
    """The contents of one `.pt` file of a checkpoint, on the CPU; only tensors and primitives are read."""
    return torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
