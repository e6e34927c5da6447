"""What `dit submit` hands to sbatch, by one that only writes down what it is given; and the scripts it is made of."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dit.command import submit
from dit.command.compose import ConfigError, compose, launch

ROOT = Path(__file__).parents[1]
AWKWARD = """it's [a, b] "c" $HOME `x` \\; #1 *"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """What an `sbatch` keeps that only keeps the script."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\n[ "$*" = --parsable ] && cat > {tmp_path}/script && echo "77;cluster"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "script"


@pytest.fixture
def hasty(monkeypatch):
    """What takes seconds is left out."""
    monkeypatch.setattr(submit, "_check_fully", lambda cfg: None)


def run(script, task=None):
    """The arguments of `dit` for a task of a script, by bash, and the lines for sbatch."""
    head, _ = script.split("# --- From here on")
    say = f'{sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"'
    env = {"PATH": os.environ["PATH"]} | ({"SLURM_ARRAY_TASK_ID": str(task)} if task is not None else {})
    output = subprocess.run(["bash"], input=head + say, env=env, capture_output=True, text=True, check=True).stdout
    return json.loads(output), [
        line.removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH")
    ]


def test_what_is_asked_for_arrives(sbatch, hasty, capsys):
    quoted = 'data_dir="' + AWKWARD.replace('"', '\\"') + '"'
    overrides = ["experiment=digits", "trainer=fsdp", quoted, "sampler.num_steps=7", "logger=none"]
    asked = ["slurm.nodes=4", "slurm.gpus=2", "slurm.time=1-12:00:00", "slurm.cpus=8", "slurm.partition=a,b"]
    asked += [
        "slurm.mem=100G",
        "slurm.requeues=3",
        "slurm.constraint=x&y",
        'slurm.extra=["--exclusive"]',
        "dry_run=false",
    ]
    assert launch("submit", submit, [*asked[:5], *overrides, *asked[5:]]) == 0
    assert capsys.readouterr().out == "77\n"
    script = sbatch.read_text()
    arguments, options = run(script)
    assert arguments == ["train", *overrides]
    assert compose("train", arguments[1:]).data_dir == AWKWARD
    assert options[options.index("--signal=USR1@120") + 1 :] == [
        *("--job-name=digits", "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=8"),
        *("--time=1-12:00:00", "--partition=a,b", "--constraint=x&y", "--mem=100G", "--signal=USR1@120", "--exclusive"),
    ]
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert "export DIT_REQUEUES=3\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_multirun_is_one_array_of_runs_with_names_of_their_own(sbatch, hasty):
    overrides = ["experiment=digits", "seed=0,1", "logger=none", "slurm.parallel=2"]
    assert launch("submit", submit, ["--multirun", *overrides]) == 0
    for seed in (0, 1):
        arguments, options = run(sbatch.read_text(), seed)
        assert sorted(arguments) == sorted(
            ["train", "experiment=digits", f"seed={seed}", "logger=none", f'run="digits-seed={seed}"']
        )
    assert "--array=0-1%2" in options and "--output=%x-%A_%a.out" in options
    assert launch("submit", submit, ["-m", "experiment=digits", "run=a,b", "slurm.time=10"]) == 0
    assert run(sbatch.read_text(), 1)[0] == ["train", "experiment=digits", 'run="b"']


def test_a_dry_run_prints_the_script(sbatch, hasty, capsys):
    assert launch("submit", submit, ["experiment=digits", "dry_run=true"]) == 0
    script = capsys.readouterr().out
    assert run(script)[0] == ["train", "experiment=digits"] and not sbatch.exists()


def test_a_folder_of_ones_own_goes_along(sbatch, hasty, tmp_path):
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text("defaults: [ddim]\nnum_steps: 7\n")
    own = ["--config-dir", str(tmp_path), "experiment=digits", "sampler=mine"]
    assert launch("submit", submit, own) == 0
    assert run(sbatch.read_text())[0] == ["train", *own]


MISTAKES = [
    ({"trainer.max_steps": 0}, "trainer.max_steps=0 must be at least 1"),
    ({"slurm.nodes": 0}, "slurm.nodes=0 must be at least 1"),
    ({"slurm.cpus": 1.5}, "slurm.cpus=1.5 must be a whole number"),
    ({"slurm.cpus": "many"}, "slurm.cpus=many must be a whole number"),
    ({"slurm.partition": "a b"}, "slurm.partition=a b: a word"),
    ({"slurm.time": "soon"}, "slurm.time=soon: give minutes"),
    ({"slurm.time": "00:03:59"}, "slurm.time=00:03:59 is too short for slurm.signal_seconds=120"),
    ({"slurm.extra": ["exclusive"]}, "slurm.extra has 'exclusive'"),
    ({"slurm.extra": ["--a\nrm"]}, "slurm.extra has '--a"),
    ({"slurm.nodes": 2}, "slurm.nodes=2 slurm.gpus=0 make 2 devices, but trainer.strategy=single"),
    ({"slurm.gpus": 1}, "slurm.gpus=1, but trainer.accelerator=cpu"),
    ({"trainer.accelerator": "gpu"}, "trainer.accelerator=gpu, but slurm.gpus=0"),
    ({"trainer.strategy": "ddp", "trainer.nodes": 4}, "trainer.nodes=4, but slurm.nodes=1"),
    ({"trainer.strategy": "ddp", "slurm.nodes": 2, "trainer.devices": 4}, "trainer.devices=4, but slurm.gpus=0"),
]


@pytest.fixture(scope="module")
def digits():
    return compose("submit", ["experiment=digits"])


@pytest.mark.parametrize(("values", "words"), MISTAKES, ids=str)
def test_mistakes_are_found(digits, values, words):
    cfg = digits.copy()
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    with pytest.raises(ConfigError, match=re.escape(words)):
        submit.check(cfg)


LATE = [
    (["slurm.nods=2"], "did you mean slurm.nodes"),
    (["trainer=fsdp", "slurm.nodes=3"], "trainer.batch_size=128 must be a multiple of the 3 ranks"),
    (["-m", "slurm.nodes=1,2", "trainer=ddp"], "must be the same for all jobs"),
    (["-m", "seed=0,0"], "several jobs have run=digits"),
    (["-m", "data_dir=../x,y"], "no '..'"),
]


@pytest.mark.parametrize(("overrides", "words"), LATE, ids=str)
def test_nothing_is_submitted_then(sbatch, capsys, overrides, words):
    flags, overrides = [o for o in overrides if o == "-m"], [o for o in overrides if o != "-m"]
    assert launch("submit", submit, [*flags, "experiment=digits", *overrides]) == 2
    assert words in capsys.readouterr().err
    assert not sbatch.exists()


def test_without_sbatch_or_against_its_will(hasty, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch("submit", submit, ["experiment=digits"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert launch("submit", submit, ["experiment=digits"]) == 2
    assert "sbatch refused the job: sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("5", 300), (90, 5400), ("1:30", 90), ("1:0:0", 3600), ("2-1", 176400)])
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert submit._seconds(text) == seconds


def test_the_scripts_share_what_runs_a_step():
    train, array = [(ROOT / "slurm" / f"{name}.sbatch").read_text() for name in ("train", "array")]
    marker = "# --- From here on"
    assert train.split(marker)[1] == array.split(marker)[1]
    assert train.count(submit.TRAIN) == 1
    header = [[line for line in text.splitlines() if line.startswith("#SBATCH")] for text in (train, array)]
    assert set(header[0]) ^ set(header[1]) == {"#SBATCH --output=%x-%j.out", "#SBATCH --output=%x-%A_%a.out"}
