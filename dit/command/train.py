"""dit train: train a model."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import (
    ConfigError,
    check_choices,
    check_least,
    check_run_name,
    check_texts,
    exit_code_of,
    user_errors,
)
from dit.train.goodput import BEGAN
from dit.train.kind import autoencodes

LEAST: dict[str, float] = {
    "trainer.max_steps": 1,
    "trainer.batch_size": 1,
    "trainer.micro_batch_size": 1,
    "trainer.lanes": 1,
    "trainer.log_every_steps": 1,
    "trainer.preview_every_steps": 1,
    "trainer.checkpoint_every_steps": 1,
    "trainer.keep_checkpoints": 1,
    "trainer.tensor_parallel_size": 1,
    "trainer.prefetch_units": 0,
    "trainer.keep_every_steps": 1,
    "trainer.timeout_seconds": 1,
    "sampler.num_steps": 1,
    "noise.num_steps": 1,
    "learning_rate.warmup_steps": 0,
    "adapter.rank": 1,
    "optimizer.weight_decay": 0.0,
    "evaluation.num_images": 100,
    "evaluation.few_images": 20,
    "evaluation.every_steps": 1,
    "evaluation.batch_size": 1,
    "ema.snapshot_every_steps": 1,
    "seed": 0,
    "guard.max_in_a_row": 1,
    "guard.max_rollbacks": 0,
}
POSITIVE = ("optimizer.lr", "trainer.max_grad_norm", "objective.max_weight", "guidance.clip", "guard.spike_deviations")
CHOICES: dict[str, Sequence[Any]] = {
    "resume": ("auto", "never"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed"),
    "trainer.float8": ("none", "tensorwise", "emulate"),
    "trainer.strategy": ("single", "ddp", "fsdp", "zero1", "zero2", "zero3"),
    "trainer.shard": ("world", "node"),
    "trainer.reshard_after_forward": (True, False),
    "trainer.offload": (True, False),
    "trainer.dry_run": (True, False),
    "trainer.ledger": (True, False),
    "trainer.poison_step": ("stop", "skip", "retry"),
    "trainer.activation_checkpointing": ("none", "full", "selective"),
}


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_run_name(cfg.run)
    check_least(cfg, LEAST, POSITIVE)
    check_choices(cfg, CHOICES)
    if cfg.evaluation.reference is not None:
        check_texts(cfg, ["evaluation.reference"])
    for key in ("nodes", "devices"):
        value = cfg.trainer[key]
        if value != "auto" and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ConfigError(f"trainer.{key}={value} must be a whole number, at least 1, or auto")
        if cfg.trainer.strategy == "single" and value != 1 and (key, value) != ("nodes", "auto"):
            raise ConfigError(
                f"trainer.{key}={value}, but trainer.strategy=single is for one: choose trainer=ddp or trainer=fsdp"
            )
    if cfg.trainer.offload and not cfg.trainer.strategy.startswith("zero"):
        raise ConfigError(
            f"trainer.offload=true goes with trainer=zero1, zero2 or zero3, not trainer={cfg.trainer.strategy}"
        )
    for key, default in {"reshard_after_forward": True, "prefetch_units": 0}.items():
        if cfg.trainer[key] != default and cfg.trainer.strategy != "fsdp":
            said = f"{key}={str(cfg.trainer[key]).lower()}"
            raise ConfigError(f"trainer.{said} goes with trainer=fsdp, not trainer.strategy={cfg.trainer.strategy}")
    keep, every = cfg.trainer.keep_every_steps, cfg.trainer.checkpoint_every_steps
    if keep and keep % every:
        raise ConfigError(
            f"trainer.keep_every_steps={keep} must be a multiple of trainer.checkpoint_every_steps={every}: of the "
            "checkpoints there are, it says which stay"
        )
    begins, end = OmegaConf.select(cfg, "objective.adversarial_from"), cfg.trainer.max_steps
    if OmegaConf.select(cfg, "objective.discriminator") and begins >= end:
        raise ConfigError(
            f"objective.adversarial_from={begins} is not less than trainer.max_steps={end}: the discriminator would "
            "never be heard; let it begin earlier, or take objective=autoencoding"
        )
    betas = OmegaConf.select(cfg, "optimizer.betas")
    if betas is not None and (
        len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
    ):
        said = ",".join(map(str, betas))
        raise ConfigError(f"optimizer.betas=[{said}] must be two numbers, from 0 to less than 1, like [0.9,0.999]")
    with user_errors():
        autoencodes(cfg)
    weight = cfg.get("weight")
    if weight and weight.get("prediction") != cfg.prediction and "weight" not in cfg.objective:
        name = cfg.objective._target_.rpartition(".")[2]
        raise ConfigError(f"weight= does nothing, as {name} does not read it: take weight=none")
    if "_target_" in cfg.adapter and "_target_" not in cfg.init:
        raise ConfigError(
            "adapter= adds to frozen weights, but init=none draws them at random: give weights to begin with, like "
            "init=run init.path=runs/<name>"
        )


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a run of its own."""
    if "run=" not in suffix:
        cfg.run = f"{cfg.run}-{suffix}"


def main(cfg: DictConfig) -> int:
    """Train, or with trainer.dry_run only say what it would need; the exit code.

    Several devices of this machine are given a process each, if no launcher has done so.
    """
    os.environ.setdefault(BEGAN, repr(time.time()))
    try:
        return _main(cfg)
    finally:
        os.environ.pop(BEGAN, None)  # another job of a multirun begins later


def _main(cfg: DictConfig) -> int:
    if cfg.trainer.dry_run:
        from dit.command.dry_run import report

        with user_errors():
            print(report(cfg))
        return 0
    with user_errors():
        from dit.train import devices
        from dit.train.checked import checked
        from dit.train.world import World

        settled = devices.settled(cfg)
        number = 1 if World().launched else devices.num_processes(settled.trainer)
        if number > 1:
            checked(settled, devices.check_launch(settled.trainer, number))
    if number > 1:
        from dit.train.launch import launch

        return launch(one_of_several, settled, number)
    return train(cfg)


def train(cfg: DictConfig) -> int:
    """Train in this process; the exit code."""
    with user_errors():
        from dit.train.files import Outlet
        from dit.train.run import Run

        run = Run(cfg)
        run.prepare()
    with redirect_stdout(Outlet(sys.stdout)):
        return run.fit() or 0


def one_of_several(cfg: DictConfig) -> int:
    """Train as one of the processes that `main` launched; the exit code."""
    return exit_code_of(lambda: train(cfg))
