"""Files of JSON lines, which only ever grow, but for what a run that goes on will write again."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Write a line, after the end of one that a full disk has cut."""
    text = json.dumps(line) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(text.encode())


def rewound(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after a step, and those that were cut; those that are left."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(path)
    return [json.loads(line) for line in kept]
