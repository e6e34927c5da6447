"""Where the time of a run went: goodput is the share of useful steps in it, from its first start to its end."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit.train import attempts
from dit.train.files import steps

BEGAN = "DIT_BEGAN"  # the variable with the time at which the command began, as Python takes seconds to get here
PARTS = {  # what time is split into, as it is printed
    "step": "useful steps",
    "startup": "startup",
    "data": "data wait",
    "checkpoint": "checkpoint stall",
    "preview": "previews",
    "evaluation": "evaluation",
    "redone": "steps redone",
    "skipped": "steps skipped",
    "down": "down",
    "other": "other",
}


class Clock:
    """Which section the main thread is in, and for how long; no device is waited for.

    Attributes:
        began: when the process did, in Unix seconds.
        listener: is told (section, number of finished steps, or None as before), each time that another begins.
    """

    def __init__(self) -> None:
        self.listener: Callable[[str, int | None], None] = lambda section, step: None
        self.began = min(time.time(), float(os.environ.get(BEGAN, "inf")))
        self._section = "startup"
        self._since = time.perf_counter()
        self._seconds = {"startup": time.time() - self.began}

    def enter(self, section: str, step: int | None = None) -> str:
        """From now on time is of this section; the one before."""
        self.listener(section, step)
        before, self._seconds, self._since = self._section, self.seconds, time.perf_counter()
        self._section = section
        return before

    @contextmanager
    def of(self, section: str, step: int | None = None) -> Iterator[None]:
        """Time spent inside is of this section, and of no other."""
        before = self.enter(section, step)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """So far, by section."""
        now = self._seconds.get(self._section, 0.0) + time.perf_counter() - self._since
        return self._seconds | {self._section: now}

    @property
    def training(self) -> float:
        """Seconds of training proper: steps, and the wait for other processes and for data."""
        return sum(self.seconds.get(section, 0.0) for section in ("step", "agree", "data"))

    def fetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, the wait for them being of `data`.

        An error comes in place of the batch that it befell, to be raised in its own step: they are fetched ahead.
        """
        while True:
            with self.of("data"):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except Exception as error:
                    batch = error
            yield batch


def duration(seconds: float) -> str:
    """In hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def split(starts: Sequence[Mapping[str, Any]], skipped: Collection[int] = ()) -> dict[str, float]:
    """Seconds by part, from the first start of a run to its last sign of life; see `PARTS`.

    The steps of a start are taken to be of one length. They are redone where a later start began before them. What a
    start that was killed did since its last note counts as steps. The pause after the end of the run, if it was
    continued later, is not counted.

    Args:
        starts: what `attempts.read` gives.
        skipped: steps that changed nothing, as the guard left them out.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    kept, next_began = float("inf"), None
    for start in reversed(starts):
        life = start["seen"] - start["began"]
        seconds = dict(start["seconds"])
        seconds["step"] = seconds.get("step", 0.0) + seconds.pop("agree", 0.0)
        seconds["step"] += max(0.0, life - sum(seconds.values())) * (start["ended"] is None)
        done = _between(start, start["step"]) + start["redone"]
        useful = _between(start, min(start["step"], kept))
        in_vain = sum(start["from_step"] < step <= min(start["step"], kept) for step in skipped)
        second = seconds.pop("step") / max(done, 1)  # of a step
        parts["skipped"] += second * min(in_vain, useful)
        parts["step"] += second * max(0, useful - in_vain)
        parts["redone"] += second * (max(done, 1) - useful)
        for section, value in seconds.items():
            parts[section if section in parts else "other"] += value
        parts["other"] += max(0.0, life - sum(start["seconds"].values())) * (start["ended"] is not None)
        if next_began is not None and (start["ended"] or {}).get("code") != 0:
            parts["down"] += max(0.0, next_began - start["seen"])
        kept, next_began = min(kept, start["from_step"]), start["began"]
    return parts


def _between(start: Mapping[str, Any], step: float) -> float:
    """How many steps a start did up to one, without those that it left out."""
    first = start["from_step"]
    return max(0, step - first - sum(first < left_out <= step for left_out in start["left_out"]))


def skipped_steps(folder: Path) -> dict[int, dict[str, Any]]:
    """What a run has noted of the steps that were left out, or that a roll back undid, by step."""
    found: dict[int, dict[str, Any]] = {}
    for entry in steps(folder / "skipped.jsonl"):
        for undone in range(entry.get("to", entry["step"] - 1) + 1, entry["step"] + 1):
            found.setdefault(undone, entry)
    return found


def of_run(folder: Path) -> tuple[float, list[str]]:
    """The goodput of a run, see `table`."""
    return table(attempts.read(folder), skipped_steps(folder))


def table(starts: Sequence[Mapping[str, Any]], skipped: Collection[int]) -> tuple[float, list[str]]:
    """Goodput, and the lines of a table of where the time went; 0 and none if nothing was noted. See `split`."""
    parts = split(starts, skipped)
    if not (wall := sum(parts.values())):
        return 0.0, []
    lines = [f"  {'goodput':<18} {parts['step'] / wall:.4f} of {duration(wall)}"]
    for part, seconds in parts.items():
        if seconds >= wall / 10000:
            lines.append(f"    {PARTS[part]:<16} {duration(seconds):>8} {seconds / wall:7.2%}")
    return parts["step"] / wall, lines
