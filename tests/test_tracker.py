"""Weights & Biases is sent what it can take, holds nothing up, and gets the rest later."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from wandb_server import serving

from dit.command import sync, train
from dit.command.compose import ConfigError, compose
from dit.data.image import encode_png
from dit.train import tracker
from dit.train.sender import Backlog, Skips, evaluation, farewell, summary_of
from dit.train.tracker import WandB

BLOCKED_SECONDS = 1.0  # at most, by anything but the end

FAKE = """
import os, pathlib, time
class Settings:
    def __init__(self, **_): pass
def Image(path): return path
class Run:
    starting_step, summary = 0, {}
    def define_metric(self, *_, **__): pass
    def alert(self, *_): pass
    def log(self, row, step, commit):
        if os.environ["FAKE"] == "breaks": raise ConnectionError("it broke")
        with open(os.environ["FAKE_OUT"], "a") as file: print(step, file=file)
    def finish(self, exit_code):
        with open(os.environ["FAKE_OUT"], "a") as file: print("exit", exit_code, file=file)
def init(**_):
    if os.environ["FAKE"] == "hangs": time.sleep(600)
    return Run()
"""


@pytest.fixture
def folder(tmp_path):
    """A run's folder with nothing in it yet."""
    (tmp_path / "runs" / "one" / "samples").mkdir(parents=True)
    return tmp_path / "runs" / "one"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Have wandb be the fake, which says in a file what it is told; how it behaves."""

    def behave(how):
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "wandb.py").write_text(FAKE)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/fake")
        monkeypatch.setenv("FAKE", how)
        monkeypatch.setenv("FAKE_OUT", str(tmp_path / "told"))
        monkeypatch.setattr(tracker, "FINISH_SECONDS", 1.0)
        return tmp_path / "told"

    return behave


@pytest.fixture
def key(monkeypatch):
    """Be logged in, to whatever server; send every 0.2 s, and not every 15."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.2")


def write(folder, steps, pictures=()):
    """Lines of metrics as a run writes them, and pictures."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
    for step in pictures:
        import torch

        picture = torch.full((1, 8, 8), step, dtype=torch.uint8)
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(encode_png(picture))


def started(folder, step=0, **options):
    """A tracker that has started, in no time."""
    wandb = WandB("dit", **options)
    began = time.perf_counter()
    wandb.start(folder, {"seed": 0}, step)
    assert time.perf_counter() - began < BLOCKED_SECONDS
    return wandb


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def wait_for(condition, seconds=30):
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def synced(folder):
    """`dit sync` of a run's folder; the exit code."""
    if not (folder / "config.yaml").exists():
        OmegaConf.save(compose("train", ["experiment=digits"]), folder / "config.yaml", resolve=True)
    cfg = compose("sync", [f"run={folder.name}", f"runs_dir={folder.parent}", "timeout_seconds=5"])
    sync.check(cfg)
    return sync.main(cfg)


def test_what_is_new_comes_in_order_and_once(folder):
    backlog = Backlog(folder, after=2)
    assert list(backlog.rows(over=False)) == []  # no file yet
    write(folder, [1, 2, 3, 4], pictures=[2, 3, 5])
    (folder / "samples" / "step-abc.png").touch()  # nothing of ours
    [(step, row)] = backlog.rows(over=False)  # 4 may get a picture yet
    assert step == 3 and row["loss"] == 1 / 3 and row["preview"].name == "step-00000003.png"
    write(folder, [6])
    assert [step for step, _ in backlog.rows(over=False)] == [4, 5]
    assert [step for step, _ in backlog.rows(over=True)] == [6] and list(backlog.rows(over=True)) == []


