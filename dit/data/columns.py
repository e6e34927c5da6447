"""Tables that tell of images: their rows, columns and labels."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "image": ("file_name", "file", "image", "path", "filename"),
    "caption": ("caption", "text"),
    "label": ("label", "class"),
}


def table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table in JSON, JSON lines or CSV; what is not UTF-8 becomes lone surrogates.

    Raises:
        ValueError: if it is none.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".jsonl", ".csv", ".tsv"):
        raise ValueError(f"captions={path}: give a .json, .jsonl or .csv, or captions=txt for a file beside each image")
    rows: Any
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if kind == ".json":
                rows = json.load(file)
                if isinstance(rows, dict):
                    told = {name: row if isinstance(row, dict) else {"caption": row} for name, row in rows.items()}
                    rows = [{"file_name": name, **row} for name, row in told.items()]
            elif kind == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                csv.field_size_limit(2**30)
                rows = list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"captions={path} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"captions={path} must be a list of objects, or a mapping from files to captions")
    return rows


def column(kind: str, present: Any, wanted: Mapping[str, str]) -> str | None:
    """The column that is asked for, or has a usual name; None if there is none.

    Args:
        kind: image, caption or label.
        present: the names of the columns.
        wanted: what is asked for, by kind.

    Raises:
        ValueError: if there is no column of the name that is asked for.
    """
    if (name := wanted.get(kind)) is not None:
        if name not in present:
            raise ValueError(f"columns.{kind}={name}: there is no such column; choose one of {', '.join(present)}")
        return name
    return next((name for name in NAMES[kind] if name in present), None)


def numbered(labels: Sequence[Any]) -> tuple[list[int], list[str] | None]:
    """The labels as numbers, -1 where there is none; names are numbered in sorted order, and given."""
    texts = ["" if label is None else str(label).strip() for label in labels]
    if all(re.fullmatch(r"(-?\d+(\.0*)?)?", text) for text in texts):  # pandas writes 1.0
        return [int(float(text or -1)) for text in texts], None
    names = sorted(set(texts) - {""})
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers.get(text, -1) for text in texts], names
