"""Weights for others: folders that name neither this library's checkpoints nor how a run was sharded."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dit.weights import manifest

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"  # which shard holds what
FEW_STEP = "few_step.json"  # how a student is drawn
CARD, GRID = "README.md", "samples.png"
PIPELINE, CODE = "model_index.json", "pipeline.py"  # what diffusers reads first, and code of ours for it
VAE, TRANSFORMER, SCHEDULER = "vae", "transformer", "scheduler"  # folders
PROGRAM, ONNX = "network.pt2", "network.onnx"
PROGRAMS = {"pt2": "torch.export.load", "onnx": "onnxruntime"}  # formats without weights, and what reads them
KNOWN = {WEIGHTS, CONFIG, INDEX, FEW_STEP, CARD, GRID, PIPELINE, CODE, VAE, TRANSFORMER, SCHEDULER, PROGRAM}
KNOWN |= {ONNX, f"{ONNX}.data", manifest.MANIFEST}
EVALUATION = re.compile(r"evaluation(-.*)?(\.jsonl|\.png)?")  # what `dit evaluate` writes beside
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
MOST_BYTES = 5 * 10**9  # of a file of weights


def commit(path: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """A folder with its manifest, written aside and renamed, so that it is there whole or not.

    Args:
        path: the folder.
        write: fills a new folder.
        overwrite: take the place of an export.

    Raises:
        ValueError: if it cannot be written there.
    """
    check(path, overwrite)
    partial, old = aside = _aside(path)
    for stale in aside:
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    manifest.write(partial)
    for file in (*partial.rglob("*"), partial):
        if file.is_file():
            shutil.copymode(partial / manifest.MANIFEST, file)  # safetensors' are their writer's alone
        sync(file)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, weights: "Mapping[str, Tensor]", most_bytes: int = MOST_BYTES) -> None:
    """`model.safetensors`; of more bytes than a file is to have, several, and an index of them, as others read them.

    Args:
        folder: where to.
        weights: by name, on the CPU.
        most_bytes: of a file; a tensor is never divided.
    """
    from safetensors.torch import save_file

    shards = list(_shards(weights, most_bytes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    else:
        where = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_bytes(t) for t in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    for file, shard in zip(names, shards, strict=True):
        # Copies, since safetensors refuses what shares memory.
        save_file({name: weights[name].clone().contiguous() for name in shard}, folder / file, {"format": "pt"})


def describe(folder: Path, config: Mapping[str, Any], few_step: Mapping[str, Any] | None = None) -> None:
    """`config.json`, and of a student how it is drawn, `few_step.json`; of what JSON can say."""
    about = {**config, "student": few_step is not None, "manifest": manifest.MANIFEST}
    (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    if few_step is not None:
        (folder / FEW_STEP).write_text(json.dumps(few_step, indent=1) + "\n")


def weights_file(folder: Path) -> Path:
    """The file of an export's weights, or the index of several."""
    return folder / (INDEX if (folder / INDEX).exists() else WEIGHTS)


def check(path: Path, overwrite: bool) -> None:
    """See, before weights are read, whether a folder can be written to a path; nothing is left there.

    Raises:
        ValueError: if not.
    """
    try:
        _check_free(path, overwrite)
        for stale in _aside(path):
            _check_free(stale, overwrite=True)
        there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        TemporaryDirectory(prefix=".dit-", dir=there).cleanup()
    except OSError as error:
        raise ValueError(f"path={path} cannot be written, {error.strerror}: choose another path") from error


def _aside(path: Path) -> tuple[Path, Path]:
    """What is to come in a folder's place, and what was there."""
    return path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")


def _check_free(path: Path, overwrite: bool) -> None:
    """See that a folder can be written to a path.

    Raises:
        ValueError: if there is something that is no export, or an export that is to stay, or has evaluations.
    """
    if not path.exists() and not path.is_symlink():
        return
    is_folder = path.is_dir() and not path.is_symlink()
    there = sorted(file.name for file in path.iterdir()) if is_folder else []
    evaluations = [name for name in there if EVALUATION.fullmatch(name)]
    if not is_folder or not all(name in KNOWN or SHARD.fullmatch(name) or name in evaluations for name in there):
        raise ValueError(f"path={path} exists and is no export: choose another path")
    if not overwrite:
        raise ValueError(f"path={path} exists: choose another path, or overwrite=true to replace it")
    if evaluations:
        raise ValueError(
            f"path={path} has evaluations, which overwrite=true would delete: choose another path, or move "
            f"{', '.join(str(path / name) for name in evaluations)} away"
        )


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shards(weights: "Mapping[str, Tensor]", most_bytes: int) -> Iterator[list[str]]:
    """Names, in their order, of as many bytes as a file is to have."""
    shard: list[str] = []
    held = 0
    for name, value in weights.items():
        if shard and held + _bytes(value) > most_bytes:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += _bytes(value)
    yield shard


def _bytes(value: "Tensor") -> int:
    return value.numel() * value.element_size()
