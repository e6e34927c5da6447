import json
import os
import time
from pathlib import Path

import pytest
import torch

from dit.command import doctor
from dit.command.compose import ConfigError, compose
from dit.data.store import DataError
from dit.train import attempts, environment, goodput
from dit.train.goodput import Clock, split
from dit.train.module import DiffusionModule
from dit.train.run import Run


def start(number, began, first, step, seconds, *, lasted=None, **more):
    """A start as `attempts.read` gives it, that ended well unless it is said."""
    seen = began + (sum(seconds.values()) if lasted is None else lasted)
    return {
        **{"attempt": number, "began": began, "noted": seen, "seen": seen, "from_step": first, "step": step, "at": 0},
        **{"world_size": 1, "job": None, "left_out": [], "redone": 0, "replaced": 0, "seconds": seconds},
        **{"ended": {"code": 0}, "environment": {"revision": "a" * 40, "changed": None, "nodes": {"here": 1}}},
        **more,
    }


def write(folder, *starts):
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    for entry in starts:
        (folder / "attempts" / f"{entry['attempt']:04d}.json").write_text(json.dumps(entry))


def test_the_clock_is_in_one_section_at_a_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setenv(goodput.BEGAN, "93")
    clock = Clock()
    assert clock.began == 93

    def batches():
        for number in range(2):
            now[0] += 3
            yield number
        raise DataError("broken")

    now[0] += 5
    clock.enter("step")
    fetched = clock.fetched(batches())
    assert [next(fetched), next(fetched)] == [0, 1]
    now[0] += 10
    with pytest.raises(KeyError), clock.of("preview"):
        now[0] += 2
        with clock.of("checkpoint"):
            now[0] += 1
        raise KeyError
    now[0] += 1
    assert clock.seconds == {"startup": 12, "data": 6, "step": 11, "preview": 2, "checkpoint": 1}
    assert clock.training == 17
    last = list(fetched)
    assert len(last) == 1 and isinstance(last[0], DataError)


@pytest.mark.parametrize(
    ("starts", "skipped", "expected"),
    [
        ([start(0, 0, 0, 10, {"data": 5, "step": 80, "new": 5}, lasted=93)], [], {"step": 80, "data": 5, "other": 8}),
        ([start(0, 0, 0, 10, {"step": 100})], [3, 4], {"step": 80, "skipped": 20}),
        # killed at step 10 without an end, gone on from 5: half is redone, and what came after the last note counts
        (
            [
                start(0, 0, 0, 10, {"step": 80}, lasted=100, ended=None),
                start(1, 130, 5, 15, {"startup": 10, "step": 100}),
            ],
            [],
            {"step": 150, "redone": 50, "down": 30, "startup": 10},
        ),
        # the third begins before the second, of which nothing is left, and before the end of what is left of the first
        (
            [
                start(0, 0, 0, 10, {"step": 100}, ended={"code": 1}),
                start(1, 100, 8, 12, {"step": 40}, ended={"code": 75}),
                start(2, 140, 4, 12, {"step": 80}),
            ],
            [2, 11],
            {"step": 30 + 70, "redone": 60 + 40, "skipped": 20},
        ),
        # rolled back by three steps within one start; a step left out took no time
        ([start(0, 0, 0, 11, {"step": 130}, redone=3, left_out=[7])], [], {"step": 100, "redone": 30}),
        # continued a week after its end, which was no time of the run's
        ([start(0, 0, 0, 5, {"step": 50}), start(1, 600000, 5, 10, {"step": 50})], [], {"step": 100}),
        # killed before its first step, and within it
        (
            [
                start(0, 0, 0, 0, {"startup": 10}, ended=None),
                start(1, 20, 0, 0, {"startup": 10, "step": 7}, ended={"code": 1}),
            ],
            [],
            {"startup": 20, "down": 10, "redone": 7},
        ),
        ([], [], {}),
    ],
)
def test_time_is_split(starts, skipped, expected):
    parts = split(starts, skipped)
    assert {part: seconds for part, seconds in parts.items() if seconds} == pytest.approx(expected)


def test_goodput_is_of_the_whole_time(tmp_path):
    write(
        tmp_path,
        start(0, 1000, 0, 10, {"startup": 10, "step": 80, "data": 10}, ended={"code": 75}),
        start(1, 1150, 10, 20, {"startup": 10, "step": 90}),
    )
    (tmp_path / "skipped.jsonl").write_text('{"step": 3, "reason": "the loss is nan", "keys": ["a"]}\n{"step": ')
    useful, lines = goodput.of_run(tmp_path)
    assert useful == pytest.approx((72 + 90) / 250)
    assert lines[0].split() == ["goodput", "0.6480", "of", "0:04:10"]
    assert [line.split()[0] for line in lines[1:]] == ["useful", "startup", "data", "steps", "down"]


