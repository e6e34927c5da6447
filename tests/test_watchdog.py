"""A process that is dead or hangs ends the run, by name; a signal at any time has its exit code."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dit.command.compose import compose, exit_code_of
from dit.command.train import check, train
from dit.train import devices
from dit.train.goodput import Clock
from dit.train.launch import launch
from dit.train.watchdog import FIRST_STEP, Judge, Pulse, Watchdog
from dit.train.world import World, is_connection

ROOT = Path(__file__).parents[1]
TIMEOUT = 10


def looks(judge, pulses_at, seconds, *, answered=lambda now: True, tick=0.2):
    """The first verdict and when, of what is seen at each tick."""
    for number in range(int(seconds / tick)):
        now = number * tick
        if verdict := judge.verdict(now, pulses_at(now, number), answered(now)):
            return now, verdict
    return None, ""


def working(number, **more):
    return Pulse(number, **{"phase": "step", "step": number, "first": False, "host": "a", "pid": 7, **more})


def test_those_who_answer_and_get_on_are_left_alone():
    judge = Judge(1, TIMEOUT)
    assert looks(judge, lambda now, n: {r: working(n) for r in range(3)}, 100) == (None, "")


@pytest.mark.parametrize("phase", ["setup", "step", "save", "preview", "end"])
def test_silence_is_noticed_in_every_phase(phase):
    judge = Judge(0, TIMEOUT)

    def pulses(now, n):
        return {0: working(n), 1: working(min(n, 20), phase=phase, pid=8), 2: working(n)}

    when, verdict = looks(judge, pulses, 100)
    assert 4 + TIMEOUT <= when <= 4 + TIMEOUT * 1.05
    assert "rank 1 (a, pid 8; " in verdict and "has not answered for 10 s" in verdict


def test_a_machine_that_is_lost_is_named_as_a_whole():
    judge = Judge(0, TIMEOUT)

    def pulses(now, n):
        return {r: working(min(n, 20 + r % 3) if r > 3 else n) for r in range(16)}

    _, verdict = looks(judge, pulses, 100)
    assert re.findall(r"rank (\d+)", verdict) == [str(rank) for rank in range(4, 12)]
    assert "), 4 more have not answered" in verdict


def test_those_who_have_left_are_not_waited_for():
    judge = Judge(0, TIMEOUT)
    assert looks(judge, lambda now, n: {0: working(n), 1: working(3, phase="left")}, 100) == (None, "")


def test_a_store_that_does_not_answer_is_rank_0():
    judge = Judge(2, TIMEOUT)

    def pulses(now, n):
        return {r: working(min(n, 20), pid=r) for r in range(3)}

    when, verdict = looks(judge, pulses, 100, answered=lambda now: now < 4)
    assert when <= 4 + TIMEOUT * 1.05
    assert verdict.startswith("rank 0 (a, pid 0; computing, 20 steps finished) has not answered")


def test_who_is_behind_is_at_fault():
    """All wait in a call of a later place than that of rank 2, which lives."""
    judge = Judge(0, TIMEOUT)
    at = {0: ("agree", 6, 30), 1: ("step", 5, 30), 2: ("step", 5, 29)}

    def pulses(now, n):
        return {r: working(n, phase=phase, step=step, calls=calls) for r, (phase, step, calls) in at.items()}

    when, verdict = looks(judge, pulses, 100)
    assert TIMEOUT <= when <= TIMEOUT * 1.05
    assert verdict.startswith("rank 2 (a, pid 7; computing, 5 steps finished) has not got on for 10 s, and the others")


def test_of_equals_none_is_at_fault():
    judge = Judge(0, TIMEOUT)
    _, verdict = looks(judge, lambda now, n: {r: working(n, step=5) for r in range(2)}, 100)
    assert verdict.startswith("no process has got on for 10 s: rank 0 (")


def test_one_process_alone_hangs_too():
    _, verdict = looks(Judge(0, TIMEOUT), lambda now, n: {0: working(n, step=5, phase="data")}, 100)
    assert verdict == "rank 0 (a, pid 7; waiting for data, 5 steps finished) has not got on for 10 s"


def test_what_takes_long_beside_the_steps_is_no_hang():
    for phase in ("setup", "save", "preview", "end", "lost"):
        pulses = {0: ("step", 5), 1: (phase, 5)}
        judge = Judge(0, TIMEOUT)
        looked = lambda now, n, p=pulses: {r: working(n, phase=ph, step=s) for r, (ph, s) in p.items()}  # noqa: E731
        assert looks(judge, looked, 100) == (None, "")


def test_the_first_step_may_take_longer():
    when, _ = looks(Judge(0, TIMEOUT), lambda now, n: {r: working(n, step=0, first=True) for r in range(2)}, 100)
    assert when >= FIRST_STEP * TIMEOUT


def test_a_job_that_was_suspended_goes_on():
    """The clock went on, but nobody's pulse."""
    judge = Judge(0, TIMEOUT)
    for number in range(1000):
        now = number * 0.2 + (3600 if number >= 100 else 0)
        seen = max(0, number - 1) if number < 103 else number  # what is seen of others is old for a moment
        assert not judge.verdict(now, {0: working(number), 1: working(seen)}, True)