def test_lines_that_are_cut_or_dropped_do_no_harm(folder):
    backlog = Backlog(folder, after=0)
    write(folder, [1, 2, 3])
    assert len(list(backlog.rows(over=False))) == 2
    (folder / "metrics.tmp").write_text('{"step": 1, "loss": 1}\n')
    (folder / "metrics.tmp").replace(folder / "metrics.jsonl")  # as `Recorder.rewind` does
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo\n{"step": 3, "loss": 7}\n{"step": 4, "lo')
    assert list(backlog.rows(over=True)) == [(3, {"step": 3, "loss": 7})]


def test_figures_that_stand_in_a_line_of_their_own_belong_to_their_step(folder):
    backlog = Backlog(folder, after=0)
    write(folder, [1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "fid": 9.5}\n')
    assert list(backlog.rows(over=False)) == []
    write(folder, [2])
    assert list(backlog.rows(over=False)) == [(1, {"step": 1, "loss": 1, "fid": 9.5})]


def test_one_alert_tells_of_all_steps_that_were_left_out(folder):
    def left_out(step, reason, **more):
        with (folder / "skipped.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "reason": reason, **more}) + "\n")

    assert Skips(folder, 0).alert() is None
    left_out(1, "loss")
    skips = Skips(folder, (folder / "skipped.jsonl").stat().st_size)
    assert skips.alert() is None  # that was told by the start before
    left_out(5, "spike")
    assert skips.alert()[0] == "a spike" and skips.alert() is None
    left_out(6, "gradient")
    left_out(7, "loss")
    kind, text = skips.alert()
    assert kind == "NaN" and text.startswith("2 steps were left out, the last of them 7 (loss)")
    left_out(9, "rolled back", to=4)
    assert skips.alert()[1].startswith("after step 9 the weights are those of step 4 again")


def test_the_last_alert_says_how_it_ended(folder):
    assert farewell(folder, {"step": 8, "fid": 2.0}, 8, True) == ("done", "step 8, fid 2", "INFO")
    assert farewell(folder, {}, 8, True)[0] == "stopped"
    assert "killed" in farewell(folder, {}, 8, False)[1]
    (folder / "attempts").mkdir()
    for number, ended in enumerate(["OSError: before", "NumericError: all is NaN"]):
        (folder / "attempts" / f"{number:04d}.json").write_text(json.dumps({"ended": {"code": 5, "error": ended}}))
    assert farewell(folder, {}, 8, False) == ("failed", "after step 8: NumericError: all is NaN", "ERROR")


def test_what_is_written_again_is_not_sent_before(folder, fake):
    told = fake("works")
    write(folder, [1, 2, 3, 4])
    wandb = started(folder, step=2, mode="offline")
    assert [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    write(folder, [3])
    wandb.finish()
    assert told.read_text().split() == ["3", "exit", "0"]


def test_a_sweep_gives_its_runs_their_identity(folder, fake, monkeypatch):
    fake("works")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    started(folder, mode="offline").finish()
    assert (folder / "wandb-id").read_text() != "trial"  # somebody's own, who trains several runs
    (folder / "wandb-id").unlink()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    started(folder, mode="offline").finish()
    assert (folder / "wandb-id").read_text() == "trial"


def test_the_sweep_is_of_commands_that_compose(monkeypatch):
    from wandb.sdk.launch.sweeps import utils

    path = Path(tracker.__file__).parents[2] / "slurm" / "sweep.yaml"
    swept = utils.load_sweep_config(str(path))
    command = utils.create_sweep_command(swept["command"])  # as the agent does, which names the trial only then
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    choices = {
        name: told.get("values") or [told["value"]] if "min" not in told else [told["min"], told["max"]]
        for name, told in swept["parameters"].items()
    }
    for which in (0, -1):
        arguments = {name: {"value": values[which]} for name, values in choices.items()}
        words = utils.create_sweep_command_args({"args": arguments})["args_no_hyphens"]
        place = command.index("${args_no_hyphens}")
        assert command[:place] == ["dit", "train"]
        cfg = compose("train", [*words, *command[place + 1 :]])
        train.check(cfg)
        assert cfg.run == "sweep-trial" and cfg.optimizer.lr == choices["optimizer.lr"][which]


def test_a_summary_of_a_shorter_run_is_not_sent(folder):
    assert summary_of(folder, {"step": 8}) == {}
    (folder / "summary.json").write_text('{"step": 8, "accuracy": 0.9}')
    assert summary_of(folder, {"step": 8})["accuracy"] == 0.9 and summary_of(folder, {"step": 9}) == {}


def test_an_evaluation_is_sent_with_what_moves_it(folder):
    assert evaluation(folder) == {}
    records = [{"figures": {"fid": fid}, "settings": {"num_samples": 9, "seed": fid}} for fid in (1, 2)]
    records += [{"figures": [3], "settings": {}}, [4]]  # of no version
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "evaluation.png").touch()  # cut
    assert evaluation(folder) == {"evaluation/fid": 2, "evaluation/settings": {"num_samples": 9, "seed": 2}}


def test_what_is_written_is_sent(folder, fake):
    told = fake("works")
    wandb = started(folder, step=1, mode="offline")
    write(folder, [1, 2, 3])
    wandb.finish()
    assert told.read_text().split() == ["2", "3", "exit", "0"]


def test_a_tracker_that_hangs_is_left(folder, fake, capfd):
    fake("hangs")
    wandb = started(folder, mode="offline")
    assert 1 < seconds_of(wandb.finish) < 3
    assert f"`dit sync run=one runs_dir={folder.parent}` sends what it lacks" in capfd.readouterr().out


def test_a_tracker_that_breaks_says_so(folder, fake, capfd):
    fake("breaks")
    wandb = started(folder, mode="offline")
    write(folder, [1, 2])
    assert seconds_of(wandb.finish) < 3
    assert "it broke; training is not affected" in capfd.readouterr().out


def test_it_does_not_outlive_a_run_that_was_killed(folder, fake):
    told = fake("works")
    code = f"""
import os, pathlib
from dit.train.tracker import WandB
folder = pathlib.Path({str(folder)!r})
WandB("dit", "offline").start(folder, {{}}, 0)
(folder / "metrics.jsonl").write_text('{{"step": 1, "loss": 1}}\\n')
os._exit(9)
"""
    root = Path(tracker.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ}, timeout=30)
    wait_for(lambda: told.exists() and told.read_text().split() == ["1", "exit", "1"])


def test_sync_needs_a_login_and_a_run(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="wandb login"):
        synced(folder)
    with pytest.raises(ConfigError, match="run=other: no such run"):
        sync.check(compose("sync", ["run=other", f"runs_dir={folder.parent}"]))


@pytest.mark.slow
def test_a_closed_port_costs_nothing_and_is_made_up_for(folder, key, monkeypatch, capfd):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        wandb = started(folder)
        write(folder, [5, 10], pictures=[10])
        assert seconds_of(wandb.finish) < 3
        assert "Connection refused; training is not affected" in capfd.readouterr().out
        assert synced(folder) == 1
        assert "the same command sends what it lacks" in capfd.readouterr().out
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert synced(folder) == 0 and "sent 2 lines and 1 pictures" in capfd.readouterr().out
        assert server.received == [5, 10] and len(server.pictures) == 1


@pytest.mark.slow
def test_a_black_hole_costs_seconds_at_the_end(folder, key, monkeypatch, capfd):
    with serving() as server:
        server.silent = True
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb = started(folder)
        write(folder, [5, 10])
        assert seconds_of(wandb.finish) < 20
        assert "`dit sync run=one" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "dead"])
