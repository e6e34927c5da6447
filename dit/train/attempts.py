"""The starts of a run: what each did and how it ended, in `<run>/attempts/`, by the first process.

0003.json    when it began and from which step, where it got, its seconds by section, how it ended; replaced as a whole
             every few seconds, so that a kill at any moment, or a full disk, leaves the one of before
0003.at      the step that it is about to do, and the time, written in place before each step: they outlive the
             process, which is not made to wait for a disk
code-*.diff  what the code had of its own beside its revision, see `environment`
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dit.train.environment import code, summary
from dit.train.files import replace

if TYPE_CHECKING:  # which import torch; reading needs none
    from dit.train.goodput import Clock
    from dit.train.world import World

NAME = "attempts"
NOTE_SECONDS = 5.0
IN_A_ROW = 3  # crashes at one step that are no chance
NOT_OF_THE_STEP = (0, 4, 5, 75, 130)  # exit codes: done, no room, too many steps left out, asked to stop
SHAPE: dict[str, Any] = {  # of what others read
    **dict.fromkeys(("attempt", "from_step", "world_size", "step", "at", "redone", "replaced"), int),
    **dict.fromkeys(("began", "noted"), (int, float)),
    **{"left_out": list, "seconds": dict, "environment": dict, "ended": (dict, type(None))},
}


class PoisonError(Exception):
    """A step ended several starts in a row."""

    exit_code = 5


def read(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first, as their files have it; one that a lost machine has emptied is left out.

    What its last step says of one that was killed is in `at`, `step`, and `seen`, its last sign of life.
    """
    starts = []
    for path in _files(folder / NAME):
        with suppress(OSError, ValueError, LookupError, TypeError):
            start: dict[str, Any] = json.loads(path.read_bytes())
            if not SHAPE.keys() <= start.keys() or not all(isinstance(start[key], SHAPE[key]) for key in SHAPE):
                continue
            for moment in (start["began"], start["noted"]):
                time.gmtime(moment)  # or it is none
            start["seen"] = start["noted"]
            if start["ended"] is None:
                with suppress(OSError, ValueError):
                    at, seen = path.with_suffix(".at").read_text().split()
                    start["seen"] = max(start["noted"], float(seen))
                    start["at"] = int(at)
                    start["step"] = start["at"] - 1 if start["at"] else start["step"]
            starts.append(start)
    return starts


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.json") if re.fullmatch(r"\d+", path.stem))


def crashed_at(starts: Sequence[Mapping[str, Any]]) -> int | None:
    """The step at which each of the last few starts crashed; None if they did not, or not at the same."""
    last = [start["at"] for start in starts[-IN_A_ROW:] if (start["ended"] or {}).get("code", 1) not in NOT_OF_THE_STEP]
    return last[0] if len(last) == IN_A_ROW and len(set(last)) == 1 and last[0] else None


def how_ended(start: Mapping[str, Any]) -> str:
    """How a start ended, in words."""
    if start["ended"] is None:
        return f"no end, last seen at step {start['at'] or start['step']}"
    code, error = start["ended"]["code"], start["ended"].get("error")
    return f"{error} (exit code {code})" if error else {0: "done"}.get(code, f"exit code {code}")


