"""Write samples into WebDataset tar shards."""

import io
import itertools
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dit.data import index


def write_shards(folder: Path, samples: Iterable[dict[str, bytes]], samples_per_shard: int) -> None:
    """Write samples, files by their extension, as `000000.tar`, ... with a manifest; the folder appears whole or not.

    Member names are `<number>.<extension>`, such as `png`, `cls` (a class in ASCII) and `txt` (a caption). The same
    samples give the same bytes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    partial.chmod(0o755)
    numbered = enumerate(samples)
    for shard in itertools.count():
        chunk = list(itertools.islice(numbered, samples_per_shard))
        if not chunk:
            break
        with tarfile.open(partial / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, files in chunk:
                for extension, data in files.items():
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index.write(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
        index.read(folder)
