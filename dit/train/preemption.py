"""Signals that ask a run to stop."""

import os
import signal
import threading
import time
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}  # 75: start me again
ECHO_SECONDS = 1.0  # one sent to a group of processes comes again from whoever forwards it


def leave_at_once() -> None:
    """From now on SIGTERM and SIGUSR1 end this process with their exit code, until another handler replaces this one.

    A thread listens, as the main one hears nothing while it waits for another process.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what a worker hears is no affair of ours
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _leave_now)

    def listen() -> None:
        while heard := os.read(told, 1):
            if signal.getsignal(heard[0]) is _leave_now:
                _leave_now(heard[0], None)

    threading.Thread(target=listen, daemon=True).start()


def _leave_now(signum: int, frame: FrameType | None) -> None:
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        os.write(2, b"dit: stopped before training began; the same command starts again\n")
    os._exit(EXIT_CODES[signal.Signals(signum)])  # not by an exception, which an import may catch


class Preemption:
    """Within a `with`, notes the signals, for the run to finish its step, save and leave; a second one kills.

    Args:
        speaks: whether to say so; of several processes one does.

    Attributes:
        exit_code: of the signal that came; None while none has.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.exit_code: int | None = None
        self._speaks = speaks
        self._noted: float | None = None

    def __enter__(self) -> "Preemption":
        self._previous = {signum: signal.getsignal(signum) for signum in EXIT_CODES}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Take over the signals, from whoever has them now."""
        for signum in EXIT_CODES:
            signal.signal(signum, self._note)

    def leave_at_once(self) -> None:
        """From now on a signal ends the process where it is, as there is nothing left to save."""
        for signum in EXIT_CODES:
            signal.signal(signum, self._leave)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted = time.monotonic()
            self.exit_code = EXIT_CODES[signal.Signals(signum)]
            if self._speaks:
                print("\ndit: stopping after this step; once more to stop at once", flush=True)
        elif time.monotonic() - self._noted > ECHO_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_CODES[signal.Signals(signum)])
