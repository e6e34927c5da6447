"""Whether the processes of a run are alive and get on; if not, the run ends and says whose fault it is."""

import faulthandler
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from dit.train.world import World

# In the order of a run: setup, then again and again agree to data, from the number of finished steps on.
PHASES = {
    "setup": "in its set-up",
    "agree": "after a step",
    "save": "saving",
    "preview": "drawing a preview",
    "data": "waiting for data",
    "step": "computing",
    "end": "at the end of training",
    "lost": "without another process",
    "left": "leaving",
}
SECTIONS = {"startup": "setup", "checkpoint": "save", "evaluation": "end", "other": "end"}  # and others by their names
WORKING = ("agree", "data", "step")  # the others may take as long as they like
FIRST_STEP = 4  # times the timeout, for what is compiled and tuned in it
TICKS = 50  # of a timeout
TICK_SECONDS = 1.0  # at most, of few processes
LEAVE_SECONDS = 1.0


class Pulse(NamedTuple):
    """What a process says of itself.

    Attributes:
        beat: number of the pulse; one that lives goes on counting.
        step: finished ones.
        phase: one of PHASES.
        calls: of other processes, of any kind: who is behind the others has not joined a call in which they wait.
        first: whether this process has not finished a step yet.
        host: where it is.
        pid: of the process there.
        verdict: whose fault the end of the run is, once this process has dumped its stacks.
    """

    beat: int = 0
    step: int = 0
    phase: str = "setup"
    calls: int = 0
    first: bool = True
    host: str = ""
    pid: int = 0
    verdict: str = ""

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it is."""
        return self.step, list(PHASES).index(self.phase), self.calls


class Judge:
    """Says from the pulses of all processes which one is silent, or stands where the others wait for it.

    Time is counted from look to look; a gap in which this process itself stood still, as when a whole job is suspended,
    counts little.

    Args:
        rank: of this process.
        timeout_seconds: of silence, or in which nobody gets on.

    Attributes:
        silent: for how long who has not answered.
        unanswered: for how long the store has not, in which the pulses are.
    """

    def __init__(self, rank: int, timeout_seconds: float):
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self.silent: dict[int, float] = {}
        self.unanswered = 0.0
        self._still = 0.0
        self._before: Mapping[int, Pulse] = {}
        self._now = math.nan

    def verdict(self, now: float, pulses: Mapping[int, Pulse], answered: bool) -> str:
        """Whose fault it is that the run cannot go on; empty while it can.

        Args:
            now: of a clock, in seconds.
            pulses: the newest of each process.
            answered: whether the store has answered since the last time.
        """
        passed = 0.0 if math.isnan(self._now) else min(now - self._now, self.timeout_seconds / 10)
        self._now = now
        for rank, pulse in pulses.items():
            same = rank in self._before and pulse.beat == self._before[rank].beat
            quiet = same and rank != self.rank and pulse.phase != "left"
            self.silent[rank] = self.silent.get(rank, 0.0) + (passed if answered else 0.0) if quiet else 0.0
        self.unanswered = 0.0 if answered else self.unanswered + passed
        there = {rank: pulse for rank, pulse in pulses.items() if pulse.phase != "left"}
        still = all(rank in self._before and pulse.place == self._before[rank].place for rank, pulse in there.items())
        working = all(pulse.phase in WORKING for pulse in there.values())
        self._still = self._still + passed if still and working else 0.0
        self._before = dict(pulses)

        if told := next((pulse.verdict for pulse in pulses.values() if pulse.verdict), ""):
            return told
        stands = self._still >= self.timeout_seconds * (FIRST_STEP if any(p.first for p in there.values()) else 1)
        if silent := self.gone(self.timeout_seconds * (0.9 if stands else 1)):  # who is silent has not got on, either
            for_long = f"{self.timeout_seconds:g} s"
            return f"{_named(silent, pulses)} {'has' if len(silent) == 1 else 'have'} not answered for {for_long}"
        if stands:
            behind = min(pulse.place for pulse in there.values())
            late = [rank for rank, pulse in there.items() if pulse.place == behind]
            if len(late) == len(pulses) > 1:
                return f"no process has got on for {self._still:.0f} s: {_named(late, pulses)}"
            others = f", and {'the others wait' if len(pulses) > 2 else 'the other waits'}" if len(pulses) > 1 else ""
            return f"{_named(late, pulses)} has not got on for {self._still:.0f} s{others}"
        return ""

    def gone(self, seconds: float) -> list[int]:
        """Who has not answered for so long; if the store has not, it is rank 0, which holds it."""
        if self.unanswered >= seconds:
            return [0]
        # Those of a machine that is lost fall silent together.
        longest = max(self.silent.values(), default=0.0)
        return [rank for rank, quiet in self.silent.items() if longest >= seconds and quiet >= 0.9 * seconds]


class Watchdog:
    """Ends the run where a process is dead or hangs, with the stacks of the others in `stacks`.

    A thread exchanges pulses over a connection of its own; another judges, as an exchange with a process that stands
    still never ends. What the main thread does is marked by `at`.

    Args:
        world: the processes.
        folder: of the run.
        timeout_seconds: of silence or of standing still; None: whatever happens is waited for.
    """

    def __init__(self, world: World, folder: Path, timeout_seconds: float | None):
        self.world = world
        self.folder = folder / "stacks"
        self.timeout_seconds = timeout_seconds
        self._place: tuple[int, str, bool] = 0, "setup", True
        self._verdict = ""
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._exchanged = 0
        self._pulses: dict[int, Pulse] = {rank: Pulse() for rank in range(world.size)} | {world.rank: self._own()}
        self._judge: Judge | None = None
        self._broken = False
        self._stop = threading.Event()
        self._exchange_thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch, in all processes."""
        if self._judge or self.timeout_seconds is None:
            return
        self.tick_seconds = min(self.timeout_seconds / TICKS, max(TICK_SECONDS, self.world.size / 64))
        self._judge = Judge(self.world.rank, self.timeout_seconds)
        if self.world.size > 1:
            prefix = self.world.once(self._lay_out)
            self._exchange_thread = threading.Thread(target=self._exchange, args=(prefix,), daemon=True)
            self._exchange_thread.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, phase: str, step: int | None = None) -> None:
        """Mark where the main thread is.

        Args:
            phase: one of PHASES.
            step: number of finished steps; None: as before.
        """
        assert phase in PHASES
        before, _, first = self._place
        self._place = before if step is None else step, phase, first and phase != "agree"

    def enters(self, section: str, step: int | None) -> None:
        """Mark where the main thread is, in the words of `goodput.Clock`."""
        self.at(SECTIONS.get(section, section), step)

    def culprit(self) -> str:
        """Who is gone, as another process has just found it cannot be reached; empty if that cannot be known."""
        if not self._judge:
            return ""
        self.at("lost")
        enough = 1.5 * self.tick_seconds + 1.0
        until = time.monotonic() + enough + 1.5
        while time.monotonic() < until:
            gone = self._judge.gone(enough) or [rank for rank, pulse in self._pulses.items() if pulse.phase == "left"]
            if not gone and self._broken and self._pulses[0].phase != "lost":
                gone = [0]
            if gone:
                return f"{_named(gone, self._pulses)} {'is' if len(gone) == 1 else 'are'} gone"
            time.sleep(self.tick_seconds / 2)
        return ""

    def stop(self) -> None:
        """Take leave of the others, and watch no longer."""
        if self._place[1] != "lost":
            self.at("left")
        self._stop.set()
        if self._exchange_thread:
            self._exchange_thread.join(2 * LEAVE_SECONDS)

    def _lay_out(self) -> str:
        """Room for the pulses of this run alone, made by the first process."""
        prefix, store = f"dit-{os.urandom(8).hex()}", self.world.store()
        for rank in range(self.world.size):
            store.set(f"{prefix}/{rank}", json.dumps(Pulse()))
        return prefix

    def _own(self) -> Pulse:
        step, phase, first = self._place
        return Pulse(self._exchanged + 1, step, phase, _calls(), first, self._host, self._pid, self._verdict)

    def _exchange(self, prefix: str) -> None:
        keys = [f"{prefix}/{rank}" for rank in range(self.world.size)]
        try:
            store = self.world.store()

            def read() -> None:
                self._pulses = dict(enumerate(Pulse(*json.loads(pulse)) for pulse in store.multi_get(keys)))

            while True:
                store.set(keys[self.world.rank], json.dumps(self._own()))
                if self._stop.is_set():
                    break
                read()
                self._exchanged += 1
                self._stop.wait(self.tick_seconds)
            until = time.monotonic() + LEAVE_SECONDS
            while self.world.is_first and time.monotonic() < until and not self._alone():
                time.sleep(0.01)  # as the store may end with this process, and torch is loud where it is missed
                read()
        except dist.DistError:  # the process that held it is gone
            self._broken = True

    def _alone(self) -> bool:
        """Whether all others are done with the store."""
        return all(pulse.phase in ("lost", "left") for rank, pulse in self._pulses.items() if rank != self.world.rank)

    def _watch(self) -> None:
        assert self._judge
        seen = 0
        while not self._stop.wait(self.tick_seconds):
            answered = self.world.size == 1 or self._exchanged > seen
            seen = self._exchanged
            if self.world.size == 1:
                self._pulses = {0: self._own()}
            if verdict := self._judge.verdict(time.monotonic(), self._pulses, answered):
                self._end(verdict)

    def _end(self, verdict: str) -> None:
        """Leave the stacks, wait until the others have, and end this process."""
        assert self._judge and self.timeout_seconds
        patience = min(5.0, self.timeout_seconds / 25)
        _within(patience, lambda: self._dump(verdict))
        self._verdict = verdict
        gone = self._judge.gone(0.9 * self.timeout_seconds)  # another may have judged a tick earlier
        alive = {rank for rank in self._pulses if rank not in gone}
        until = time.monotonic() + patience
        while time.monotonic() < until and not self._broken and not self._agreed(alive):
            time.sleep(self.tick_seconds / 4)
        # Who else lives is not known if the store is gone: then one of each node speaks.
        speaks = self.world.rank == min(alive) or (0 not in alive and self.world.local_rank == 0)
        if speaks:
            line = (
                f"dit: {verdict}; stacks are in {self.folder}; the same command goes on from the newest checkpoint "
                f"(trainer.timeout_seconds={self.timeout_seconds:g})\n"
            )
            _within(1.0, lambda: os.write(2, line.encode()))
        os._exit(1)

    def _agreed(self, alive: Collection[int]) -> bool:
        return all(self._pulses[rank].verdict or self._pulses[rank].phase == "left" for rank in alive)

    def _dump(self, verdict: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.world.rank}.txt").open("a") as file:
                now = datetime.now().astimezone().isoformat(timespec="seconds")
                file.write(f"{now} {_named([self.world.rank], {self.world.rank: self._own()})}; {verdict}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError:  # such as a full disk
            faulthandler.dump_traceback(all_threads=True)


def _named(ranks: Collection[int], pulses: Mapping[int, Pulse]) -> str:
    """Who they are, where, and what they did."""
    words = [f"rank {r} ({pulses[r].host}, pid {pulses[r].pid}; {_where(pulses[r])})" for r in list(ranks)[:8]]
    more = [f"{len(ranks) - 8} more"] if len(ranks) > 8 else []
    return ", ".join(words + more)


def _where(pulse: Pulse) -> str:
    return PHASES[pulse.phase] + (f", {pulse.step} steps finished" if pulse.phase != "setup" else "")


def _calls() -> int:
    """Of other processes, in all groups; the numbers are read, the groups are left alone."""
    calls = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        for device in group._device_types:
            with suppress(RuntimeError, AttributeError):  # a backend that does not count, or is made at its first call
                calls += group._get_backend(device)._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return calls


def _within(seconds: float, work: Callable[[], Any]) -> None:
    """Do something that may never end, as on a file system that does not answer, for so long at most."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
