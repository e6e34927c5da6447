"""Files that a run writes beside its checkpoints: replaced as a whole, or of JSON lines that only ever grow."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def replace(path: Path, text: str) -> None:
    """Write a file that is there whole, or as it was."""
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    partial.replace(path)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Write a line, after the end of one that a full disk has cut."""
    text = json.dumps(line) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that name a step, without those that were cut; none if there is no file."""
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, LookupError, TypeError):
            line = json.loads(text)
            yield line | {"step": int(line["step"])}


def rewound(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after a step, which will be written again; those that are left."""
    kept = [line for line in steps(path) if line["step"] <= step]
    if path.exists():
        replace(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
