"""The index of a folder of tar shards: where every file of every sample lies, and whether it is all still there.

Beside each shard stands a table of its samples, `<shard>.index.npz`, and beside them all `manifest.json`. Making them
is the check of integrity; with them, any sample is read by a seek.
"""

import functools
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from dit.data.parallel import each
from dit.data.scan import Damage, Table, lines, scan
from dit.data.store import Store

MANIFEST = "manifest.json"
FORMAT = 3
VERIFY_BYTES = 2**30  # above this, only sizes are compared when a run starts


class Shard(NamedTuple):
    """One tar file of samples."""

    name: str
    samples: int
    bytes: int
    sha256: str
    keys: str  # a hash of the samples that are read of it, and of their order
    files: dict[str, int]  # by extension, how many samples have one


class Index(NamedTuple):
    """The shards of a folder, and what was said of them when they were written."""

    shards: list[Shard]
    about: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What tells these samples from others."""
        return hashlib.sha256("".join(shard.sha256 + shard.keys for shard in self.shards).encode()).hexdigest()[:16]


def write(
    folder: str | Path,
    *,
    shards: str = "*.tar",
    out: str | Path | None = None,
    require: Sequence[Sequence[str]] = (),
    lenient: bool = False,
    num_workers: int = 1,
) -> Index:
    """Look at every byte of the shards of a folder and write their tables and manifest, all or nothing.

    Args:
        folder: of the shards, a path or a URL.
        shards: their names, a pattern as of the shell, with `*` or `{0000..0099}`.
        out: where tables and manifest are written, if not beside the shards.
        require: of each of these groups of extensions a sample must have one.
        lenient: leave out what is damaged, which `left_out.jsonl` then names, instead of refusing it.
        num_workers: processes.

    Raises:
        ValueError: if there is no shard, or, unless lenient, anything is damaged, with a list.
        OSError: if something cannot be read or written.
        DataError: if something cannot be fetched.
    """
    store = Store(str(folder))
    names = store.names(shards)
    target = Path(out) if out else Path(folder)
    if out is None and store.remote:
        raise ValueError(f"{folder} is remote, so the index needs a folder of its own: give out=<folder>")
    partial = target / f".index.{uuid4().hex[:12]}.tmp"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"{target} cannot be written to ({error.strerror}): give the index another folder, by dit index "
            f"path={folder} out=<folder>, and for training data.index=<that folder>"
        ) from error
    try:
        indexed, damages = [], []
        job = functools.partial(_indexed, store=store, target=partial, require=require)
        for shard, damaged in each(job, names, num_workers, "shards indexed"):
            indexed.append(shard)
            damages += damaged
        indexed, twice = _twice(partial, indexed)
        damages += twice
        if damages and not lenient:
            more = f"\n  and {len(damages) - 10} more" if len(damages) > 10 else ""
            listed = "\n  ".join(str(damage) for damage in damages[:10])
            raise ValueError(
                f"{folder} is damaged:\n  {listed}{more}\n"
                f"mend it, or leave that out: dit index path={folder} lenient=true"
            )
        empty = [shard.name for shard in indexed if not shard.samples]
        indexed = [shard for shard in indexed if shard.samples]
        if not indexed:
            raise ValueError(f"{folder} holds no sample")
        about: dict[str, Any] = {} if shards == "*.tar" else {"pattern": shards}
        (target / "left_out.jsonl").unlink(missing_ok=True)  # of an index before
        if damages:
            replace(target / "left_out.jsonl", lines(damages))
            print(f"dit: {len(damages)} left out, the first {damages[0]}; all: {target / 'left_out.jsonl'}")
            about |= {"left_out": len(damages), "empty": empty}
        for shard in indexed:
            (partial / _table_name(shard.name)).replace(target / _table_name(shard.name))
        return commit(target, indexed, about)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    _check_names(stores[0], found, place or folder)
    job = functools.partial(_changed, store=stores[0], place=stores[1])
    changed = [damage for damage in each(job, found.shards, num_workers, "shards verified") if damage]
    return found, changed


def _changed(shard: Shard, store: Store, place: Store) -> Damage | None:
    try:
        table(place, shard)
        with store.borrowed(shard.name) as path:
            if sha256(path) != shard.sha256:
                return Damage(shard.name, "", "its bytes are not those that were indexed")
    except FileNotFoundError:
        return Damage(shard.name, "", "it is missing")
    except ValueError as error:
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
    if not place.remote and not Path(place.folder).is_dir():
        raise ValueError(f"data.index={index} does not exist: dit index path={folder} out={index} writes it")
    elsewhere = f"run dit index path={folder} out=<folder> once, and give data.index=<folder>"
    if (found := _parsed(place)) is None:
        if store.remote:
            raise ValueError(
                f"{index or folder} has no {MANIFEST} of this version: {elsewhere}, or copy it beside them"
            )
        print(f"dit: {folder} has no index of this version and is indexed now, once (dit index is faster)", flush=True)
        return write(folder, out=index)
    if not store.remote:
        _check_shards(Path(folder), place.url(MANIFEST), found.shards)
        for shard in found.shards if not place.remote else ():
            if not (path := Path(place.url(_table_name(shard.name)))).is_file():
                raise ValueError(f"{path} of the index is missing: run dit index path={folder} again=true")
        _check_names(store, found, index or folder)
    return found


def has_index(place: str | Path) -> bool:
    """Whether a folder has an index of this version.

    Raises:
        ValueError: if it is damaged.
    """
    return _parsed(Store(str(place))) is not None


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
        url = place.url(_table_name(shard.name))
        raise ValueError(f"{url} is not that of its shard: run dit index path={place.folder} again=true")
    return found


def load(place: Store, name: str) -> tuple[Shard, Table]:
    """The description and the table of the shard of a name, as `save` wrote them.

    Raises:
        ValueError: if they are missing or damaged.
    """
    try:
        data = place.read(_table_name(name))
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            if any(part.compress_type or part.file_size > len(data) for part in parts.infolist()):
                raise ValueError("it is compressed, which no table is")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = Table(arrays["keys"], arrays["extensions"].tolist(), arrays["offsets"], arrays["sizes"])
            size, sha256 = int(arrays["bytes"]), str(arrays["sha256"])
        if not found.offsets.shape == found.sizes.shape == (len(found.keys), len(found.extensions)):
            raise ValueError("its columns have different lengths")
        if ((found.sizes < 0) | (found.sizes > size) | (found.offsets > size - found.sizes)).any():
            raise ValueError("files lie outside of the shard")
    except Exception as error:  # numpy and zipfile raise many kinds
        url = place.url(_table_name(name))
        reason = type(error).__name__  # numpy's words would advise to unpickle it
        way_out = f"run dit index path={place.folder} again=true"
        raise ValueError(f"{url} is missing or damaged ({reason}): {way_out}") from error
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
    keys = hashlib.sha256(b"\n".join(found.keys.tolist())).hexdigest()[:16]
    return Shard(name, len(found.keys), size, sha256, keys, files)


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


def _indexed(name: str, store: Store, target: Path, require: Sequence[Sequence[str]]) -> tuple[Shard, list[Damage]]:
    try:
        with store.borrowed(name) as path:
            found, damages = scan(path, require)
            return save(target, path, found), damages
    except FileNotFoundError:
        return Shard(name, 0, 0, "", "", {}), [Damage(name, "", "it is missing")]


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


def _parsed(place: Store) -> Index | None:
    """What the manifest says; None if there is none of this version."""
    try:
        manifest = json.loads(place.read(MANIFEST))
        if (version := manifest.pop("format", 0)) != FORMAT:
            if version > FORMAT:
                raise ValueError(f"it is of a later version, {version}")
            return None
        manifest.pop("fingerprint")
        shards = [Shard(**shard) for shard in manifest.pop("shards")]
        if bad := [shard.name for shard in shards if shard.name.startswith(".") or set("/\\\0") & set(shard.name)]:
            raise ValueError(f"the name {bad[0]!r} leads out of the folder")
        return Index(shards, manifest)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{place.url(MANIFEST)} is damaged ({error}): delete it, and run dit index anew") from error


def _check_names(store: Store, found: Index, place: str | Path) -> None:
    """See whether there are shards that the index does not know."""
    pattern = found.about.get("pattern", "*.tar")
    if not store.remote and "{" not in pattern:
        known = {shard.name for shard in found.shards} | set(found.about.get("empty", ()))
        if new := [name for name in store.names(pattern) if name not in known]:
            more = f" and {len(new) - 3} more" if len(new) > 3 else ""
            raise ValueError(
                f"{store.folder} has shards that its index in {place} lacks, {', '.join(new[:3])}{more}: take them "
                f"away, or run dit index path={store.folder} again=true"
            )


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
    partial = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    partial.write_bytes(data)
    partial.replace(path)
