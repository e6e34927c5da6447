"""Runs of `dit train` that are hurt on purpose, and what their ledgers say.

A fault is of a kind, at a rank, step and phase: it happens in the very process, in the midst of what that process does.
"""

import errno
import json
import math
import os
import random
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from dit.command.compose import exit_code_of
from dit.command.train import train
from dit.train import checkpoint, devices
from dit.train.callbacks import Preview
from dit.train.checkpoint import Saver
from dit.train.launch import launch
from dit.train.module import DiffusionModule

PHASES = ("data", "forward", "backward", "save", "preview")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}
AGAIN = 75


class Fault(NamedTuple):
    """Something that befalls a process once; a `nan`, each time that its step is tried.

    Kinds: kill, term, usr1, stop (signals), full (the disk, of a save), nan (the loss), raise (an exception).
    """

    kind: str
    rank: int
    step: int  # that is being done, or was just done: 1 is the first
    phase: str
    delay_seconds: float = 0.0


def drive(cfgs, faults, most=None):
    """Start a run again and again until it is done; the exit codes.

    Args:
        cfgs: of each start in turn, the last one for all that follow; each has its own number of devices.
        faults: what happens meanwhile.
        most: starts, before it is given up.
    """
    cfgs = [devices.settled(cfg) for cfg in cfgs]
    marks = Path(cfgs[0].runs_dir) / f"{cfgs[0].run}-faults"
    shutil.rmtree(marks, ignore_errors=True)
    marks.mkdir(parents=True)
    codes = []
    while not codes or codes[-1] != 0:
        assert len(codes) < (most or len(faults) + 2), f"not done after {codes}"
        cfg = cfgs[min(len(codes), len(cfgs) - 1)]
        codes.append(launch(_hurt, (cfg, faults, marks, len(codes)), cfg.trainer.devices))
    return codes


def happened(cfg):
    """The faults that did, by their place in the list: the number of the start, and the step that was done then."""
    marks = (Path(cfg.runs_dir) / f"{cfg.run}-faults").iterdir()
    told = {int(path.name): tuple(map(int, path.read_text().split())) for path in marks}
    return {i: what for i, what in told.items() if what}  # others were about to, when something else came before


def _hurt(argument):
    """Train as one process, with its faults."""
    cfg, faults, marks, start = argument
    rank = int(os.environ["RANK"])
    mine = {i: fault for i, fault in enumerate(faults) if fault.rank == rank}
    now = {"step": 0}

    def meet(phase, step):
        for i, fault in mine.items():
            if (fault.phase, fault.step) != (phase, step) or fault.kind == "nan":
                continue
            mark = marks / str(i)
            if not mark.exists():
                mark.touch()
                _befall(fault, lambda mark=mark: mark.write_text(f"{start} {now['step']}"))

    with pytest.MonkeyPatch.context() as patch:
        _place(patch, meet, now, {fault.step for fault in mine.values() if fault.kind == "nan"})
        return exit_code_of(lambda: train(cfg))


def _befall(fault, note):
    def send():
        note()
        os.kill(os.getpid(), SIGNALS[fault.kind])

    if fault.kind in SIGNALS and fault.delay_seconds:
        threading.Timer(fault.delay_seconds, send).start()
        return
    if fault.kind in SIGNALS:
        return send()
    note()
    if fault.kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    else:
        raise RuntimeError("a fault")


def _place(patch, meet, now, broken):
    """Put the faults into the phases of training."""

    def around(owner, name, before):
        original = getattr(owner, name)

        def wrapped(self, *args, **kwargs):
            before(self, *args)
            return original(self, *args, **kwargs)

        patch.setattr(owner, name, wrapped)

    def forward(module, *_):
        now["step"] = module.step + 1
        meet("forward", module.step + 1)

    def spoil(module, micro_batches):
        if module.step + 1 in broken:
            micro_batches[0].x0[0].fill_(math.nan)

    around(DiffusionModule, "training_step", forward)
    around(DiffusionModule, "_backward", spoil)
    around(Preview, "_drawn", lambda preview, module: meet("preview", module.step))
    around(Saver, "_finished", lambda saver, partial, state: meet("save", int(partial.name[5:13])))

    from dit.train.strategy import Strategy

    around(Strategy, "backward", lambda *_: meet("backward", now["step"]))
    from dit.data.stream import Stream

    batches = Stream.batches

    def waited(self, batch_size, seed, first_step=0, **options):
        now["step"] = first_step
        for i, batch in enumerate(batches(self, batch_size, seed, first_step, **options)):
            meet("data", first_step + i + 1)
            yield batch

    patch.setattr(Stream, "batches", waited)


def ledger(cfg):
    """The lines of a run's ledger: a list for each rank, in the order of their writing."""
    paths = sorted((Path(cfg.runs_dir) / cfg.run / "ledger").glob("rank-*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def history(cfg):
    """What came of each step in the end: step -> (samples, exact losses by rank, whether it was applied).

    That of the last attempt at it, by however many ranks.
    """
    steps = {}
    for rank, lines in enumerate(ledger(cfg)):
        for line in lines:
            steps.setdefault(line["step"], {}).setdefault(line["attempt"], {})[rank] = line
    told = {}
    for step, attempts in steps.items():
        last = attempts[max(attempts)]
        samples = Counter(key for line in last.values() for key in line["keys"])
        told[step] = samples, [line["loss"] for line in last.values()], all(line["applied"] for line in last.values())
    return told


def check_attempts(cfg, every):
    """See that no attempt began elsewhere than at a commit of the ones before, and that none left a step out.

    Args:
        cfg: of the run.
        every: steps between its checkpoints.
    """
    attempts = {}
    for lines in ledger(cfg):
        for line in lines:
            attempts.setdefault(line["attempt"], {}).setdefault(line["step"], []).append(line)
    before = 0
    for attempt in sorted(attempts):
        steps = sorted(attempts[attempt])
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert steps[0] <= before + 1, "steps were lost"
        assert before - steps[0] < 2 * every, "more was done again than a commit allows"
        before = steps[-1]


def final(cfg):
    """All tensors of the newest checkpoint."""
    path = checkpoint.newest(Path(cfg.runs_dir) / cfg.run / "checkpoints")
    return {
        f"{group}/{name}": value
        for group in ("model", "ema", "optimizer")
        for name, value in sorted(checkpoint.load_weights(path, group).items())
    }


def drawn(generator: random.Random, kinds, number, ranks, steps, *, saves=5, previews=20, spread=0.0):
    """Random faults, at most two at a step."""
    faults: list[Fault] = []
    while len(faults) < number:
        kind = generator.choice(kinds)
        phase = "save" if kind == "full" else generator.choice(PHASES)
        every = {"save": saves, "preview": previews}.get(phase, 1)
        if steps < 2 * every:
            continue
        step = generator.randrange(1, steps // every) * every
        if sum(fault.step == step for fault in faults) < 2:
            delay = generator.uniform(0, spread) if generator.random() < 0.5 else 0.0
            faults.append(Fault(kind, generator.randrange(ranks), step, phase, delay))
    return sorted(faults, key=lambda fault: fault.step)
