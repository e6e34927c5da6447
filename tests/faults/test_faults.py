"""Nothing is lost or repeated, whatever befalls a run: each test hurts real runs of a tiny DiT, and reads its ledger.

DIT_FAULTS=N makes N faults, or seeds, of each; without it there are as many as the project promises.
"""

import os
import random
from pathlib import Path

import pytest
import torch

from .chaos import AGAIN, Fault, check_attempts, drawn, drive, final, happened, history, ledger

SHARE = int(os.environ.get("DIT_FAULTS", 0))
STEPS = 60
EVERY = 5


@pytest.fixture
def run(config):
    """(name, number of devices, ...) -> a configuration; the batches are small and previews often."""

    def made(name, number=1, *more):
        trainer = ["trainer=ddp", f"trainer.devices={number}"] if number > 1 else []
        return config(
            *trainer,
            f"run={name}",
            "trainer.poison_step=retry",  # three faults at one step are chance
            "trainer.accelerator=cpu",
            "trainer.ledger=true",
            "trainer.log_every_steps=5",
            f"trainer.max_steps={STEPS}",
            f"trainer.checkpoint_every_steps={EVERY}",
            "trainer.preview_every_steps=20",
            *more,
        )

    return made


def assert_same(cfg, reference):
    """Losses of all steps and the last weights are bit-equal."""
    ours, theirs = history(cfg), history(reference)
    assert ours.keys() == theirs.keys()
    for step, told in theirs.items():
        assert ours[step] == told, step
    ours, theirs = final(cfg), final(reference)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.slow
def test_a_fault_of_each_kind_and_phase(run):
    """As many as two processes and a minute allow: the rest is for patience."""
    reference, cfg = run("reference", 2), run("hurt", 2, "trainer.timeout_seconds=10")
    broken = Fault("nan", 1, 26, "forward")
    assert drive([reference], [broken]) == [0]
    faults = [
        broken,
        Fault("kill", 1, 7, "backward"),
        Fault("usr1", 0, 13, "forward"),
        Fault("full", 0, 20, "save"),
        Fault("term", 1, 20, "preview"),
        Fault("kill", 0, 30, "save"),
        Fault("raise", 1, 37, "data"),
        Fault("stop", 1, 43, "forward"),
    ]
    codes = drive([cfg], faults)
    assert len(happened(cfg)) == len(faults) - 1  # a loss that is no number leaves no mark, but a step left out
    assert [step for step, (_, _, applied) in history(cfg).items() if not applied] == [26]
    assert codes[-1] == 0 and set(codes[:-1]) == {137, AGAIN, 1}
    assert len(codes) - 1 == len({start for start, _ in happened(cfg).values()}) >= 5  # two may strike at once
    check_attempts(cfg, EVERY)
    assert_same(cfg, reference)
    assert not list((Path(cfg.runs_dir) / "hurt" / "checkpoints").glob("*.tmp"))


@pytest.mark.chaos
@pytest.mark.parametrize("number", [1, 2, 4])
def test_signals_at_any_moment_stop_within_a_step_and_a_save(run, number):
    reference, cfg = run("reference", number), run("signalled", number)
    assert drive([reference], []) == [0]
    generator = random.Random(number)
    faults = drawn(generator, ["term", "usr1"], SHARE or 50, number, STEPS, saves=EVERY, spread=0.02)
    codes = drive([cfg], faults)
    assert codes[-1] == 0 and set(codes[:-1]) == {AGAIN}
    assert len(codes) > len(faults) // 4  # what comes while a run stops does not stop it again
    check_attempts(cfg, EVERY)
    for lines in ledger(cfg):
        for attempt in range(len(codes) - 1):
            steps = [line["step"] for line in lines if line["attempt"] == attempt]
            again = [line["step"] for line in lines if line["attempt"] == attempt + 1]
            assert not (steps and again) or again[0] == steps[-1] + 1, "a step was done again though it was saved"
            asked = [step for start, step in happened(cfg).values() if start == attempt]
            assert not steps or steps[-1] <= min(asked) + 1
    assert_same(cfg, reference)


@pytest.mark.chaos
def test_a_hundred_kills_lose_and_repeat_nothing(run):
    number = SHARE or 100
    steps = max(STEPS, 3 * number)
    more = (f"trainer.max_steps={steps}",)
    reference, cfg = run("reference", 1, *more), run("killed", 1, *more)
    assert drive([reference], []) == [0]
    # More than that are drawn, as two may strike at once.
    faults = drawn(random.Random(0), ["kill"], 3 * number // 2, 1, steps, saves=EVERY, spread=0.1)
    codes = drive([cfg], faults)
    assert codes[-1] == 0 and set(codes[:-1]) == {137}
    assert len(codes) - 1 == len({start for start, _ in happened(cfg).values()}) >= number
    check_attempts(cfg, EVERY)
    assert_same(cfg, reference)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(SHARE or 50))
def test_random_faults_at_any_world_size(run, seed):
    """Each start has another number of processes, and may have another strategy."""
    generator = random.Random(seed)
    reference = run("reference")
    assert drive([reference], []) == [0]
    starts = []
    for _ in range(6):
        number = generator.choice([1, 2, 4])
        strategy = generator.choice(["ddp", "fsdp"]) if number > 1 else "single"
        starts.append(run("hurt", number, f"trainer.strategy={strategy}"))
    faults = drawn(generator, ["kill", "term", "usr1", "raise", "full"], 4, 2, STEPS, saves=EVERY, spread=0.05)
    drive(starts, faults)
    check_attempts(starts[0], EVERY)
    ours, theirs = history(starts[0]), history(reference)
    assert ours.keys() == theirs.keys()
    assert [step for step in ours if ours[step][0] != theirs[step][0]] == []
    ours, theirs = (torch.cat([value.flatten() for value in final(cfg).values()]) for cfg in (starts[0], reference))
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4  # sums in another order
