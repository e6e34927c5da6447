"""The manifest of a folder: sizes and sha256 of its files, and of itself; read and written without torch."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class DamagedError(RuntimeError):
    """Files are not what was written."""

    exit_code = 4


def write(folder: Path) -> None:
    """Write the manifest of all files of a folder and of those below it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: fingerprint(folder / name) for name in names if name != MANIFEST}
    (folder / MANIFEST).write_text(sealed({"files": files}))


def listed(folder: Path) -> dict[str, Any]:
    """The files that a manifest lists, each with its size and sha256.

    Raises:
        DamagedError: if the manifest is not what was written.
    """
    try:
        text = (folder / MANIFEST).read_text()
        manifest: dict[str, Any] = json.loads(text)
        files: dict[str, Any] = manifest["files"]
        whole = sealed({name: value for name, value in manifest.items() if name != "sha256"}) == text
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{folder / MANIFEST} is missing or damaged: {_way_out(folder)}") from error
    if not whole or not isinstance(files, dict):
        raise DamagedError(f"{folder / MANIFEST} is not what was written: {_way_out(folder)}")
    return files


def check(folder: Path) -> None:
    """See that a folder holds what its manifest lists; what is not listed is no part of it.

    Raises:
        DamagedError: naming the first file that is missing, or is another.
    """
    files = listed(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter to others
        for name, found in zip(files, pool.map(lambda name: _found(folder, name), files), strict=True):
            if found != files[name]:
                state = "not what was written" if found else "missing"
                raise DamagedError(f"{folder / name} is {state}: {_way_out(folder)}")


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with the sha256 of its other lines."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1) + "\n"


def fingerprint(path: Path) -> dict[str, Any]:
    """The size and the sha256 of a file."""
    size = path.stat().st_size
    digest, buffer = hashlib.sha256(), bytearray(min(size + 1, 2**22))  # large, to ask for the interpreter seldom
    with path.open("rb", buffering=0) as file:
        while number := file.readinto(buffer):
            digest.update(memoryview(buffer)[:number])
    return {"bytes": size, "sha256": digest.hexdigest()}


def _found(folder: Path, name: str) -> dict[str, Any] | None:
    """The fingerprint of a file; None if there is none, or it is none of the folder's own."""
    path = folder / name
    inside = ".." not in Path(name).parts and not Path(name).is_absolute()
    return fingerprint(path) if inside and path.exists() and stat.S_ISREG(path.lstat().st_mode) else None


def _way_out(folder: Path) -> str:
    return f"get {folder} anew, or export it again (dit export ... overwrite=true)"
