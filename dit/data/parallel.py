"""Work on many shards at once, with a line that says how far it is."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

from dit.data.store import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Sequence[Item], num_workers: int, what: str) -> Iterator[Result]:
    """function(item) of every item, in order, in processes of their own if there are several workers.

    Args:
        function: one that can be pickled.
        items: what it is called with.
        num_workers: processes.
        what: of the line that says how far it is, such as "shards indexed".
    """
    began = told = time.monotonic()
    for done, result in enumerate(_results(function, items, num_workers), 1):
        yield result
        now = time.monotonic()
        if now - began > 2 and (now - told > (0.2 if sys.stderr.isatty() else 10) or done == len(items)):
            left = (now - began) / done * (len(items) - done)
            line = f"dit: {done:,} of {len(items):,} {what}, {left:,.0f} s left"
            if sys.stderr.isatty():
                print(f"\r\033[K{line}", end="" if done < len(items) else "\n", file=sys.stderr, flush=True)
            else:
                print(line, file=sys.stderr, flush=True)
            told = now


def _results(function: Callable[[Item], Result], items: Sequence[Item], num_workers: int) -> Iterator[Result]:
    if min(num_workers, len(items)) <= 1:
        yield from map(function, items)
        return
    # A process that has threads, such as torch's, must not be forked.
    pool = ProcessPoolExecutor(min(num_workers, len(items)), mp_context=get_context("spawn"), initializer=_follow)
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool as error:
        raise DataError("a worker has died, perhaps for lack of memory: give fewer num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow() -> None:
    """Let a worker end with its parent, even one that is killed, and without a word on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
