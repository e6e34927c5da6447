"""dit train: train a model."""

import signal

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_least, check_run_name

LEAST = {
    "trainer.max_steps": 1,
    "trainer.batch_size": 1,
    "trainer.micro_batch_size": 1,
    "trainer.lanes": 1,
    "trainer.log_every_steps": 1,
    "trainer.preview_every_steps": 1,
    "trainer.checkpoint_every_steps": 1,
    "trainer.keep_checkpoints": 1,
    "sampler.num_steps": 1,
    "learning_rate.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "evaluation.num_images": 100,
    "evaluation.batch_size": 1,
    "seed": 0,
}
POSITIVE = ("optimizer.lr", "trainer.max_grad_norm")
CHOICES = {
    "resume": ("auto", "never"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.precision": ("32-true", "bf16-mixed"),
    "trainer.devices": (1,),
}


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_run_name(cfg.run)
    check_least(cfg, LEAST, POSITIVE)
    for key, choices in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in choices:
            raise ConfigError(f"{key}={value}: choose one of {', '.join(map(str, choices))}")


def main(cfg: DictConfig) -> int:
    """Train; the exit code."""
    from dit.command.compose import user_errors

    with user_errors():
        from dit.train.run import Run

        run = Run(cfg)
    signum = run.fit()
    return {None: 0, signal.SIGINT: 130, signal.SIGTERM: 75}[signum]