def test_what_a_kill_leaves_is_read(tmp_path):
    write(tmp_path, start(0, 0, 0, 10, {"step": 10}), start(1, 20, 10, 12, {"step": 5}, ended=None))
    (tmp_path / "attempts" / "0001.at").write_text(f"{19:>12} {40.0:17.3f}\n")
    (tmp_path / "attempts" / "0002.json").write_text("")  # a machine that lost its power
    (tmp_path / "attempts" / "0003.tmp").write_text("{")  # a full disk
    first, second = attempts.read(tmp_path)
    assert (second["at"], second["step"], second["seen"]) == (19, 18, 40)
    assert attempts.how_ended(second) == "no end, last seen at step 19" and attempts.how_ended(first) == "done"
    assert split([first, second])["step"] == 30


@pytest.mark.parametrize(
    ("ends", "step"),
    [
        ([(7, None), (7, {"code": 1, "error": "E"}), (7, {"code": 3, "error": "E"})], 7),
        ([(7, None), (7, None), (7, {"code": 75})], None),
        ([(7, None), (7, {"code": 4, "error": "E"}), (7, None)], None),  # no room for a checkpoint
        ([(7, None), (8, None), (7, None)], None),
        ([(0, None), (0, None), (0, None)], None),  # before the first step
        ([(7, None), (7, None)], None),
        ([(7, {"code": 75}), (7, None), (7, None), (7, None)], 7),
    ],
)
def test_a_step_is_poison_if_it_ended_three_starts_in_a_row(ends, step):
    assert attempts.crashed_at([{"at": at, "ended": ended} for at, ended in ends]) == step


def test_only_allowed_variables_and_no_passwords_are_noted(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr("sys.argv", ["dit train", "data.path=https://me:secret@host/path"])

    about = environment.gathered(World(), torch.device("cpu"))
    assert about["settings"]["NCCL_DEBUG"] == "INFO" and "secret" not in json.dumps(about)
    assert about["command"][1] == "data.path=https://host/path"


def test_the_code_is_known_by_revision_and_difference(tmp_path, monkeypatch):
    def git(*words):
        os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
        return environment._git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words)

    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "dit").mkdir()
    (tmp_path / "conf").mkdir()
    module = tmp_path / "dit" / "__init__.py"
    module.write_text("a = 1\n")
    monkeypatch.setattr("dit.__file__", str(module))
    assert environment.code(tmp_path) == {"revision": None, "changed": None}
    git("init", "--quiet")
    git("add", "dit")
    git("commit", "--quiet", "-m", "first")
    clean = environment.code(tmp_path)
    assert clean == {"revision": git("rev-parse", "HEAD").strip(), "changed": None}
    module.write_text("a = 2\n")
    (tmp_path / "dit" / "new.py").write_text("b = 3\n")
    changed = environment.code(tmp_path)
    difference = (tmp_path / changed["changed"]).read_text()
    assert "+a = 2" in difference and "+b = 3" in difference
    before = start(0, 0, 0, 1, {}, environment=clean | {"versions": {"dit": "1"}})
    now = start(1, 0, 0, 1, {}, environment=changed | {"versions": {"dit": "1"}})
    [line] = environment.summary(now, before)
    assert line.startswith("WARNING: the code is now revision") and changed["changed"] in line
    assert environment.summary(before, before) == []


class World:
    """Of one process."""

    size = num_nodes = 1
    is_first = True

    def once(self, function):
        return function()

    def gathered(self, value):
        return [value]


def begin(folder, poison):
    """A start that is told what is known of those before, and never ends."""
    about = {"nodes": {}, "devices": {}, "versions": {"dit": "1"}, "settings": {}}
    started = attempts.Attempts(folder, World(), Clock(), 5, poison, about)
    started.begins(started.passed_over(6) + 1)
    return started


def test_who_was_told_of_a_poisonous_step_decides(tmp_path):
    for poison in ("stop", "stop", "stop"):
        begin(tmp_path, poison)
    with pytest.raises(attempts.PoisonError, match=r"trainer\.poison_step=skip"):
        begin(tmp_path, "stop")
    assert begin(tmp_path, "retry").left_out == set()
    assert begin(tmp_path, "stop").left_out == set()  # tries anew
    started = begin(tmp_path, "skip")  # before which it was at step 7 again
    assert started.number == 6 and started.left_out == {7}
    assert [started.passed_over(step) for step in (5, 6, 7)] == [5, 7, 7]
    assert begin(tmp_path, "stop").left_out == {7}  # and stays left out
    with pytest.raises(SystemExit), begin(tmp_path, "retry"):
        raise SystemExit(75)
    assert attempts.how_ended(attempts.read(tmp_path)[-1]) == "exit code 75"


