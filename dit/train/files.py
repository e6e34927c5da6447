"""Files that a run writes beside its checkpoints: replaced as a whole, or of JSON lines that only ever grow."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Outlet:
    """A stream that outlives who reads it: what is written to a broken pipe, as of `| tee`, is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if anybody reads."""
        with self._unbroken():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand it over, if anybody reads."""
        with self._unbroken():
            self._stream.flush()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def replace(path: Path, text: str | bytes) -> None:
    """Write a file that is there whole, or as it was."""
    partial = path.with_suffix(".tmp")
    partial.write_bytes(text.encode() if isinstance(text, str) else text)
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
    for text in path.read_bytes().splitlines() if path.exists() else ():
        if line := _step(text):
            yield line


def _step(text: bytes) -> dict[str, Any] | None:
    """A line that names a step; None of what was cut, or is none of ours."""
    with suppress(ValueError, LookupError, TypeError):
        line = json.loads(text)
        return {**line, "step": int(line["step"])}
    return None


def rewound(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut off what was written after a step, and will be written again; the lines that are left.

    The file is cut where it is, which a full disk does not prevent.
    """
    if not path.exists():
        return []
    size = 0
    with path.open("rb+") as file:
        for text in file:
            line = _step(text)
            if not text.endswith(b"\n") or (line and line["step"] > step):
                break
            size += len(text)
        file.truncate(size)
    return list(steps(path))
