"""Reads what Weights & Biases keeps of a run that is offline: protobuf records in the framing of LevelDB's log."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32768  # bytes: of the file, and of each record; a record does not cross the end of a block
FULL, LAST = 1, 4  # kinds of a part that ends a record


def records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file, in order."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""


class OfflineRun:
    """One start of a run, as it stands in its folder: `run-<id>.wandb`."""

    def __init__(self, folder: Path):
        self.folder = folder
        [file] = folder.glob("run-*.wandb")
        self.config: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []  # with W&B's own count of steps as `_step`
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}  # the axis of each, by name or pattern
        self.artifacts: list[tuple[str, str, str, str]] = []  # relation, type, name, digest
        self.files: set[str] = set()  # what artifacts hold
        self.alerts: list[tuple[str, str]] = []
        self.id = ""
        for record in records(file):
            self._take(record)

    def _take(self, record: Record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.id = record.run.run_id
            self.config |= _values(record.run.config.update)
        elif kind == "config":
            self.config |= _values(record.config.update)
        elif kind == "history":
            self.rows.append(_values(record.history.item))
        elif kind == "summary":
            self.summary |= _values(record.summary.update)
        elif kind == "metric":
            self.metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "artifact":
            told = record.artifact
            relation = "used" if told.use_after_commit else "made"
            self.artifacts.append((relation, told.type, told.name, told.digest))
            self.files |= {entry.path for entry in told.manifest.contents}
        elif kind == "alert":
            self.alerts.append((record.alert.title, record.alert.text))


def _values(items: Any) -> dict[str, Any]:
    """What is told, nested as it was."""
    values: dict[str, Any] = {}
    for item in items:
        *path, name = item.nested_key or [item.key]
        inner = values
        for key in path:
            inner = inner.setdefault(key, {})
        inner[name] = json.loads(item.value_json)
    return values
