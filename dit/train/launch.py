"""Several processes on this machine, as torchrun would start them, for `dit train trainer.devices=N`."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dit.data.unheard import unheard
from dit.train.preemption import ECHO_SECONDS, EXIT_CODES, leave_at_once

GRACE_SECONDS = 5.0  # for the others to end by themselves once one has failed
STOP_SECONDS = 600.0  # and once one has been stopped by a signal, as all are, and has ended before the others


def launch(work: Callable[[Any], int], argument: Any, num_processes: int) -> int:
    """Run `work(argument)` in so many processes that know each other by the environment of torchrun.

    They are forked from a server that has imported torch and nothing else done, so that they start together and at
    once. If one fails the others are ended after a while, so that none waits for it for ever.

    Args:
        work: a function of a module, that gives an exit code.
        argument: what can be pickled.
        num_processes: how many.

    Returns:
        0 if all ended so, or the exit code of the first that did not; 128 + n for one killed by signal n.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dit.train.preload"])
    # They meet in this process, as at torchrun's agent: a port that is merely free may be taken before they use it.
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {**os.environ, "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    processes = [context.Process(target=_begin, args=(env, work, argument)) for env in environments]

    asked: list[float] = []  # when signals came that ask to stop
    insisted: list[int] = []  # those that came again

    def stop(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if asked and time.monotonic() - asked[0] > ECHO_SECONDS:  # some may wait for each other, and hear nothing
                print("\ndit: stopped at once", file=sys.stderr)
                insisted.append(signum)
            signum = signal.SIGKILL if insisted else 0  # a terminal sends the first one to the processes, too
        asked.append(time.monotonic())
        for process in processes:
            if signum and process.pid and process.is_alive():
                os.kill(process.pid, signum)

    here = threading.current_thread() is threading.main_thread()
    before = {signum: signal.getsignal(signum) for signum in EXIT_CODES} if here else {}
    try:
        with unheard():  # by the server, and by those it forks until they are ready to hear
            for process in processes:
                process.start()
        for signum in before:  # until here a signal ends this process, and with it the others
            signal.signal(signum, stop)
        code, cause = _first_code(processes)
        if insisted:
            return 128 + insisted[0]
        if cause:  # last, where it is seen
            print(f"dit: {cause}; the same command goes on from the newest checkpoint", file=sys.stderr)
        return code
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _first_code(processes: Sequence[BaseProcess]) -> tuple[int, str]:
    """The exit code of the first process that fails, and if by a signal, in words; the others are given time to end."""
    running, code, until, cause = list(processes), 0, float("inf"), ""
    while running:
        wait([process.sentinel for process in running], timeout=min(1.0, max(0.0, until - time.monotonic())))
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            ended = process.exitcode or 0
            if ended and not code:
                code = ended if ended > 0 else 128 - ended
                until = time.monotonic() + (STOP_SECONDS if code in EXIT_CODES.values() else GRACE_SECONDS)
                if ended < 0:
                    name = signal.Signals(-ended).name
                    cause = f"the process of rank {processes.index(process)} was ended by {name}"
        late = time.monotonic() > until
        for process in running if code else ():
            if late or _is_stopped(process):
                print(f"dit: ending rank {processes.index(process)}, which still waits", file=sys.stderr)
                process.kill()
        until = float("inf") if late else until
    return code, cause


def _is_stopped(process: BaseProcess) -> bool:
    """Whether by SIGSTOP, so that no grace would help it."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _begin(environment: dict[str, str], work: Callable[[Any], int], argument: Any) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ |= environment
    leave_at_once()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(EXIT_CODES))
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    end_with_parent()
    code = work(argument)
    for signum in EXIT_CODES:
        signal.signal(signum, signal.SIG_IGN)  # one that comes now would change it
    raise SystemExit(code)


def end_with_parent() -> None:
    """Have this process end when the one that began it does: what nobody waits for must not go on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=[parent], daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
