"""What a tar file holds, and what is wrong with it."""

import json
import tarfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_NAME_BYTES = 255  # of each part of a path
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn round what follows, as it is printed


class Table(NamedTuple):
    """Where the files of N samples lie in their shard, by E extensions."""

    keys: np.ndarray  # (N,) UTF-8
    extensions: list[str]
    offsets: np.ndarray  # (N, E) int64, in bytes; -1 where there is no such file
    sizes: np.ndarray  # (N, E) int64, in bytes

    def column(self, extensions: Sequence[str]) -> np.ndarray:
        """(N,) the column of the first of these extensions that a sample has, or -1."""
        found = np.full(len(self.keys), -1)
        for extension in reversed(extensions):
            if extension in self.extensions:
                column = self.extensions.index(extension)
                found[self.offsets[:, column] >= 0] = column
        return found


class Damage(NamedTuple):
    """What is wrong in a shard."""

    shard: str
    sample: str  # empty where it is not one sample
    reason: str

    def __str__(self) -> str:
        return f"the shard {self.shard}{f', sample {self.sample}' if self.sample else ''}: {self.reason}"


def lines(damages: Iterable[Damage]) -> bytes:
    """A file that names them, a line of JSON each."""
    return "".join(json.dumps(damage._asdict()) + "\n" for damage in damages).encode()


def scan(path: Path, require: Sequence[Sequence[str]] = ()) -> tuple[Table, list[Damage]]:
    """The samples of a tar file, and all that is wrong with it, which the table leaves out.

    Files of one sample are named alike up to the first dot, as the WebDataset package has it, and stand side by side.

    Args:
        path: of the file.
        require: of each of these groups of extensions a sample must have one.

    Raises:
        OSError: if the file cannot be read.
    """
    name, damages = path.name, []
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    left_out: set[str] = set()
    last = None
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined] # which would keep them all
                    if member.size < 0 or tar.offset <= member.offset:  # and lead back, and round
                        raise ValueError("a member that ends before it begins")
                    key, extension = _split(member.name)
                    if reason := _refused(member):
                        damages.append(Damage(name, ascii(member.name[:80])[1:-1], reason))
                        left_out.add(key)
                        continue
                    if member.isdir() or not key or not extension:
                        continue
                    if key in samples and key != last:
                        damages.append(Damage(name, key, "its key occurs twice"))
                        left_out.add(key)
                        continue
                    files, last = samples.setdefault(key, {}), key
                    if extension in files:
                        damages.append(Damage(name, key, f"it has two files .{extension}"))
                        left_out.add(key)
                    files[extension] = (member.offset_data, member.size)
                problem = _end_problem(path, tar.offset)
            except OSError:
                raise
            except Exception as error:  # tarfile raises many kinds for what is damaged
                problem = f"corrupt at byte {tar.offset}: {error}"
    except tarfile.TarError as error:
        problem = f"corrupt at byte 0: {error}"
    if problem:
        damages.append(Damage(name, "", problem))
        if last:  # perhaps not whole
            left_out.add(last)
    elif not samples:
        damages.append(Damage(name, "", "it holds no sample"))
    for key, files in samples.items():
        for group in require:
            if key not in left_out and not any(extension in files for extension in group):
                damages.append(Damage(name, key, f"it has no .{' or .'.join(group)}"))
                left_out.add(key)
    kept = {key: files for key, files in samples.items() if key not in left_out}
    return _table(kept), damages


def _split(name: str) -> tuple[str, str]:
    """(key, extension) of a member: the path up to the first dot of the file's name, and what follows it."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}" if stem else "", extension.lower())


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is not taken; empty if it is."""
    name = member.name
    if member.issym() or member.islnk():
        return "it is a link"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "it is a device, or no plain file"
    if name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the folder"
    if any(unicodedata.category(character) in ("Cc", "Cs") or character in BIDI for character in name):
        return "its name has characters that cannot be printed"  # or that are no Unicode
    if any(len(part.encode()) > MAX_NAME_BYTES for part in name.split("/")):
        return f"its name has more than {MAX_NAME_BYTES} bytes"
    return ""


def _end_problem(path: Path, end: int) -> str:
    """What is wrong with what follows the last member, which must be two empty blocks, or more.

    tarfile takes a damaged header after the first member for the end of the archive; what follows would be lost in
    silence.
    """
    zeros = 0
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(2**20):
            if chunk.strip(b"\0"):
                return f"corrupt at byte {end}: neither a member nor the end of the archive"
            zeros += len(chunk)
    return "" if zeros >= 2 * tarfile.BLOCKSIZE else f"cut at byte {end + zeros}: the end of the archive is missing"


def _table(samples: Mapping[str, Mapping[str, tuple[int, int]]]) -> Table:
    extensions = sorted({extension for files in samples.values() for extension in files})
    places = np.full((len(samples), len(extensions), 2), (-1, 0), dtype=np.int64)
    column = {extension: i for i, extension in enumerate(extensions)}
    for row, files in enumerate(samples.values()):
        for extension, place in files.items():
            places[row, column[extension]] = place
    keys = np.array([key.encode() for key in samples], dtype=bytes)
    return Table(keys, extensions, places[..., 0], places[..., 1])