def test_another_s_verdict_is_taken():
    judge = Judge(0, TIMEOUT)
    assert looks(judge, lambda now, n: {0: working(n), 1: working(n, verdict="x")}, 1) == (0.0, "x")


def test_marks_make_the_place():
    watchdog = Watchdog(World(), Path("x"), 10)
    seen = [watchdog._own()]
    clock = Clock()
    clock.listener = watchdog.enters
    clock.enter("step")
    for _ in clock.fetched(iter("a")):
        seen.append(watchdog._own())
    with clock.of("agree", 4):
        seen.append(watchdog._own())
    with clock.of("checkpoint"):
        seen.append(watchdog._own())
    seen.append(watchdog._own())
    assert [(pulse.phase, pulse.step, pulse.first) for pulse in seen] == [
        ("setup", 0, True),
        ("step", 0, True),
        ("agree", 4, False),
        ("save", 4, False),
        ("step", 4, False),
    ]


def test_who_is_silent_before_the_first_pulse_is_named():
    class Two(World):
        rank, size = 1, 2

        def __init__(self):
            pass

    judge = Judge(1, TIMEOUT)
    pulses = Watchdog(Two(), Path("x"), TIMEOUT)._pulses
    passed, told = looks(judge, lambda now, n: pulses, 2 * TIMEOUT, answered=lambda now: False)
    assert told.startswith("rank 0 ") and passed == pytest.approx(TIMEOUT, rel=0.1)


def test_the_timeout_is_checked(tiny):
    for value in ("0", "-1", "0.5"):
        with pytest.raises(ValueError, match=r"trainer\.timeout_seconds"):
            check(compose("train", tiny(f"trainer.timeout_seconds={value}")))
    check(compose("train", tiny("trainer.timeout_seconds=null")))


def test_errors_of_a_connection_are_told_from_others():
    assert is_connection(RuntimeError("[..] Connection closed by peer [127.0.0.1]:4711"))
    assert not is_connection(RuntimeError("shape mismatch"))


# What follows starts processes.


def trains(argument):
    """Train, after the pid is known."""
    cfg, folder = argument
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    return exit_code_of(lambda: train(cfg))


def hangs(argument):
    """As above, but rank 1 stands still in Python after a while, in one of several places."""
    from dit.train.module import DiffusionModule

    cfg, folder, where = argument
    if os.environ["RANK"] == "1":
        if where == "step":
            step = DiffusionModule._micro_batches

            def stands(self, batch):
                while self.step == 5:
                    time.sleep(0.01)
                return step(self, batch)

            DiffusionModule._micro_batches = stands
        else:
            fetched = Clock.fetched

            def starves(batches):
                for number, batch in enumerate(batches):
                    while number == 5:
                        time.sleep(0.01)
                    yield batch

            Clock.fetched = lambda self, batches: fetched(self, starves(batches))
    return trains((cfg, folder))


@pytest.fixture
def long_run(config, tmp_path):
    """A run that would go on for long."""

    def make(number, *more):
        return devices.settled(
            config(
                "run=x",
                "trainer=ddp",
                f"trainer.devices={number}",
                "trainer.lanes=6",
                "trainer.batch_size=36",
                "trainer.max_steps=1000000",
                "trainer.checkpoint_every_steps=1000000",
                "trainer.preview_every_steps=1000000",
                f"trainer.timeout_seconds={TIMEOUT}",
                "trainer.accelerator=cpu",
                *more,
            )
        )

    return make


