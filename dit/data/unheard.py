"""Helpers that hear no signals, as a terminal and a scheduler send these to every process of a job."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that are started within have them blocked from birth, unless they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        ensure_running()  # of multiprocessing, which would be started with the first process, and unblocks some
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
