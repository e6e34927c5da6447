"""A folder of shards in the making: of one plan, by several processes, and continued after any of them was killed."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit.data import index
from dit.data.store import Store
from dit.data.writer import check_apart

PLAN = "encoding.json"
DTYPES = {"float32": np.float32, "float16": np.float16}


def claim(out: Path, plan: Mapping[str, Any], sources: Sequence[Store] = ()) -> None:
    """Take a folder for the shards of a plan, which stands there from then on.

    Raises:
        ValueError: if it holds those of another plan, or is not apart from the sources.
    """
    if (out / PLAN).exists() and (before := json.loads((out / PLAN).read_text())) != plan:
        other = ", ".join(f"{key} was {had}, now {now}" for key, had, now in _differing(before, plan))
        raise ValueError(f"out={out} holds shards that were encoded otherwise ({other}): choose another out")
    if not (out / PLAN).exists() and out.exists() and any(out.glob("*.tar")):
        raise ValueError(f"out={out} holds shards of another kind: choose another out")
    for store in sources:
        if not store.remote:
            check_apart(out, Path(store.folder))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: choose a folder")
    out.mkdir(parents=True, exist_ok=True)
    index.replace(out / PLAN, (json.dumps(plan, indent=1) + "\n").encode())


def clean(out: Path, number: int) -> None:
    """Take away what a killed process has left of a shard."""
    for stale in out.glob(f"{number:06d}.*.tmp"):
        stale.unlink()


def whole(out: Path, number: int, samples: int) -> bool:
    """Whether the shard of a number is there, with so many samples."""
    path = out / name_of(number)
    try:
        shard, _ = index.load(Store(str(out)), path.name)
    except ValueError:
        return False
    return path.exists() and (shard.bytes, shard.samples) == (path.stat().st_size, samples)


def committed(out: Path, about: Mapping[str, Any]) -> index.Index:
    """Write the manifest of the shards of a folder."""
    names = [path.name for path in sorted(out.glob("*.tar"))]
    return index.commit(out, [index.load(Store(str(out)), name)[0] for name in names], about)


def npy(array: np.ndarray, dtype: str) -> bytes:
    """The .npy file of numbers."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array, dtype=DTYPES[dtype]), allow_pickle=False)
    return file.getvalue()


def name_of(number: int) -> str:
    """The file of a shard."""
    return f"{number:06d}.tar"


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs in two plans: the key, what it was, what it is."""
    for key in {**before, **now}:
        had, has = before.get(key), now.get(key)
        if isinstance(has, dict) and isinstance(had, dict):
            yield from _differing(had, has)
        elif has != had:
            yield key, had, has
