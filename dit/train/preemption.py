"""What asks a run to stop: signals, and the time limit of its SLURM job."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from types import FrameType

AGAIN = 75  # the exit code that asks to be started again
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: AGAIN, signal.SIGUSR1: AGAIN}
ECHO_SECONDS = 1.0  # one sent to a group of processes comes again from whoever forwards it
LEAST_SECONDS = 15.0  # what leaving takes besides the save


def leave_at_once() -> None:
    """From now on SIGTERM and SIGUSR1 end this process with their exit code, until another handler replaces this one.

    A thread listens, as the main one hears nothing while it waits for another process.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what a worker hears is no affair of ours
    for signum in EXIT_CODES.keys() - {signal.SIGINT}:
        signal.signal(signum, _leave_now)

    def listen() -> None:
        while heard := os.read(told, 1):
            if signal.getsignal(heard[0]) is _leave_now:
                _leave_now(heard[0], None)

    threading.Thread(target=listen, daemon=True).start()


def _leave_now(signum: int, frame: FrameType | None) -> None:
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        with suppress(OSError):
            os.write(2, b"dit: stopped; the same command starts or goes on\n")
    os._exit(EXIT_CODES[signal.Signals(signum)])  # not by an exception, which an import may catch


class Preemption:
    """Within a `with`, notes SIGINT, SIGTERM and SIGUSR1, for the run to finish its step, save and leave.

    The handlers only set a flag, which the processes of a run compare after each step. SIGINT again kills, as from a
    terminal; schedulers repeat the others.

    Args:
        speaks: whether to say so; of several processes one does.
        ends_at: when the job's time is up, in seconds since the epoch; None: there is no limit.

    Attributes:
        asked: the exit code of what asked this process to stop; 0 while nothing has.
        exit_code: the one that all processes have agreed upon; None while they go on.
    """

    def __init__(self, speaks: bool = True, ends_at: float | None = None) -> None:
        self.asked = 0
        self.exit_code: int | None = None
        self.ends_at = ends_at
        self._looked: float | None = None
        self._speaks = speaks
        self._noted: float | None = None

    def __enter__(self) -> "Preemption":
        self._previous = {signum: signal.getsignal(signum) for signum in EXIT_CODES}
        for signum in EXIT_CODES:
            signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def leave_at_once(self) -> None:
        """From now on a signal ends the process where it is, as there is nothing left to save."""
        for signum in EXIT_CODES:
            signal.signal(signum, self._leave)

    def agree(self, most: Callable[[int], int], save_seconds: float = 0.0) -> bool:
        """Whether to stop, as one process at least was asked to; what is asked meanwhile counts the next time.

        Args:
            most: a value of each process -> the largest, in all of them.
            save_seconds: what a save takes; the job's end asks when there is time for but two, and for what has passed
                since the last time.
        """
        now = time.time()
        passed, self._looked = now - (self._looked or now), now
        if (
            self.ends_at is not None
            and not self.asked
            and self.ends_at - now < 2 * save_seconds + passed + LEAST_SECONDS
        ):
            self.asked = AGAIN
            self._say(f"the job's time is up in {max(0.0, self.ends_at - now):.0f} s")
        self.exit_code = most(self.asked) or None
        if self.exit_code and not self.asked:
            self.asked = self.exit_code
            self._say("another process was asked to")
        return self.exit_code is not None

    def _say(self, why: str) -> None:
        if self._speaks:
            text = f"\ndit: stopping after this step ({why}); Ctrl-C once more to stop at once\n"
            with suppress(OSError):  # not by print, in the midst of which the signal may have come
                os.write(1, text.encode())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted = time.monotonic()
            self.asked = EXIT_CODES[signal.Signals(signum)]
            self._say(signal.Signals(signum).name)
        elif signum == signal.SIGINT and time.monotonic() - self._noted > ECHO_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_CODES[signal.Signals(signum)])


def end_of_job(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the time of this SLURM job is up, in seconds since the epoch; None: there is no job, limit or answer.

    Recent versions of SLURM say so in the environment; squeue does in all. A time that is past is of another job.
    """
    if ends := environment.get("SLURM_JOB_END_TIME"):
        return float(ends) if ends.isdecimal() and float(ends) > time.time() else None
    if "SLURM_JOB_ID" not in environment:
        return None
    job = environment["SLURM_JOB_ID"]  # of one task of an array, this is also the array's
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}"
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        until = datetime.fromisoformat(answer.split()[0]).timestamp()
        return until if until > time.time() else None
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # also of NONE, or no such job any more
        return None
