"""Jobs of a real SLURM, which is started for them: arguments, signals, preemption, requeue, lost nodes."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
AWKWARD = 'it\'s [a, b] "c" $HOME; #1'
PATIENCE = 120  # seconds, for anything to happen
# Besides these a state is passed through, as SIGNALING is.
ENDS = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"]

SLOW = """
import os, time
from dit.objective.denoising import Denoising

class Slow(Denoising):
    def phases(self, *args, **kwargs):
        time.sleep(float(os.environ.get("SLOW_SECONDS", 0)))
        yield from super().phases(*args, **kwargs)
"""

FAKE = """#!/usr/bin/env bash
[ "$1" = --version ] && exit
which="$SLURM_PROCID/$SLURM_STEP_NUM_TASKS of local $SLURM_LOCALID"
echo "$which sees ${CUDA_VISIBLE_DEVICES:-none}:$(printf '[%s]' "$@")"
exit "${FAKE_CODE:-0}"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := Cluster.missing():
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    there = Cluster(Path(os.environ.get("DIT_SLURM_ROOT") or tmp_path_factory.mktemp("slurm")))
    there.start()
    yield there
    if "DIT_SLURM_ROOT" not in os.environ:
        there.stop()


class Job:
    """A job that was submitted in a folder, by one of the scripts."""

    def __init__(self, cluster, folder, *words, **env):
        self.cluster = cluster
        self.folder = folder
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            cwd=folder,
            env={**cluster.env, **env},
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def _shown(self, name):
        fields = self.cluster.run("scontrol", "show", "--oneliner", "job", self.id).split()
        return dict(field.partition("=")[::2] for field in fields)[name]

    @property
    def state(self):
        return self._shown("JobState")

    @property
    def restarts(self):
        return int(self._shown("Restarts"))

    @property
    def log(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"*-{self.id}*.out")))

    def wait(self, condition, seconds=PATIENCE):
        until = time.monotonic() + seconds
        while not condition():
            late = time.monotonic() > until or (self.state == "FAILED" and not condition())
            assert not late, f"{self.state} after {seconds} s:\n{self.log}"
            time.sleep(0.2)

    def end(self, seconds=PATIENCE):
        """The state at the end."""
        self.wait(lambda: self.state in ENDS, seconds)
        return self.state


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder of jobs that run a `dit` that only says how it was called, and its PATH."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "bin").mkdir()
    (folder / "bin" / "dit").write_text(FAKE)
    (folder / "bin" / "dit").chmod(0o755)
    return folder, {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def called(job):
    return sorted(line for line in job.log.splitlines() if " sees " in line)


def test_a_task_a_gpu_each_with_all_of_its_node_and_with_what_was_given(cluster, fake):
    folder, env = fake
    words = ["run=a", f"x={AWKWARD}", "", "*", "y=[1, 2]"]
    expected = "".join(f"[{word}]" for word in ["train", *words])
    of = {}
    for asked in (
        "--gpus-per-node=2",
        "--gpus-per-task=1 --ntasks-per-node=2 --cpus-per-task=2",
        "--ntasks-per-node=1",
    ):
        of[asked] = Job(cluster, folder, "--nodes=2", *asked.split(), ROOT / "slurm" / "train.sbatch", *words, **env)
    for asked, job in of.items():
        assert job.end() == "COMPLETED", job.log
        number, seen = (2, "none") if asked == "--ntasks-per-node=1" else (4, "0,1")
        local = [rank % (number // 2) for rank in range(number)]
        assert called(job) == [f"{i}/{number} of local {local[i]} sees {seen}:{expected}" for i in range(number)]
        assert f"2 nodes x {number // 2} tasks" in job.log


def test_an_array_shares_work_or_sweeps(cluster, fake):
    folder, env = fake
    (folder / "overrides.txt").write_text(f"run=a\nrun=b {shlex.quote(AWKWARD)}\n")
    script = ROOT / "slurm" / "array.sbatch"
    shared = Job(cluster, folder, "--array=0-2", "--gpus-per-node=2", script, "encode", "out=x y", **env)
    sweep = Job(cluster, folder, "--array=0-2", script, "train", "@overrides.txt", "seed=0", **env)
    shared.wait(lambda: len(called(shared)) == 3)
    assert called(shared) == ["0/1 of local 0 sees 0,1:[encode][out=x y]"] * 3
    sweep.wait(lambda: "no line 3" in sweep.log and len(called(sweep)) == 2)
    assert [line.partition(":")[2] for line in called(sweep)] == [
        "[train][run=a][seed=0]",
        f"[train][run=b][{AWKWARD}][seed=0]",
    ]


def test_each_task_of_an_array_comes_back_by_itself(cluster, fake):
    """The number of one of them is the array's, too."""
    folder, env = fake
    script = ROOT / "slurm" / "array.sbatch"
    again = Job(cluster, folder, "--array=0-1", script, "train", "a", **env, FAKE_CODE="75", DIT_REQUEUES="1")
    again.wait(lambda: again.log.count("started again 1 times already") == 2 and len(called(again)) == 4)


def test_what_cannot_be_read_starts_nothing(cluster, fake):
    folder, env = fake
    (folder / "quotes.txt").write_text("run='a lr=3\n")
    array, train = (ROOT / "slurm" / f"{name}.sbatch" for name in ("array", "train"))
    jobs = {
        "cannot read the quotes of": Job(cluster, folder, "--array=0", array, "train", "@quotes.txt", **env),
        "is for the tasks of an array": Job(cluster, folder, array, "train", "@quotes.txt", **env),
        "DIT_REQUEUES=x must be a whole number": Job(cluster, folder, train, "a", **env, DIT_REQUEUES="x"),
    }
    for message, job in jobs.items():
        job.wait(lambda job=job, message=message: message in job.log)
        assert called(job) == []


def test_only_75_brings_a_job_back_and_not_for_ever(cluster, fake):
    folder, env = fake
    script = ROOT / "slurm" / "train.sbatch"
    again = Job(cluster, folder, script, "a", **env, FAKE_CODE="75", DIT_REQUEUES="1")
    failed = {code: Job(cluster, folder, script, "a", **env, FAKE_CODE=code) for code in ("0", "1", "2", "137")}
    for code, job in failed.items():
        assert job.end() == ("COMPLETED" if code == "0" else "FAILED"), job.log
        assert job.restarts == 0 and job._shown("ExitCode") == f"{code}:0"
    assert again.end() == "FAILED"
    assert again.restarts == 1 and again._shown("ExitCode") == "75:0" and len(called(again)) == 2
    assert "started again 1 times already" in again.log


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, digits_dir):
    """A folder of jobs that train, their environment, and overrides of runs in it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "bin").mkdir()
    (folder / "conf" / "objective").mkdir(parents=True)
    (folder / "slow.py").write_text(SLOW)
    (folder / "conf" / "objective" / "slow.yaml").write_text("defaults: [denoising]\n_target_: slow.Slow\n")
    (folder / "bin" / "dit").write_text(f'#!/bin/sh\nexec {sys.executable} -m dit "$@"\n')
    (folder / "bin" / "dit").chmod(0o755)
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{folder}", "WANDB_SILENT": "true"}

    def overrides(run, *more, steps, runs_dir="runs"):
        quoted = str(folder / runs_dir).replace('"', '\\"')
        return [
            *(f"--config-dir={folder}/conf", "objective=slow"),
            *("experiment=digits", f'runs_dir="{quoted}"', f"data_dir={digits_dir}", f"run={run}", "metric=none"),
            *("learning_rate=constant", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
            *(f"trainer.max_steps={steps}", "trainer.batch_size=32", "trainer.log_every_steps=1"),
            *("trainer.preview_every_steps=10000", "trainer.checkpoint_every_steps=20", "sampler.num_steps=2"),
            *("data.num_workers=0", "trainer.accelerator=cpu", *more),
        ]

    return folder, env, overrides


def lines(folder, run, runs_dir="runs"):
    """Each step with its loss."""
    path = folder / runs_dir / run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["loss"]) for line in found]


def ledger(folder, run):
    """What each process saw at each step in the end, with its exact loss; by rank, what was done again: (from, to)."""
    found, again = {}, {}
    for path in (folder / "runs" / run / "ledger").glob("rank-*.jsonl"):
        last = 0
        for line in map(json.loads, path.read_text().splitlines()):
            found[path.stem, line["step"]] = line["keys"], line["loss"], line["applied"]
            assert line["step"] <= last + 1, f"{path}: a step is lost before {line}"
            if line["step"] <= last:
                again.setdefault(path.stem, []).append((line["step"], last))
            last = line["step"]
    return found, again


STEPS = 300  # of the run that is disturbed
LIMITED = 1000  # of the one whose job may take two minutes; too many for it


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """The same run in two processes of this machine, without SLURM."""
    folder, env, overrides = recipe
    more = ["trainer=fsdp", "trainer.devices=2", "logger=none", "trainer.ledger=true"]
    words = overrides("local", *more, steps=STEPS)
    done = subprocess.run(
        [sys.executable, "-m", "dit", "train", *words],
        env={**os.environ, **env},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return lines(folder, "local")


@pytest.fixture(scope="module")
def beside(cluster, recipe):
    """Jobs on one node, which go on beside others: one whose time is up before it is done, one to be cancelled."""
    folder, env, overrides = recipe
    of = {}
    for run, steps, limit in (("limited", LIMITED, "2"), ("cancelled", 10_000, "10")):
        options = ["--nodelist=node1", f"--time={limit}", "--signal=USR1@30", ROOT / "slurm" / "train.sbatch"]
        words = overrides(run, "logger=none", steps=steps)
        of[run] = Job(cluster, folder, *options, *words, **env, SLOW_SECONDS="0.1")
    return of


def test_a_cancelled_job_stays_so(cluster, recipe, beside):
    folder, _, _ = recipe
    job = beside["cancelled"]
    job.wait(lambda: len(lines(folder, "cancelled")) > 3)
    cluster.run("scancel", job.id)
    job.wait(lambda: job.state == "CANCELLED")
    time.sleep(8)  # longer than a requeued job would wait
    assert job.state == "CANCELLED" and job.restarts == 0
    assert list((folder / "runs" / "cancelled" / "checkpoints").glob("step-*"))


def test_two_nodes_train_to_the_losses_of_two_processes(cluster, recipe, undisturbed):
    folder, env, overrides = recipe
    words = overrides("awkward", "trainer=fsdp", "logger=none", steps=30, runs_dir=AWKWARD)
    job = Job(cluster, folder, "--nodes=2", ROOT / "slurm" / "train.sbatch", *words, **env)
    assert job.end() == "COMPLETED", job.log
    assert "2 nodes x 1 tasks" in job.log and "2 devices (fsdp)" in job.log
    assert lines(folder, "awkward", AWKWARD) == undisturbed[:30]


def test_whatever_happens_the_run_goes_on_by_itself(cluster, recipe, beside, undisturbed):
    folder, env, overrides = recipe
    words = overrides("disturbed", "trainer=fsdp", "logger=wandb", "trainer.ledger=true", steps=STEPS)
    script = ROOT / "slurm" / "train.sbatch"
    job = Job(
        cluster, folder, "--nodes=2", "--time=30", script, *words, **env, SLOW_SECONDS="0.1", WANDB_MODE="offline"
    )
    done, identity, killed = 0, set(), []

    def runs():
        return job.state == "RUNNING" and len(lines(folder, "disturbed")) > done + 10

    def preempt():
        Job(cluster, folder, "--partition=high", "--nodelist=node2", "--exclusive", "--wrap=sleep 2", **env)

    def lose():
        cluster.kill("node2")
        killed.append(len(lines(folder, "disturbed")))
        before = job.restarts
        job.wait(lambda: job.restarts > before)  # once SLURM has noticed
        cluster.boot("node2")

    events = {
        "scancel --signal=USR1": lambda: cluster.run("scancel", "--signal=USR1", job.id),
        "preempted": preempt,
        "scontrol requeue": lambda: cluster.run("scontrol", "requeue", job.id),
    }
    if cluster.namespaces:
        events["node lost"] = lose
    for restarts, (event, cause) in enumerate(events.items()):
        job.wait(runs)
        identity.add((folder / "runs" / "disturbed" / "wandb-id").read_text())
        cause()
        job.wait(lambda: job.restarts == restarts + 1)  # noqa: B023
        done = len(lines(folder, "disturbed"))
        assert done < STEPS, f"{event} came too late"
    assert job.end() == "COMPLETED", job.log
    identity.add((folder / "runs" / "disturbed" / "wandb-id").read_text())
    assert len(identity) == 1
    assert lines(folder, "disturbed") == undisturbed
    found, again = ledger(folder, "disturbed")
    assert found == ledger(folder, "local")[0] and len(found) == 2 * STEPS
    for repeated in again.values():  # only what the lost node had not committed yet, at every 20th step
        [(first, last)] = repeated
        assert killed and killed[0] - 2 <= last <= killed[0] + 2 and first > last - 40
    assert json.loads((folder / "runs" / "disturbed" / "summary.json").read_text())["step"] == STEPS


def test_a_time_limit_is_no_end(recipe, beside):
    folder, _, _ = recipe
    job = beside["limited"]
    assert job.end() == "COMPLETED", job.log
    assert job.restarts >= 1
    assert [step for step, _ in lines(folder, "limited")] == list(range(1, LIMITED + 1))


def test_submit(cluster, recipe):
    folder, env, overrides = recipe
    more = ["seed=0,1", "logger=none", "slurm.time=10", "slurm.parallel=1", 'slurm.extra=["--comment=\\"two words\\""]']
    command = [sys.executable, "-m", "dit", "submit", "-m", *overrides("swept", *more, steps=2, runs_dir=AWKWARD)]
    done = subprocess.run(command, cwd=folder, env={**cluster.env, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    until = time.monotonic() + PATIENCE
    while cluster.run("squeue", "-h", "-t", "PD,R,CG", "-j", number):
        assert time.monotonic() < until
        time.sleep(0.2)
    for seed in (0, 1):
        log = (folder / f"dit-{number}_{seed}.out").read_text()
        assert (folder / AWKWARD / f"swept-seed={seed}" / "summary.json").exists(), log
    assert "Comment=two words" in cluster.run("scontrol", "show", "job", number)
