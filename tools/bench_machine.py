"""What the sub-commands of bench.py share: the machine, its clocks, and how repeats are summed up."""

import datetime
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dit.train.hardware import HARDWARE

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def machine(narrow: bool) -> dict[str, Any]:
    """What figures depend on beside the command; narrow: networks compute in bfloat16."""
    return {
        "device": torch.cuda.get_device_name() if GPU else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "bf16" if narrow else "float32",
        "date": datetime.date.today().isoformat(),
    }


def datasheet() -> float | None:
    """The GPU's dense FLOP/s in bfloat16, where dit/train/hardware.py knows it, which has SXM modules alone."""
    name = torch.cuda.get_device_name().lower() if GPU else ""
    return next(
        (known.bf16 for known in HARDWARE.values() if known.name in name and not ("pcie" in name or "nvl" in name)),
        None,
    )


def autocast(narrow: bool = GPU) -> AbstractContextManager[Any]:
    """Bfloat16 if narrow: on a GPU, as training has it, if nothing else is said."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if narrow else nullcontext()


class Laps:
    """What the parts of a step take: of the GPU's stream, which is not waited for, or of the process's CPU time."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str = "") -> None:
        """The part that began at the mark before ends; without a name it was none."""
        if GPU:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.process_time()
        self._marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Of each part, all steps together."""
        if GPU:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            found[part] += before.elapsed_time(now) / 1000 if GPU else now - before
        found.pop("", None)
        return dict(found)


def measured(work: Callable[[], object], times: int) -> float:
    """Seconds of one: of the process's CPU time, or of the GPU."""
    clock = time.perf_counter if GPU else time.process_time
    if GPU:
        torch.cuda.synchronize()
    began = clock()
    for _ in range(times):
        work()
    if GPU:
        torch.cuda.synchronize()
    return (clock() - began) / times


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median of repeats, the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def ratio(a: Sequence[float], b: Sequence[float], form: str = ".2f") -> str:
    """The same of a over b, of repeats that took turns."""
    return spread([x / y for x, y in zip(a, b, strict=True)], form)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor()