def test_a_server_lost_on_the_way_gets_exactly_what_it_misses(folder, key, monkeypatch, capfd, fault):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb = started(folder)
        write(folder, range(1, 11), pictures=[5])
        write(folder, [11])
        wait_for(lambda: server.received[-1:] == [10])
        if fault == "silent":
            server.silent = True
        else:
            server.die()
        write(folder, range(12, 21), pictures=[20])
        (folder / "summary.json").write_text('{"step": 20, "accuracy": 0.9}')
        assert seconds_of(wandb.finish) < 20
        assert "`dit sync run=one" in capfd.readouterr().out
        assert server.received == list(range(1, 11))
    with serving(before=server) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert synced(folder) == 0 and "sent 10 lines and 1 pictures" in capfd.readouterr().out
        assert server.received == list(range(11, 21)) and server.steps == list(range(1, 21))
        assert len(server.pictures) == 2 and server.summary["accuracy"] == 0.9 and len(server.names) == 1
        assert synced(folder) == 0 and "sent 0 lines and 0 pictures" in capfd.readouterr().out
        assert server.received == list(range(11, 21))


@pytest.mark.slow
def test_a_run_that_goes_on_makes_up_for_what_was_missed(folder, key, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb = started(folder)
        write(folder, [1, 2, 3], pictures=[2])
        wandb.finish()
        write(folder, [4, 5])  # while nobody looked
        wandb = started(folder, step=5)
        write(folder, [6])
        wandb.finish()
        assert server.received == server.steps == [1, 2, 3, 4, 5, 6] and len(server.names) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rewinds", [True, False])
def test_a_run_that_goes_on_from_an_older_checkpoint_is_rewound_where_that_can_be(folder, key, monkeypatch, rewinds):
    with serving() as server:
        server.rewinds = rewinds
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb = started(folder)
        write(folder, [1, 2, 3, 4])
        wandb.finish()
        wandb = started(folder, step=2)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 7}\n{"step": 4, "loss": 8}\n{"step": 5, "loss": 9}\n')
        wandb.finish()
        assert server.steps == [1, 2, 3, 4, 5] and len(server.names) == 1
        assert server.rewound == ([2] if rewinds else [])
        losses = [line["loss"] for line in server.history if "loss" in line]
        assert losses == ([1, 1 / 2, 7, 8, 9] if rewinds else [1, 1 / 2, 1 / 3, 1 / 4, 9])
