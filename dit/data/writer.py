"""Write samples into WebDataset tar shards."""

import io
import itertools
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from dit.data import index
from dit.data.scan import scan


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> index.Shard:
    """Write samples, (key, files by their extension), as one tar with its table; it appears whole or not.

    The same samples give the same bytes.

    Raises:
        ValueError: if there is no sample, or a name is none that can be indexed.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, files in samples:
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found, damages = scan(partial)
    if damages:
        partial.unlink()
        raise ValueError(f"{path} cannot be written: {damages[0]}")
    partial.replace(path)
    return index.save(path.parent, path, found)


def write_shards(folder: Path, samples: Iterable[Mapping[str, bytes]], samples_per_shard: int) -> None:
    """Write samples as `000000.tar`, ... with an index; the folder appears whole or not.

    Member names are `<number>.<extension>`, such as `png`, `cls` (a class in ASCII) and `txt` (a caption).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    partial.chmod(0o755)
    numbered = ((f"{number:08d}", files) for number, files in enumerate(samples))
    shards = []
    for number in itertools.count():
        if not (chunk := list(itertools.islice(numbered, samples_per_shard))):
            break
        shards.append(write_shard(partial / f"{number:06d}.tar", chunk))
    index.commit(partial, shards, {})
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
        index.read(folder)


def check_apart(folder: Path, other: Path) -> None:
    """See that nothing is written where something is read.

    Raises:
        ValueError: if one of the two folders stands in the other.
    """
    one, two = folder.resolve(), other.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise ValueError(f"{folder} stands in {other}, or this in that: give a folder of its own")
