"""What asks a run to stop, and when it does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dit.train.preemption import EXIT_CODES, Preemption, end_of_job


def raised(signum):
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


@pytest.mark.parametrize("signum", EXIT_CODES)
def test_a_signal_sets_a_flag_and_no_more(signum):
    with Preemption(speaks=False) as preemption:
        assert not preemption.agree(lambda value: value)
        raised(signum)
        assert preemption.exit_code is None
        assert preemption.agree(lambda value: value)
        assert preemption.exit_code == EXIT_CODES[signum]
        raised(signum)  # echoed
    assert signal.getsignal(signum) != preemption._note


def test_all_processes_take_the_same_code():
    with Preemption(speaks=False) as preemption:
        raised(signal.SIGTERM)
        assert preemption.agree(lambda value: max(value, 130)) and preemption.exit_code == 130
        assert Preemption(speaks=False).agree(lambda value: max(value, 75))


def test_a_signal_that_comes_while_processes_agree_counts_the_next_time():
    """If it counted at once in this process alone, the others would go on without it."""
    with Preemption(speaks=False) as preemption:

        def meanwhile(value):
            raised(signal.SIGUSR1)
            return value

        assert not preemption.agree(meanwhile)
        assert preemption.agree(lambda value: value) and preemption.exit_code == 75


def test_a_scheduler_may_repeat_itself(monkeypatch):
    monkeypatch.setattr("dit.train.preemption.ECHO_SECONDS", 0.0)
    with Preemption(speaks=False) as preemption:
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            raised(signum)
        assert preemption.agree(lambda value: value)


ENDING = """
import os, sys
from dit.__main__ import main

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {signum})

last = Last()  # goes when Python has no handlers any more
sys.argv = ["dit", "train", "run=a", "--cfg", "job"]
main()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_python_ends_does_not_change_the_exit_code(signum):
    code = ENDING.format(signum=int(signum))
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(("left", "save_seconds", "stops"), [(100, 10, False), (100, 50, True), (10, 0, True)])
def test_the_end_of_the_job_leaves_time_for_two_saves(left, save_seconds, stops, capfd):
    preemption = Preemption(ends_at=time.time() + left)
    assert preemption.agree(lambda value: value, save_seconds) == stops
    assert preemption.exit_code == (75 if stops else None)
    assert ("the job's time is up" in capfd.readouterr().out) == stops


def test_the_end_of_the_job_leaves_time_for_a_step(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    preemption = Preemption(speaks=False, ends_at=1100.0)
    assert not preemption.agree(lambda value: value)
    now = 1050.0  # such a step would end too late, but for the seconds of leaving
    assert preemption.agree(lambda value: value)


def test_the_end_of_the_job_is_what_slurm_says(tmp_path, monkeypatch):
    assert end_of_job({}) is None
    assert end_of_job({"SLURM_JOB_END_TIME": "4000000000", "SLURM_JOB_ID": "1"}) == 4000000000
    assert end_of_job({"SLURM_JOB_END_TIME": "1000"}) is None  # of a job of before
    assert end_of_job({"SLURM_JOB_END_TIME": "abc"}) is None
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\necho "$@" > asked\necho 2096-11-22T01:02:03\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for more, job in (({}, "12"), ({"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}, "10_3")):
        told = end_of_job({"SLURM_JOB_ID": "12", **more})
        assert time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told)) == "2096-11-22 01:02:03"
        assert f"--jobs={job} " in (tmp_path / "asked").read_text()
    for answer in ("echo NONE", "true", "exit 1"):
        squeue.write_text(f"#!/bin/sh\n{answer}\n")
        assert end_of_job({"SLURM_JOB_ID": "12"}) is None
