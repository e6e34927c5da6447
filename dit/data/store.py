"""A folder of files, local or behind a URL, and a bounded cache of what was fetched."""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import io
import os
import queue
import random
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

SCHEMES = ("s3", "gs", "gcs", "https", "http", "hf", "memory")
HINTS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
ATTEMPTS, ATTEMPTS_WHILE_TRAINING = 6, 18  # three seconds, and about ten minutes
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.1, 60.0  # doubled after each attempt
MAX_OPEN = 256  # files
PREFETCHERS = 2
STALE_SECONDS = 86400  # after which what a killed process has left of a file is removed

Result = TypeVar("Result")


class DataError(RuntimeError):
    """A sample or shard that cannot be used, met while training."""

    exit_code = 3


class Store:
    """The files of a folder: read where they are, or fetched through fsspec with retries.

    Args:
        folder: a path, or a URL of one of the schemes s3, gs, https, http, hf. Nothing is ever run by a shell.
        cache: where fetched shards are kept.
        cache_bytes: how much of them; the ones that were not used for longest go first.

    Raises:
        ValueError: if the scheme is another one.
        ImportError: if what a scheme needs is missing.
    """

    def __init__(self, folder: str, cache: str | Path | None = None, cache_bytes: int = 2**36):
        scheme = re.match(r"([A-Za-z][\w+.-]*)::?//|(pipe):", folder)
        self.scheme = (scheme[1] or scheme[2]).lower() if scheme else ""
        if self.scheme == "file":
            folder, self.scheme = folder.split("://", 1)[1], ""
        if self.scheme and self.scheme not in SCHEMES:
            raise ValueError(
                f"{folder}: {self.scheme} is no place for data; give a folder, or one of s3://, gs://, https://, hf://"
            )
        self.folder = folder.rstrip("/") if folder != "/" else folder
        self.cache = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit"
        self.cache_bytes = cache_bytes
        self.remote = bool(self.scheme)
        if self.remote:
            self._filesystem()
        self._open: OrderedDict[tuple[str, str], io.FileIO] = OrderedDict()  # closed when they are forgotten
        self._wishes: queue.SimpleQueue[tuple[str, int, str]] | None = None

    def url(self, name: str) -> str:
        """Where a file is."""
        return f"{self.folder}/{name}"

    def names(self, pattern: str) -> list[str]:
        """The files of the folder by a pattern with `*`, sorted, or with `{000..123}`, in that order.

        Raises:
            ValueError: if there is none.
        """
        if "/" in pattern:
            raise ValueError(f"shards={pattern}: give the names of files in {self.folder}, not in folders below it")
        if "{" in pattern:
            from braceexpand import braceexpand

            return list(braceexpand(pattern))
        if self.remote:
            listed = self._again(lambda: self._filesystem().ls(self.folder, detail=False), self.folder)
            names = [str(path).rstrip("/").rpartition("/")[2] for path in listed]
        else:
            if not Path(self.folder).is_dir():
                raise ValueError(
                    f"the data folder {self.folder} does not exist: give the one that holds the .tar shards"
                )
            names = [path.name for path in Path(self.folder).iterdir()]
        if not (found := sorted(name for name in names if fnmatch.fnmatch(name, pattern))):
            kind = ".tar shard" if pattern == "*.tar" else pattern
            raise ValueError(f"{self.folder} holds no {kind}")
        return found

    def read(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: if it is not there.
            DataError: if it cannot be fetched.
        """
        if not self.remote:
            return Path(self.url(name)).read_bytes()
        data: bytes = self._again(lambda: self._filesystem().cat_file(self.url(name)), self.url(name))
        return data

    @contextlib.contextmanager
    def borrowed(self, name: str) -> Iterator[Path]:
        """A file as a local one, for the length of a `with`."""
        if not self.remote:
            yield Path(self.url(name))
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.cache, prefix="borrowed."))
        try:
            path = folder / Path(name).name
            self._again(lambda: self._filesystem().get_file(self.url(name), str(path)), self.url(name))
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def open(self, name: str, size: int, sha256: str) -> int:
        """A file descriptor of a file of known contents, which belongs to the store.

        Raises:
            DataError: if it is not there, cannot be fetched, or is another one.
        """
        if (name, sha256) in self._open:
            self._open.move_to_end((name, sha256))
            return self._open[name, sha256].fileno()
        while True:
            path = self._fetch(name, size, sha256, ATTEMPTS_WHILE_TRAINING) if self.remote else Path(self.url(name))
            try:
                file = io.FileIO(path)
            except FileNotFoundError as error:
                if self.remote:  # another process has just made room
                    continue
                raise DataError(f"the shard {path} is missing") from error
            except OSError as error:
                raise DataError(f"the shard {path} cannot be read: {error}") from error
            if (found := os.fstat(file.fileno()).st_size) == size:
                break
            if not self.remote:
                raise DataError(
                    f"the shard {path} has {found} bytes instead of {size}: it was changed since it was indexed"
                )
            path.unlink(missing_ok=True)  # a machine that lost power, perhaps
        if self.remote:  # what was removed to make room takes room as long as it is open
            for key in [key for key, old in self._open.items() if not os.fstat(old.fileno()).st_nlink]:
                del self._open[key]
        self._open[name, sha256] = file
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return file.fileno()

    def prefetch(self, name: str, size: int, sha256: str) -> None:
        """Begin to fetch a file that will be opened soon; if that fails, opening it tries again."""
        if not self.remote or (name, sha256) in self._open:
            return
        if self._wishes is None:
            self._wishes = queue.SimpleQueue()
            for _ in range(PREFETCHERS):  # daemons, for which the end of a process does not wait
                threading.Thread(target=self._grant, args=(self._wishes,), daemon=True).start()
        self._wishes.put((name, size, sha256))

    def _grant(self, wishes: "queue.SimpleQueue[tuple[str, int, str]]") -> None:
        while True:
            name, size, sha256 = wishes.get()
            with contextlib.suppress(Exception):
                self._fetch(name, size, sha256, 1)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a process: open files, threads."""
        return {**self.__dict__, "_open": OrderedDict(), "_wishes": None}

    def _fetch(self, name: str, size: int, sha256: str, attempts: int) -> Path:
        """Where a file is in the cache, fetched if it is not there."""
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / f"{sha256}.tar"
        if self._used(path):
            return path
        with (self.cache / f"{sha256}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process fetches, the others wait
            if self._used(path):
                return path
            partial = path.with_suffix(f".{uuid4().hex[:12]}.tmp")
            try:
                self._again(lambda: self._download(name, partial, size, sha256), self.url(name), attempts)
                self._make_room(size)
                partial.replace(path)
            except FileNotFoundError as error:
                raise DataError(f"the shard {self.url(name)} is missing") from error
            finally:
                partial.unlink(missing_ok=True)
        return path

    def _download(self, name: str, partial: Path, size: int, sha256: str) -> None:
        self._filesystem().get_file(self.url(name), str(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
            if partial.stat().st_size != size or hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise OSError("what came is not the shard of the index")

    def _used(self, path: Path) -> bool:
        """Whether a file is in the cache; if so, it is young again."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest, until so many more bytes fit."""
        kept = []
        for stale in (*self.cache.glob("*.tmp"), *self.cache.glob("borrowed.*")):
            with contextlib.suppress(OSError):
                if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for path in self.cache.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                kept.append((path.stat().st_mtime, path.stat().st_size, path))
        total = size + sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if total <= self.cache_bytes:
                break
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
            total -= bytes_

    def _filesystem(self) -> Any:
        """That of the scheme; fsspec keeps one a process."""
        import fsspec

        try:
            return fsspec.filesystem(self.scheme)
        except ImportError as error:
            raise ImportError(f"{self.folder} needs {HINTS[self.scheme]}: pip install {HINTS[self.scheme]}") from error

    def _again(self, function: Callable[[], Result], url: str, attempts: int = ATTEMPTS) -> Result:
        """The result of a function that may fail for a while; but not of a file that is not there, or is forbidden."""
        for attempt in range(1, attempts + 1):
            try:
                return function()
            except FileNotFoundError:
                raise
            except Exception as error:  # each store raises its own kinds
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise DataError(f"there is no room left in {self.cache} for {url}") from error
                if attempt == attempts or isinstance(error, PermissionError):
                    raise DataError(f"{url} cannot be fetched, {attempt} times tried: {error}") from error
                pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)) * (0.5 + random.random())
                if pause > 5:
                    print(f"dit: WARNING: {url} cannot be fetched ({error}); again in {pause:.0f} s", flush=True)
                time.sleep(pause)
        raise AssertionError
