"""The index of a folder of tar shards: where every file of every sample lies, and whether it is all still there.

Beside each shard stands a table of its samples, `<shard>.index.npz`, and beside them all `manifest.json`. Making them
is the check of integrity; with them, any sample is read by a seek.
"""

import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit.data.parallel import each
from dit.data.store import DataError, Store

MANIFEST = "manifest.json"
FORMAT = 2
VERIFY_BYTES = 2**30  # above this, only sizes are compared when a run starts
MAX_NAME_BYTES = 255


class Shard(NamedTuple):
    """One tar file of samples."""

    name: str
    samples: int
    bytes: int
    sha256: str
    files: dict[str, int]  # by extension, how many samples have one


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


class Index(NamedTuple):
    """The shards of a folder, and what was said of them when they were written."""

    shards: list[Shard]
    about: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What tells these samples from others."""
        parts = "".join(shard.sha256 for shard in self.shards)
        if left_out := self.about.get("left_out"):
            parts += f"{left_out} left out"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


class Damage(NamedTuple):
    """What is wrong in a shard."""

    shard: str
    sample: str  # empty where it is not one sample
    reason: str

    def __str__(self) -> str:
        return f"the shard {self.shard}{f', sample {self.sample}' if self.sample else ''}: {self.reason}"


def write(
    folder: str | Path,
    *,
    shards: str = "*.tar",
    out: str | Path | None = None,
    require: Sequence[Sequence[str]] = (),
    lenient: bool = False,
    num_workers: int = 1,
    about: Mapping[str, Any] | None = None,
) -> Index:
    """Look at every byte of the shards of a folder and write their tables and manifest.

    Args:
        folder: of the shards, a path or a URL.
        shards: their names, a pattern as of the shell, with `*` or `{0000..0099}`.
        out: where tables and manifest are written, if not beside the shards.
        require: of each of these groups of extensions a sample must have one.
        lenient: leave out what is damaged, which `left_out.jsonl` then names, instead of refusing it.
        num_workers: processes.
        about: what the manifest says beside.

    Raises:
        ValueError: if there is no shard, or, unless lenient, anything is damaged, with a list.
    """
    store = Store(str(folder))
    names = store.names(shards)
    target = Path(out) if out else Path(folder)
    if out is None and store.remote:
        raise ValueError(f"{folder} is remote, so the index needs a folder of its own: give out=<folder>")
    target.mkdir(parents=True, exist_ok=True)
    indexed, damages = [], []
    job = functools.partial(_indexed, store=store, target=target, require=require, lenient=lenient)
    for shard, damaged in each(job, names, num_workers, "shards indexed"):
        indexed.append(shard)
        damages += damaged
    indexed, twice = _twice(target, indexed)
    damages += twice
    indexed = [shard for shard in indexed if shard.samples]
    if damages and not lenient:
        more = f"\n  and {len(damages) - 10} more" if len(damages) > 10 else ""
        listed = "\n  ".join(str(damage) for damage in damages[:10])
        raise ValueError(f"{folder} is damaged:\n  {listed}{more}\nmend it, or leave that out: dit index lenient=true")
    if not indexed:
        raise ValueError(f"{folder} holds no sample")
    if damages:
        lines = [json.dumps(damage._asdict()) + "\n" for damage in damages]
        replace(target / "left_out.jsonl", "".join(lines).encode())
        print(f"dit: {len(damages)} things were left out, the first {damages[0]}; all: {target / 'left_out.jsonl'}")
    return commit(target, indexed, {**(about or {}), **({"left_out": len(damages)} if damages else {})})


def verify(folder: str | Path, place: str | Path | None = None, num_workers: int = 1) -> tuple[Index, list[Damage]]:
    """The index of a folder, and what of its shards and tables is no longer as it was indexed, every byte compared.

    Args:
        folder: of the shards, a path or a URL.
        place: the folder of tables and manifest, if it is another one.
        num_workers: processes.
    """
    stores = Store(str(folder)), Store(str(place or folder))
    found = _parsed(stores[1])
    assert found is not None
    job = functools.partial(_changed, store=stores[0], place=stores[1])
    changed = [damage for damage in each(job, found.shards, num_workers, "shards verified") if damage]
    return found, changed


def _changed(shard: Shard, store: Store, place: Store) -> Damage | None:
    try:
        table(place, shard)
        with store.borrowed(shard.name) as path:
            if sha256(path) != shard.sha256:
                return Damage(shard.name, "", "its bytes are not those that were indexed")
    except (OSError, ValueError, DataError) as error:
        return Damage(shard.name, "", str(error))
    return None


def commit(target: Path, shards: list[Shard], about: Mapping[str, Any]) -> Index:
    """Write the manifest of shards whose tables stand in the folder target, and what is said of them beside."""
    index = Index(shards, dict(about))
    listing = [shard._asdict() for shard in shards]
    manifest = {"format": FORMAT, "fingerprint": index.fingerprint, **about, "shards": listing}
    replace(target / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return index


def read(folder: str | Path, index: str | Path | None = None) -> Index:
    """The index of a folder, which is made first where it is missing and the folder is a local one.

    Args:
        folder: of the shards, a path or a URL.
        index: the folder of tables and manifest, if it is another one.

    Raises:
        ValueError: if the folder is missing, or a shard is missing, damaged or not the one of the manifest.
    """
    store, place = Store(str(folder)), Store(str(index or folder))
    if not store.remote and not Path(folder).is_dir():
        raise ValueError(f"the data folder {folder} does not exist: give the one that holds the .tar shards")
    if (found := _parsed(place)) is None:
        if store.remote:
            raise ValueError(
                f"{index or folder} has no {MANIFEST}: run dit index path={folder} out=<folder> once, and give "
                "data.index=<folder>, or copy it beside the shards"
            )
        print(f"dit: {folder} has no index of this version and is indexed now, once", flush=True)
        try:
            return write(folder, out=index, num_workers=len(os.sched_getaffinity(0)))
        except PermissionError as error:
            raise ValueError(
                f"{folder} has no index and cannot be written to: run dit index path={folder} out=<folder> once, and "
                "give data.index=<folder>"
            ) from error
    if not store.remote:
        _check_shards(Path(folder), place.url(MANIFEST), found.shards)
    return found


def table(place: Store, shard: Shard) -> Table:
    """The table of a shard.

    Args:
        place: the folder of tables and manifest.
        shard: of the manifest.

    Raises:
        ValueError: if it is missing, damaged or that of another shard.
    """
    described, found = load(place, shard.name)
    if described != shard:
        raise ValueError(f"{place.url(_table_name(shard.name))} is not that of its shard: run dit index anew")
    return found


def load(place: Store, name: str) -> tuple[Shard, Table]:
    """The description and the table of the shard of a name, as `save` wrote them.

    Raises:
        ValueError: if they are missing or damaged.
    """
    try:
        with np.load(io.BytesIO(place.read(_table_name(name))), allow_pickle=False) as arrays:
            found = Table(arrays["keys"], arrays["extensions"].tolist(), arrays["offsets"], arrays["sizes"])
            size, sha256 = int(arrays["bytes"]), str(arrays["sha256"])
        assert found.offsets.shape == found.sizes.shape == (len(found.keys), len(found.extensions))
        assert ((found.sizes >= 0) & (found.offsets + found.sizes <= size)).all()
    except Exception as error:  # numpy and zipfile raise many kinds
        raise ValueError(
            f"{place.url(_table_name(name))} is missing or damaged ({error}): run dit index anew"
        ) from error
    return _described(name, size, sha256, found), found


def check_files(place: Store, shards: Sequence[Shard], extensions: Sequence[str], what: str, way_out: str = "") -> None:
    """See whether every sample has a file of one of these extensions.

    Raises:
        ValueError: naming the first sample that has none.
    """
    for shard in shards:
        if sum(shard.files.get(extension, 0) for extension in extensions) < shard.samples:
            found = table(place, shard)
            lacking = np.flatnonzero(found.column(extensions) < 0)
            if len(lacking):
                names = " or ".join(f".{extension}" for extension in extensions)
                raise ValueError(
                    f"sample {found.keys[lacking[0]].decode()} of the shard {shard.name} in {place.folder} has no "
                    f"{what} ({names}), as have {len(lacking)} of its {shard.samples} samples{way_out}"
                )


def scan(path: Path, require: Sequence[Sequence[str]] = ()) -> tuple[Table, list[Damage]]:
    """The samples of a tar file, and all that is wrong with it, which the table leaves out.

    Files of one sample are named alike up to the first dot, as the WebDataset package has it, and stand side by side.
    """
    name, damages = path.name, []
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    left_out: set[str] = set()
    last = None
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            try:
                for member in tar:
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
                end = tar.offset
                problem = _end_problem(path, end)
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


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(target: Path, path: Path, found: Table) -> Shard:
    """Write the table of a shard that lies at path into the folder target, and describe the shard."""
    shard = _described(path.name, path.stat().st_size, sha256(path), found)
    _write_table(target, shard, found)
    return shard


def _described(name: str, size: int, sha256: str, found: Table) -> Shard:
    counts = (found.offsets >= 0).sum(axis=0).tolist()
    files = {extension: count for extension, count in zip(found.extensions, counts, strict=True) if count}
    return Shard(name, len(found.keys), size, sha256, files)


def _write_table(target: Path, shard: Shard, found: Table) -> None:
    file = io.BytesIO()
    np.savez(
        file,
        keys=found.keys,
        extensions=np.array(found.extensions, dtype=str),
        offsets=found.offsets,
        sizes=found.sizes,
        bytes=shard.bytes,
        sha256=shard.sha256,
    )
    replace(target / _table_name(shard.name), file.getvalue())


def _table_name(shard: str) -> str:
    return f"{shard.removesuffix('.tar')}.index.npz"


def _indexed(
    name: str, store: Store, target: Path, require: Sequence[Sequence[str]], lenient: bool
) -> tuple[Shard, list[Damage]]:
    try:
        with store.borrowed(name) as path:
            found, damages = scan(path, require)
            if damages and not lenient:
                return Shard(name, 0, 0, "", {}), damages
            return save(target, path, found), damages
    except (OSError, DataError) as error:
        return Shard(name, 0, 0, "", {}), [Damage(name, "", f"it cannot be read: {error}")]


def _twice(target: Path, shards: list[Shard]) -> tuple[list[Shard], list[Damage]]:
    """The shards without samples whose key has occurred in an earlier one, and these."""
    place, damages = Store(str(target)), []
    hashes = [_hashes(table(place, shard).keys) if shard.samples else np.zeros(0, np.uint64) for shard in shards]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    several = values[counts > 1]
    first: dict[bytes, str] = {}
    once = []
    for shard, hashed in zip(shards, hashes, strict=True):
        rows = np.flatnonzero(np.isin(hashed, several))
        if len(rows):
            found, kept = table(place, shard), np.ones(shard.samples, dtype=bool)
            for row in rows:
                key = bytes(found.keys[row])
                if key in first:
                    reason = f"its key occurs in {first[key]}, too; dit pack gives every sample a key of its own"
                    damages.append(Damage(shard.name, key.decode(), reason))
                    kept[row] = False
                first.setdefault(key, shard.name)
            found = Table(found.keys[kept], found.extensions, found.offsets[kept], found.sizes[kept])
            shard = _described(shard.name, shard.bytes, shard.sha256, found)
            _write_table(target, shard, found)
        once.append(shard)
    return once, damages


def _hashes(keys: np.ndarray) -> np.ndarray:
    """(N,) 64 bits of each key, which do not depend on the length of the others."""
    words = keys.astype(f"S{-(-keys.dtype.itemsize // 8) * 8}").view(np.uint64).reshape(len(keys), -1)
    total = np.zeros(len(keys), np.uint64)
    for i, word in enumerate(words.T):
        word = word * np.uint64(0x9E3779B97F4A7C15 * (2 * i + 1) % 2**64)
        total += (word ^ (word >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return total


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
    if not name.isprintable():  # which an undecodable name is not, either
        return "its name has characters that cannot be printed"
    if len(name.encode()) > MAX_NAME_BYTES:
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


def _parsed(place: Store) -> Index | None:
    """What the manifest says; None if there is none of this version."""
    try:
        manifest = json.loads(place.read(MANIFEST))
        if manifest.pop("format", None) != FORMAT:
            return None
        manifest.pop("fingerprint")
        return Index([Shard(**shard) for shard in manifest.pop("shards")], manifest)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{place.url(MANIFEST)} is damaged ({error}): delete it, and run dit index anew") from error


def has_index(place: str | Path) -> bool:
    """Whether a folder has an index of this version.

    Raises:
        ValueError: if it is damaged.
    """
    return _parsed(Store(str(place))) is not None


def _check_shards(folder: Path, manifest: str, shards: list[Shard]) -> None:
    way_out = f"restore it, or delete {manifest} to accept the folder as it is"
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


def replace(path: Path, data: bytes) -> None:
    """Write a file as a whole, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    partial.replace(path)