@pytest.fixture
def poisoned(monkeypatch):
    """Training whose seventh step raises."""
    whole = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == 6:
            raise RuntimeError("poison")
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)


def numbers(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_crashes_again_and_again_is_reported_or_left_out(config, poisoned, capsys):
    folder = Path(config().runs_dir) / "digits"
    for _ in range(3):
        with pytest.raises(RuntimeError, match="poison"):
            Run(config()).fit()
    with pytest.raises(attempts.PoisonError, match=r"step 7 ended 3 starts .*attempt 2: RuntimeError: poison") as error:
        Run(config()).fit()
    assert error.value.exit_code == 5
    assert [entry["at"] for entry in attempts.read(folder)] == [7, 7, 7, 0]
    run = Run(config("trainer.poison_step=skip"))
    read = []
    original = run.data.batches
    run.data.batches = lambda *args, **kwargs: read.append(kwargs["skip"]) or original(*args, **kwargs)
    assert run.fit() is None
    assert read == [{6}] and numbers(folder) == [*range(1, 7), *range(8, 13)]
    assert "step 7 ended 3 starts in a row" in capsys.readouterr().out
    [line] = [line for line in doctor.run_lines(folder) if "left out" in line]
    assert "7, by trainer.poison_step=skip" in line


def test_the_last_step_may_be_left_out(config, poisoned):
    folder = Path(config().runs_dir) / "digits"
    write(folder, *(start(n, n, 0, 6, {"step": 1}, at=7, ended=None) for n in range(3)))
    told = config("trainer.poison_step=skip", "trainer.max_steps=7", "trainer.log_every_steps=3")
    assert Run(told).fit() is None
    assert json.loads((folder / "summary.json").read_text())["step"] == 7
    assert numbers(folder) == [3, 7]
    assert Run(told).fit() is None and len(attempts.read(folder)) == 4  # it is complete


def test_data_that_cannot_be_had_end_the_step_that_they_are_of(config):
    run = Run(config())
    original = run.data.batches

    def batches(*args, **kwargs):
        for number, batch in enumerate(original(*args, **kwargs)):
            if number == 3:
                raise DataError("damaged")
            yield batch

    run.data.batches = batches
    with pytest.raises(DataError):
        run.fit()
    [entry] = attempts.read(run.folder)
    assert (entry["at"], entry["step"]) == (4, 3) and numbers(run.folder) == [1, 2, 3]
    assert entry["ended"] == {"code": 3, "error": "DataError: damaged"}


def test_a_run_reports_where_its_time_went(config, capsys):
    cfg = config()
    for stop in (6, 12):
        assert Run(config(f"trainer.max_steps={stop}")).fit() is None
    folder = Path(cfg.runs_dir) / "digits"
    first, second = attempts.read(folder)
    assert (first["from_step"], first["step"], second["from_step"], second["step"]) == (0, 6, 6, 12)
    for entry in (first, second):
        assert sum(entry["seconds"].values()) == pytest.approx(entry["noted"] - entry["began"], abs=0.05)
        assert all(entry["seconds"][section] > 0 for section in ("startup", "data", "step", "checkpoint"))
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["goodput"] < 1
    assert "useful steps" in capsys.readouterr().out
    cfg = compose("doctor", ["run=digits", f"runs_dir={cfg.runs_dir}"])
    doctor.check(cfg)
    assert doctor.main(cfg) == 0
    output = capsys.readouterr().out
    assert "step-00000012" in output and output.count(", done") == 2 and "useful steps" in output


def test_the_doctor_knows_its_runs(tmp_path):
    with pytest.raises(ConfigError, match="run=nothing: no such run; there is none yet"):
        doctor.check(compose("doctor", ["run=nothing", f"runs_dir={tmp_path}"]))
    with pytest.raises(ConfigError, match=r"model=.* changes a recipe"):
        doctor.prepare(["run=digits", "model=dit_xl_2"])
    (tmp_path / "old").mkdir()
    assert doctor.run_lines(tmp_path / "old")[-1].endswith("none noted, as by an older version")


def test_a_full_disk_ends_nothing(config, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = Run(config())
    monkeypatch.setattr(os, "pwrite", full)
    (run.folder / "attempts").write_text("")  # in whose place no folder can be made
    assert run.fit() is None
    assert attempts.read(run.folder) == []
