"""The manifest of a folder of tar shards: what it holds, and whether it still does."""

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

MANIFEST = "manifest.json"
VERIFY_BYTES = 2**30  # above this, only sizes are compared when a run starts


class Shard(NamedTuple):
    """One tar file of samples."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write(folder: Path) -> list[Shard]:
    """Count and check the shards of a folder and write its manifest.

    Raises:
        ValueError: if there is no shard, or one is not a whole tar file or holds no sample.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder} holds no .tar shard")
    total = sum(path.stat().st_size for path in paths)
    if total > VERIFY_BYTES:
        print(f"dit: indexing {len(paths)} shards of {folder}, {total / 2**30:,.0f} GiB, once", flush=True)
    shards = [Shard(path.name, count(path), path.stat().st_size, sha256(path)) for path in paths]
    try:
        partial = folder / f"{MANIFEST}.{os.getpid()}.tmp"
        partial.write_text(json.dumps({"shards": [shard._asdict() for shard in shards]}, indent=1) + "\n")
        partial.replace(folder / MANIFEST)
    except PermissionError:
        print(f"dit: {folder} cannot be written to, so its index cannot be kept: the next start makes it again")
    return shards


def read(folder: Path) -> list[Shard]:
    """The shards of a folder by its manifest, which is written first where it is missing.

    Raises:
        ValueError: if the folder is missing, or a shard is missing, corrupt or not the one of the manifest.
    """
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist: give the one that holds the .tar shards")
    if not (folder / MANIFEST).exists():
        return write(folder)
    shards = [Shard(**shard) for shard in json.loads((folder / MANIFEST).read_text())["shards"]]
    way_out = f"restore it, or delete {folder / MANIFEST} to accept the folder as it is"
    thorough = sum(shard.bytes for shard in shards) <= VERIFY_BYTES
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"the shard {path} of the manifest is missing: {way_out}")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"the shard {path} is corrupt: {path.stat().st_size} bytes instead of {shard.bytes}: {way_out}"
            )
        if thorough and sha256(path) != shard.sha256:
            raise ValueError(f"the shard {path} is corrupt: its sha256 is not the manifest's: {way_out}")
    return shards


def count(path: Path) -> int:
    """The number of samples of a shard, which must be a tar file to its last byte.

    tarfile takes a damaged header after the first member for the end of the archive; what follows would be lost in
    silence.

    Raises:
        ValueError: if the file is not a whole tar, or empty.
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(path, "r:") as tar:
            keys = {base_plus_ext(member.name)[0] for member in tar if member.isreg()} - {None}
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {path} is corrupt: {error}") from error
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read()
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise ValueError(f"the shard {path} is corrupt at byte {end}: neither a member nor the end of the archive")
    if not keys:
        raise ValueError(f"the shard {path} holds no sample")
    return len(keys)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
