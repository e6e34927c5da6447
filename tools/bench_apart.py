"""Objects in processes of their own, which benches measure in turn: each has memory to itself, as a run has."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from dit.train.launch import end_with_parent

_made: Any = None  # in the process of an Apart, its object


class Apart:
    """An object in a process of its own, whose methods are called from here; a `with` ends it.

    Args:
        make: what makes it there. It can be pickled, as what it takes, and what methods take and return.
        *args: of it.

    Raises:
        ValueError: if the process is killed.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
        try:
            self._run(_make, torch.get_num_threads(), make, args)
        except BaseException:
            self._pool.shutdown()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """What this method of the object returns."""
        return self._run(_call, method, args)

    def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._pool.submit(work, *args).result()
        except BrokenProcessPool as error:
            raise ValueError("the process of a row was killed, for its memory perhaps: take fewer images") from error

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _make(threads: int, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _made
    torch.set_num_threads(threads)
    _made = make(*args)


def _call(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_made, method)(*args)
