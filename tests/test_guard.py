"""What the guard leaves out, and what then becomes of weights, averages and the run."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from together import lines, weights

from dit.command.train import train
from dit.train import checkpoint
from dit.train.guard import USUAL_STEPS, Guard, NumericError
from dit.train.module import DiffusionModule
from dit.train.strategy import Strategy


def allowed(guard, *norms):
    return [bool(guard.allows("denoiser", torch.tensor(norm))) for norm in norms]


def test_norms_that_are_not_finite_are_never_allowed():
    assert allowed(Guard(), 1.0, math.nan, math.inf, 0.0, 2.0) == [True, False, False, True, True]
    assert allowed(Guard(spike_deviations=None), 1.0, math.nan, 1e30) == [True, False, True]


def test_a_spike_is_what_lies_far_above_the_usual_norm():
    guard = Guard(spike_deviations=8)
    generator = torch.Generator().manual_seed(0)
    usual = (torch.randn(3 * USUAL_STEPS, generator=generator) * 0.5).exp()
    early = Guard(spike_deviations=8)
    assert allowed(early, 1.0, 1e6) == [True, True]  # nothing is usual yet
    assert all(allowed(guard, *usual.tolist()))
    _, mean, variance = guard._usual["denoiser"].tolist()
    assert mean == pytest.approx(0, abs=0.15) and variance**0.5 == pytest.approx(0.5, rel=0.2)
    assert allowed(guard, math.exp(7 * 0.5), math.exp(10 * 0.5), 1.0) == [True, False, True]
    assert allowed(guard, 1e-6) == [True]  # a small one does no harm


def test_each_network_has_its_own_usual_norm():
    guard = Guard()
    allowed(guard, *[1.0] * 150)
    assert bool(guard.allows("discriminator", torch.tensor(1e4)))
    assert allowed(guard, 1e4) == [False]


def test_state_goes_on_exactly():
    guard, other = Guard(), Guard()
    norms = (torch.arange(130) % 7 + 1.1).tolist()
    allowed(guard, *norms)
    other.load_state(json.loads(json.dumps(guard.state())))
    allowed(guard, 3.3), allowed(other, 3.3)
    assert guard.state() == other.state()


def test_too_many_rollbacks_end_the_run():
    guard = Guard(max_in_a_row=1, max_rollbacks=1)

    def bad(step):
        guard.note(step, torch.tensor(False), torch.tensor(math.nan), torch.tensor(1.0), ["a"])
        return [(b.step, b.keys) for b in guard.bad()]

    assert bad(5) == [(5, ["a"])] and not guard.broken
    bad(6)
    assert guard.broken and guard.first_bad == 5 and guard.skipped == 2
    guard.roll_back()
    assert not guard.broken
    bad(7), bad(8)
    with pytest.raises(NumericError, match="from 7 on"):
        guard.roll_back()


@pytest.mark.parametrize("option", ["max_in_a_row=0", "max_rollbacks=-1", "spike_deviations=0"])
def test_values_out_of_range_are_refused(option):
    name, value = option.split("=")
    with pytest.raises(ValueError, match=f"guard.{name}={value}"):
        Guard(**{name: int(value)})


class Broken:
    """Makes the loss of a rank, or its gradient alone, not finite at some steps."""

    def __init__(self, monkeypatch, steps, rank=0, gradient=False):
        original, stepped = DiffusionModule._backward, Strategy.step

        def backward(module, micro_batches):
            here = module.step + 1 in steps and module.strategy.world.rank == rank
            if here and not gradient:
                x0 = micro_batches[0].x0
                x0[0].fill_(math.nan)
            return original(module, micro_batches)

        def step(strategy, network, allows):
            self.count += 1
            if gradient and self.count in steps:
                next(p for g in strategy.optimizers[network].param_groups for p in g["params"]).grad[0] = math.inf
            return stepped(strategy, network, allows)

        self.count = 0
        monkeypatch.setattr(DiffusionModule, "_backward", backward)
        monkeypatch.setattr(Strategy, "step", step)


def skipped(cfg):
    path = Path(cfg.runs_dir) / cfg.run / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_step_is_left_out_and_named(config, monkeypatch, capsys, gradient):
    cfg = config("run=broken", "trainer.ledger=true", "trainer.max_steps=6", "trainer.checkpoint_every_steps=3")
    Broken(monkeypatch, {4}, gradient=gradient)
    before = []
    original = DiffusionModule.training_step

    def step(module, batch, index):
        state = [*module.network.parameters(), *module.ema.averages["ema"].values()]
        copies = [tensor.detach().clone() for tensor in state]
        outputs = original(module, batch, index)
        before.append(all(torch.equal(a, b) for a, b in zip(copies, state, strict=True)))
        return outputs

    monkeypatch.setattr(DiffusionModule, "training_step", step)
    assert train(cfg) == 0
    assert before == [False, False, False, True, False, False]
    [line] = skipped(cfg)
    assert line["step"] == 4 and line["reason"] == ("gradient" if gradient else "loss") and line["norm"] is None
    ledger = [json.loads(x) for x in (Path(cfg.runs_dir) / "broken/ledger/rank-0.jsonl").read_text().splitlines()]
    assert [x["step"] for x in ledger] == [1, 2, 3, 4, 5, 6]
    assert [x["applied"] for x in ledger] == [True, True, True, False, True, True]
    assert line["keys"] == ledger[3]["keys"] and len(line["keys"]) == 32
    assert (
        f"step 4 was left out, as its {line['reason']} is not finite; samples {line['keys'][0]}"
        in capsys.readouterr().out
    )
    assert [x["loss"] is None for x in lines(cfg)] == [False, False, False, True, False, False]
    assert lines(cfg)[-1]["skipped"] == 1
    assert all(t.isfinite().all() for tensors in weights(cfg).values() for t in tensors.values())


def test_too_many_in_a_row_roll_back_and_then_stop(config, monkeypatch, capsys):
    cfg = config("run=rolled", "guard.max_in_a_row=2", "guard.max_rollbacks=1", "trainer.checkpoint_every_steps=4")
    Broken(monkeypatch, {6, 7, 8})
    restored = []
    original = Strategy.restore
    monkeypatch.setattr(
        Strategy, "restore", lambda self, module, path: (restored.append(path.name), original(self, module, path))
    )
    assert train(cfg) == 0
    assert restored == ["step-00000004"]
    assert [(x["step"], x["reason"]) for x in skipped(cfg)] == [
        (6, "loss"),
        (7, "loss"),
        (8, "loss"),
        (8, "rolled back"),
    ]
    assert "after step 8 the weights are those of step 4 again" in capsys.readouterr().out
    again = config(
        "run=again",
        "trainer.keep_checkpoints=9",
        "guard.max_in_a_row=2",
        "guard.max_rollbacks=1",
        "trainer.checkpoint_every_steps=4",
    )
    Broken(monkeypatch, set(range(6, 13)))
    with pytest.raises(NumericError, match="from 9 on"):
        train(again)
    none = config("run=none", "guard.max_in_a_row=2", "trainer.checkpoint_every_steps=8")
    with pytest.raises(NumericError, match="no checkpoint from before step 6"):
        train(none)


class Lagging(Guard):
    """Hears a step later, as on a GPU."""

    def note(self, *args):
        super().note(*args)
        step, told, _, keys = self._noted.pop()
        self._noted.append((step, told, self, keys))

    def synchronize(self):
        pass


@pytest.mark.parametrize("guard", [Guard, Lagging])
def test_a_bad_step_makes_no_checkpoint_and_is_counted_in_the_next(config, monkeypatch, guard):
    monkeypatch.setattr("dit.train.guard.Guard", guard)
    cfg = config("run=counted", "trainer.max_steps=8", "trainer.checkpoint_every_steps=4")
    Broken(monkeypatch, {4})
    assert train(cfg) == 0
    [line] = skipped(cfg)
    assert line["step"] == 4
    [path] = checkpoint.committed(Path(cfg.runs_dir) / "counted/checkpoints")
    state = checkpoint.load_state(path)["guard"]
    assert (path.name, state["skipped"], state["in_a_row"]) == ("step-00000008", 1, 0)


def test_roll_backs_are_remembered_by_who_goes_on():
    guard, other = Guard(max_in_a_row=1), Guard()
    for step in (5, 6):
        guard.note(step, torch.tensor(False), torch.tensor(1.0), torch.tensor(1.0), [])
        list(guard.bad())
    assert guard.roll_back() == 5
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.rollbacks == 1 and not guard.good
    other.note(7, torch.tensor(True), torch.tensor(1.0), torch.tensor(1.0), [])
    assert list(other.bad()) == []
    other.forgive()
    assert other.rollbacks == 0


STRATEGIES = ["ddp", "fsdp", "zero1", "zero3"]


def _train_broken(cfgs):
    """As one of several processes: the loss of the second is not a number at step 5, and from 8 to 10."""
    import together

    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, {5, 8, 9, 10}, rank=1)
        return together._train_each(cfgs)


@pytest.mark.slow
def test_all_ranks_leave_the_same_step_out_under_every_strategy(config, monkeypatch):
    from dit.train import devices
    from dit.train.launch import launch

    cfgs = [
        config(
            f"run={name}",
            f"trainer={name}",
            "trainer.accelerator=cpu",
            "trainer.devices=2",
            "trainer.ledger=true",
            "guard.max_in_a_row=2",
            "trainer.max_steps=14",
            "trainer.checkpoint_every_steps=6",
        )
        for name in STRATEGIES
    ]
    assert launch(_train_broken, [devices.settled(cfg) for cfg in cfgs], 2) == 0
    for cfg in cfgs:
        line, *others = skipped(cfg)
        assert (line["step"], line["reason"], line["ranks"]) == (5, "loss", [1])
        assert [(x["step"], x["reason"]) for x in others] == [
            (8, "loss"),
            (9, "loss"),
            (10, "loss"),
            (10, "rolled back"),
        ]
        assert others[-1]["to"] == 6
        for rank in range(2):
            path = Path(cfg.runs_dir) / cfg.run / f"ledger/rank-{rank}.jsonl"
            ledger = [json.loads(x) for x in path.read_text().splitlines()]
            assert [x["step"] for x in ledger if not x["applied"]] == [5, 8, 9, 10]
            assert rank == 0 or line["keys"] == ledger[4]["keys"]
        assert all(t.isfinite().all() for tensors in weights(cfg).values() for t in tensors.values())
    ours = [[x["loss"] for x in lines(cfg)] for cfg in cfgs]
    for a, b in itertools.pairwise(ours):  # after the roll back, too, which must bring the optimizer's state
        assert [x is None for x in a] == [x is None for x in b]
        assert [x for x in a if x] == pytest.approx([x for x in b if x], rel=1e-4)


@pytest.mark.slow
def test_a_run_with_a_bad_step_ends_where_a_clean_one_does(config):
    more = ["trainer.max_steps=300", "trainer.log_every_steps=50", "learning_rate=constant", "optimizer.lr=1e-3"]
    clean, broken = config("run=clean", *more), config("run=bad", *more)
    assert train(clean) == 0
    with pytest.MonkeyPatch.context() as patch:
        Broken(patch, {40, 41, 120})
        assert train(broken) == 0
    assert len(skipped(broken)) == 3
    assert lines(broken)[-1]["loss"] == pytest.approx(lines(clean)[-1]["loss"], rel=0.01)