def launched(work, cfg, folder, number, *more, fault=None):
    """The exit code, and the seconds from the fault to the end."""
    metrics = Path(cfg.runs_dir) / cfg.run / "metrics.jsonl"
    at = []

    def strike():
        until = time.monotonic() + 120
        while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") > 5):
            time.sleep(0.05)
        rank, signum = fault
        os.kill(int((folder / f"pid-{rank}").read_text()), signum)
        at.append(time.monotonic())

    thread = threading.Thread(target=strike if fault else time.monotonic)
    thread.start()
    code = launch(work, (cfg, folder, *more), number)
    ended = time.monotonic()
    thread.join()
    return code, ended - at[0] if at else None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_process_that_stands_still_is_named(long_run, tmp_path, number, rank):
    code, seconds = launched(trains, long_run(number), tmp_path, number, fault=(rank, signal.SIGSTOP))
    said, pid = (tmp_path / "said").read_text(), (tmp_path / f"pid-{rank}").read_text()
    assert code == 1
    assert TIMEOUT * 0.9 <= seconds <= TIMEOUT * 1.1
    assert len(re.findall(rf"dit: rank {rank} \(\S+, pid {pid}; .*\) has not answered for 10 s; stacks", said)) == 1
    stacks = {path.name: path.read_text() for path in (tmp_path / "runs" / "x" / "stacks").iterdir()}
    assert stacks.keys() == {f"rank-{r}.txt" for r in range(number)} - {f"rank-{rank}.txt"}
    assert all("Thread 0x" in text and "_train" in text for text in stacks.values())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_that_is_killed_is_named(long_run, tmp_path, capfd, rank):
    code, seconds = launched(trains, long_run(3), tmp_path, 3, fault=(rank, signal.SIGKILL))
    assert code == 128 + signal.SIGKILL
    assert seconds < 30
    assert f"dit: the process of rank {rank} was ended by SIGKILL" in capfd.readouterr().err
    said, pid = (tmp_path / "said").read_text(), (tmp_path / f"pid-{rank}").read_text()
    named = re.findall(r"rank (\d) \(\S+, pid (\d+); [^)]*\) is gone", said)
    assert named and set(named) == {(str(rank), pid)}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "data"])
def test_a_process_that_hangs_in_python_is_named_though_it_lives(long_run, tmp_path, where):
    code, _ = launched(hangs, long_run(3), tmp_path, 3, where)
    assert code == 1
    doing = {"step": "computing", "data": "waiting for data"}[where]
    said = (tmp_path / "said").read_text()
    assert re.search(rf"dit: rank 1 \(\S+, pid \d+; {doing}, [45] steps finished\) has not got on", said)
    stacks = (tmp_path / "runs" / "x" / "stacks" / "rank-1.txt").read_text()
    assert {"step": "stands", "data": "starves"}[where] in stacks


@pytest.mark.slow
def test_a_suspended_job_goes_on(long_run, tmp_path):
    """All processes are stopped for longer than the timeout."""
    cfg = long_run(2, "trainer.timeout_seconds=3")
    ended = threading.Event()

    def suspend():
        pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
        for signum, pause in ((signal.SIGSTOP, 6), (signal.SIGCONT, 6), (signal.SIGTERM, 0)):
            for pid in pids:
                os.kill(pid, signum)
            ended.wait(pause)

    metrics = Path(cfg.runs_dir) / cfg.run / "metrics.jsonl"

    def strike():
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            time.sleep(0.05)
        suspend()

    thread = threading.Thread(target=strike)
    thread.start()
    code = launch(trains, (cfg, tmp_path), 2)
    ended.set()
    thread.join()
    assert code == 75


def command(tiny, *more):
    return [
        sys.executable,
        "-m",
        "dit",
        "train",
        *tiny("run=x", "trainer.accelerator=cpu", "data.num_workers=2", *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_asks_to_start_again(tiny, tmp_path, number, signum):
    """At any moment once Python has begun with the program."""
    more = ["trainer=ddp", f"trainer.devices={number}"] if number > 1 else []
    for _ in range(6):
        delay = random.uniform(0.4, 9.0)
        process = subprocess.Popen(
            command(tiny, *more, "trainer.max_steps=1000000"),
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        time.sleep(delay)
        if random.random() < 0.5:
            os.killpg(process.pid, signum)  # as SLURM does
        else:
            process.send_signal(signum)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 75, (delay, said)
