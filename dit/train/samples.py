"""Samples that are kept on the disk until all are judged."""

import fcntl
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from dit.train.world import World

KEEP = "keep"


class Kept:
    """Parts of a set of samples, each drawn once, by whichever process.

    Args:
        folder: made here; of samples that are drawn alike.
        world: the processes that draw them together; others are refused meanwhile.
        shape: of a part, (N, H, W, C).

    Raises:
        ValueError: if others do.
    """

    def __init__(self, folder: Path, world: World, shape: tuple[int, ...]):
        self.folder, self.shape = folder, shape
        self._lock: TextIO | None = None
        world.once(self._claim)

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: these samples are being drawn just now: wait until they are") from None
        except OSError:
            pass  # a file system without locks

    def __call__(self, number: int, draw: Callable[[], Tensor]) -> Tensor:
        """The part of a number, uint8 (N, C, H, W): that of before, or drawn now and written, whole or not at all."""
        path = self.folder / f"{number:06d}.npy"
        with suppress(OSError, ValueError, EOFError):  # it is not there, or damaged
            part = np.load(path)
            if part.shape == self.shape and part.dtype == np.uint8:
                return torch.from_numpy(part).permute(0, 3, 1, 2)
        images = draw()
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.save(file, images.permute(0, 2, 3, 1).contiguous().numpy())
        partial.rename(path)
        return images

    def write(self, path: Path, number: int) -> None:
        """The first so many samples as `arr_0`, uint8 (N, H, W, C), of a `.npz` as ADM's evaluation reads it."""
        files = sorted(self.folder.glob("*.npy"))
        shape = np.load(files[0], mmap_mode="r").shape[1:]
        together = self.folder / "all.tmp"  # so that they need not be in memory
        partial = path.with_name(f"{path.name}.tmp")
        try:
            whole = np.lib.format.open_memmap(together, "w+", np.uint8, (number, *shape))
            start = 0
            for file in files:
                part = np.load(file)[: number - start]
                whole[start : start + len(part)] = part
                start += len(part)
            with partial.open("wb") as out:
                np.savez(out, whole)
            partial.rename(path)
        finally:
            together.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)

    def stay(self) -> None:
        """Keep them, whatever later evaluations of them say."""
        (self.folder / KEEP).touch()

    def drop(self) -> None:
        """Delete them, unless they are to stay."""
        if self._lock:
            self._lock.close()
        if not (self.folder / KEEP).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # others are in it
                self.folder.parent.rmdir()