class Attempts:
    """This start of a run, after those before it; a context in which it trains.

    Args:
        folder: of the run, which this start has claimed.
        world: the processes; all of them make it.
        clock: of this process.
        step: from which it goes on.
        poison: what becomes of a step that ended three starts in a row: `stop`, `skip`, or `retry`. Who was stopped and
            starts again tries anew.
        about: where it runs, see `environment.gathered`.

    Attributes:
        number: 0 for the first start of a run, one more for each later one.
        left_out: the steps, counted from 1, that this run passes over.
        code: the exit code, if nothing is raised.
        replaced: samples that could not be used.

    Raises:
        PoisonError: by the policy stop.
    """

    def __init__(self, folder: Path, world: "World", clock: "Clock", step: int, poison: str, about: Mapping[str, Any]):
        self.clock = clock
        self.code = 0
        self.replaced = 0
        self._path: Path | None = None
        self._at: int | None = None  # a file
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        self._start: dict[str, Any] = {
            "attempt": 0,
            "began": clock.began,
            "from_step": step,
            "world_size": world.size,
            "num_nodes": world.num_nodes,
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(restarts) if restarts.isdecimal() else 0,
            "left_out": [],
            "step": step,
            "at": 0,
            "redone": 0,
            "ended": None,
            "environment": dict(about),
        }
        self.number, left_out = world.once(lambda: self._begin(folder, poison))
        self.left_out = frozenset(left_out)

    def _begin(self, folder: Path, poison: str) -> tuple[int, list[int]]:
        """Learn from the starts before, and note this one."""
        root, before = folder / NAME, read(folder)
        with suppress(OSError):
            root.mkdir(exist_ok=True)
        number = max((int(path.stem) for path in _files(root)), default=-1) + 1
        self._path = root / f"{number:04d}.json"
        tried: list[dict[str, Any]] = []
        for start in before:
            if (start["ended"] or {}).get("error") != PoisonError.__name__:
                tried.append(start)
            elif poison == "stop":  # which was said
                tried.clear()
        step = crashed_at(tried) if poison != "retry" else None
        left_out = {left for start in before for left in start["left_out"]}
        if step and poison == "skip":
            left_out.add(step)
        environment = self._start["environment"] | code(root)
        self._start |= {"attempt": number, "left_out": sorted(left_out), "environment": environment}
        if step:
            ends = "; ".join(f"attempt {start['attempt']}: {how_ended(start)}" for start in tried[-IN_A_ROW:])
            what = f"step {step} ended {IN_A_ROW} starts in a row ({ends})"
            if poison == "stop":
                self._end(PoisonError.exit_code, PoisonError.__name__)
                raise PoisonError(
                    f"{what}: mend the cause and start again, which tries anew, or leave the step out with "
                    "trainer.poison_step=skip"
                )
            print(f"dit: WARNING: {what} and is left out, by trainer.poison_step=skip", flush=True)
        self._note()
        with suppress(OSError):
            self._at = os.open(self._path.with_suffix(".at"), os.O_WRONLY | os.O_CREAT, 0o666)
            self._mark()
        for line in summary(self._start, before[-1] if before else None):
            print(f"dit: {line}", flush=True)
        return number, sorted(left_out)

    def __enter__(self) -> "Attempts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SystemExit):
            self._end(error.code if isinstance(error.code, int) else int(error.code is not None))
        elif isinstance(error, KeyboardInterrupt):
            self._end(130)
        elif error is None:
            self._end(self.code)
        else:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._end(getattr(error, "exit_code", 1), words[:300])

    def begins(self, step: int) -> None:
        """Note the step, counted from 1, that is about to be done."""
        if self._path:
            if step <= self._start["at"]:  # after a rollback
                self._start["redone"] += self._start["at"] - step + 1
            self._start |= {"at": step, "step": step - 1}
            self._mark()

    def trained(self, step: int) -> None:
        """Note that there is no step left to do."""
        if self._path:
            self._start |= {"at": 0, "step": step}
            self._mark()
            self._note()

    def passed_over(self, step: int) -> int:
        """A number of finished steps, and of those that are left out next."""
        while step + 1 in self.left_out:
            step += 1
        return step

    def _mark(self) -> None:
        if self._at is not None:
            with suppress(OSError):  # a full disk must not end a run; the Recorder says that it is full
                os.pwrite(self._at, f"{self._start['at']:>12} {time.time():17.3f}\n".encode(), 0)
        if time.time() - self._start["noted"] > NOTE_SECONDS:
            self._note()

    def _end(self, code: int, error: str | None = None) -> None:
        """Note how it ended."""
        self._start["ended"] = {"code": code} | ({"error": error} if error else {})
        if not self._path:
            return
        self._note()
        if self._at is not None:
            os.close(self._at)
            self._at = None

    def _note(self) -> None:
        assert self._path
        seconds = {section: round(value, 3) for section, value in self.clock.seconds.items()}
        self._start |= {"noted": time.time(), "seconds": seconds, "replaced": self.replaced}
        with suppress(OSError):  # as above
            replace(self._path, json.dumps(self._start, indent=1) + "\n")
