"""Weights for others: files that name neither this library nor how a run was sharded."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FEW_STEP = "few_step.json"  # how a student is drawn


def native(
    path: Path,
    weights: "Mapping[str, Tensor]",
    config: Mapping[str, Any],
    few_step: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """A folder with `model.safetensors` and `config.json`, written aside and renamed, so that it is there whole or not.

    Args:
        path: the folder.
        weights: by name, on the CPU.
        config: what JSON can say.
        few_step: the same, of how a student is drawn, for `few_step.json`; None: it is none.
        overwrite: take the place of such a folder.

    Raises:
        ValueError: if there is something else of the name, or such a folder that is to stay.
    """
    from safetensors.torch import save_file

    check_free(path, overwrite)
    partial, old = (path.with_name(f"{path.name}.{suffix}") for suffix in ("tmp", "old"))
    for stale in (partial, old):
        check_free(stale, overwrite=True)
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    # Copies, since safetensors refuses what shares memory.
    save_file({name: t.clone().contiguous() for name, t in weights.items()}, partial / WEIGHTS, {"format": "pt"})
    (partial / CONFIG).write_text(json.dumps({**config, "student": few_step is not None}, indent=1) + "\n")
    if few_step is not None:
        (partial / FEW_STEP).write_text(json.dumps(few_step, indent=1) + "\n")
    for file in (*partial.iterdir(), partial):
        sync(file)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_free(path: Path, overwrite: bool) -> None:
    """See that a folder can be written to a path.

    Raises:
        ValueError: if there is something that is no export, or an export that is to stay.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir() or {file.name for file in path.iterdir()} - {WEIGHTS, CONFIG, FEW_STEP}:
        raise ValueError(f"path={path} exists and is no export: choose another path")
    if not overwrite:
        raise ValueError(f"path={path} exists: choose another path, or overwrite=true to replace it")


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
