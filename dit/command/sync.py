"""dit sync: what Weights & Biases does not have of a run yet."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_least, check_run_name, check_texts, user_errors
from dit.train import saved, tracker


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration before anything is sent.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_run_name(cfg.run)
    check_least(cfg, {}, ["timeout_seconds"])
    if cfg.logger.project is not None:
        check_texts(cfg, ["logger.project"])
    with user_errors():
        saved.config(Path(cfg.runs_dir) / str(cfg.run))


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Nothing: the jobs of a multirun differ by their runs."""


def main(cfg: DictConfig) -> int:
    """Send it; the exit code.

    Raises:
        ConfigError: if the user is not logged in.
    """
    if not tracker.logged_in():
        raise ConfigError("nobody is logged in to W&B: run `wandb login`, or set WANDB_API_KEY")
    folder = Path(cfg.runs_dir) / str(cfg.run)
    with user_errors():
        had = saved.config(folder)
        project = cfg.logger.project or OmegaConf.select(had, "logger.project", default=None) or "dit"
        config = OmegaConf.to_container(had, resolve=True)
        assert isinstance(config, dict)
        return 0 if tracker.sync(folder, {str(k): v for k, v in config.items()}, project, cfg.timeout_seconds) else 1
