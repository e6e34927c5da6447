"""dit submit: have SLURM run `dit train`, as one job or, for a multirun, as an array of them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from dit.command import train
from dit.command.compose import ConfigError, check_choices, check_least, check_run_name, user_errors
from dit.train.saved import config_dir

tell_apart = train.tell_apart
LEAST: dict[str, float] = {
    "slurm.nodes": 1,
    "slurm.gpus": 0,
    "slurm.cpus": 1,
    "slurm.signal_seconds": 1,
    "slurm.requeues": 0,
    "slurm.parallel": 1,
}
OPTIONS = ("time", "partition", "account", "qos", "constraint", "mem")  # of sbatch, of the same names
VERBATIM = tuple(f"slurm.{name}" for name in OPTIONS)
TRAIN = 'set -- train "$@"\n'  # the line of the script that is replaced


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    train.check(cfg)
    check_choices(cfg, {"dry_run": (True, False)})
    check_least(cfg, LEAST)
    slurm, trainer = cfg.slurm, cfg.trainer
    for name in OPTIONS:
        value = slurm[name]
        if value is not None and not re.fullmatch(r"[^\s\"'\\#]+", str(value)):
            raise ConfigError(f"slurm.{name}={value}: a word is expected, without spaces and quotes")
    for option in slurm.extra:
        if not isinstance(option, str) or not re.fullmatch(r"--?\w.*", option):
            raise ConfigError(f"slurm.extra has {option!r}: an option of sbatch is expected, such as --exclusive")
    if slurm.time is not None and _seconds(slurm.time) <= 2 * slurm.signal_seconds:
        raise ConfigError(
            f"slurm.time={slurm.time} is too short for slurm.signal_seconds={slurm.signal_seconds}, when the job is "
            "told to stop: give more than twice as long, or fewer seconds"
        )
    nodes, gpus, number = slurm.nodes, slurm.gpus, slurm.nodes * max(1, slurm.gpus)
    if number > 1 and trainer.strategy == "single":
        raise ConfigError(
            f"slurm.nodes={nodes} slurm.gpus={gpus} make {number} devices, but trainer.strategy=single is for one: "
            "choose trainer=ddp or trainer=fsdp"
        )
    for key, wanted, given in (("nodes", nodes, "nodes"), ("devices", max(1, gpus), "gpus")):
        if trainer[key] not in ("auto", wanted) and (number > 1 or gpus or key == "nodes"):
            raise ConfigError(
                f"trainer.{key}={trainer[key]}, but slurm.{given}={slurm[given]}: leave trainer.{key}=auto"
            )
    if trainer.accelerator == "gpu" and not gpus:
        raise ConfigError("trainer.accelerator=gpu, but slurm.gpus=0: say how many of a node, such as slurm.gpus=8")
    if trainer.accelerator == "cpu" and gpus:
        raise ConfigError(f"slurm.gpus={gpus}, but trainer.accelerator=cpu would not use them: choose another trainer=")


def main_of_all(jobs: Sequence[tuple[DictConfig, Sequence[str]]], options: Sequence[str]) -> int:
    """Check all jobs of a command line, render one script for them, and submit it; the exit code.

    Args:
        jobs: configurations, each with its overrides.
        options: of `dit train`, besides overrides.

    Raises:
        ConfigError: if one does not do, or SLURM does not take them.
    """
    first, _ = jobs[0]
    for cfg, _ in jobs:
        check_run_name(cfg.run)
        if (cfg.slurm, cfg.dry_run) != (first.slurm, first.dry_run):
            raise ConfigError("slurm and dry_run must be the same for all jobs of an array: submit them one by one")
    if len({cfg.run for cfg, _ in jobs}) < len(jobs):
        raise ConfigError(f"several jobs have run={first.run}: leave it out, and each is given a name of its own")
    if not first.dry_run and not shutil.which("sbatch"):
        raise ConfigError(
            "there is no sbatch here: submit on a login node of the cluster; dry_run=true prints the script"
        )
    for cfg, _ in jobs:
        _check_fully(cfg)
    words = [_words(cfg, overrides, options, own_name=len(jobs) > 1) for cfg, overrides in jobs]
    script = rendered(first.slurm, words, "dit" if len(jobs) > 1 else first.run)
    if first.dry_run:
        print(script, end="")
        return 0
    # A job finds the `dit` that submits it, also where that was called by its path.
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    done = subprocess.run(
        ["sbatch", "--parsable"], input=script, text=True, capture_output=True, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    job = done.stdout.split(";")[0].strip()
    on = f"{first.slurm.nodes} nodes with {first.slurm.gpus or 'no'} GPUs each"
    what = f"{len(jobs)} jobs in an array, each on {on}" if len(jobs) > 1 else f"run={first.run} on {on}"
    print(f"dit: submitted {what}", file=sys.stderr)
    print(job)
    return 0


def rendered(slurm: DictConfig, jobs: Sequence[Sequence[str]], name: str) -> str:
    """slurm/train.sbatch with what the configuration asks for, and with each job's arguments.

    Args:
        slurm: the node of the configuration.
        jobs: the arguments of `dit train`; of more than one job an array is made.
        name: of the job.
    """
    tasks, array = max(1, slurm.gpus), len(jobs) > 1
    options = [f"--job-name={name}", f"--nodes={slurm.nodes}", f"--ntasks-per-node={tasks}"]
    options += [f"--gpus-per-node={slurm.gpus}"] if slurm.gpus else []
    options += [f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else []
    options += [f"--{key}={slurm[key]}" for key in OPTIONS if slurm[key] is not None]
    options += [f"--signal=USR1@{slurm.signal_seconds}"]
    if array:
        most = f"%{slurm.parallel}" if slurm.parallel else ""
        options += [f"--array=0-{len(jobs) - 1}{most}", "--output=%x-%A_%a.out"]
    options += slurm.extra
    lines = [f"set -- train {shlex.join(words)}" for words in jobs]
    if array:
        cases = [f"{task}) {line} ;;" for task, line in enumerate(lines)]
        lines = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    head, body = (config_dir().parent / "slurm" / "train.sbatch").read_text().split(TRAIN)
    asked = "\n".join([*(f"#SBATCH {option}" for option in options), f"export DIT_REQUEUES={slurm.requeues}", *lines])
    return f"{head}{asked}\n{body}"


def _words(cfg: DictConfig, overrides: Sequence[str], options: Sequence[str], own_name: bool) -> list[str]:
    """The arguments of `dit train`: the overrides of what is its own, and the run's name where it was told apart."""
    parsed = [(text, OverridesParser.create().parse_overrides([text])[0].key_or_group) for text in overrides]
    words = [text for text, key in parsed if key.split(".")[0] not in ("slurm", "dry_run")]
    if own_name:
        words = [text for text, key in parsed if text in words and key != "run"] + [f'run="{cfg.run}"']
    return [*options, *words]


def _check_fully(cfg: DictConfig) -> None:
    """What the job would find wrong as it starts, but for data and weights."""
    with user_errors():
        from dit.command.dry_run import sound
        from dit.train.layout import layout_on

        nodes, gpus = cfg.slurm.nodes, cfg.slurm.gpus
        here = cfg.copy()
        here.trainer.dry_run = True  # a GPU need not be on this machine
        if here.trainer.accelerator == "auto":
            here.trainer.accelerator = "gpu" if gpus else "cpu"
        devices = max(1, gpus) if here.trainer.devices == "auto" else here.trainer.devices
        sound(here, layout_on(here.trainer, nodes, devices))


def _seconds(time: str | int) -> int:
    """A time limit as sbatch reads it.

    Raises:
        ConfigError: if it is none.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if not match:
        raise ConfigError(f"slurm.time={time}: give minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, *parts = match.groups()
    a, b, c = (int(part or 0) for part in parts)
    if days is not None:
        return ((int(days) * 24 + a) * 60 + b) * 60 + c
    return (a * 60 + b) * 60 + c if parts[2] is not None else a * 60 + b
