"""dit export: the weights of a run for others."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dit import __version__
from dit.command.compose import ConfigError, check_choices, check_least, check_run_name, check_texts, user_errors
from dit.command.existing import weights_of
from dit.train import saved
from dit.weights import export

if TYPE_CHECKING:
    from torch import Tensor

VERBATIM = ("path",)
TOLERATED = 0.05  # of the norm of a profile
REFUSED = 0.5


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_run_name(cfg.run)
    check_texts(cfg, ["path"])
    weights = weights_of(cfg)
    choices = {"weights": weights, "precision": ("float32", "bfloat16"), "format": ("native",)}
    check_choices(cfg, {**choices, "overwrite": (True, False)})
    check_least(cfg, {"step": 0}, ["ema_std"])
    if cfg.ema_std is None:
        return
    if cfg.ema_std > 0.288:
        raise ConfigError(f"ema_std={cfg.ema_std} must lie in (0, 0.288], like 0.10")
    if cfg.weights != "ema":
        raise ConfigError(f"give weights={cfg.weights} or ema_std={cfg.ema_std}, not both")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a folder of its own."""
    if "path=" not in suffix:
        cfg.path = f"{cfg.path}-{suffix}"


def main(cfg: DictConfig) -> int:
    """Write the weights, and say where they are; the exit code."""
    path, folder = Path(cfg.path), Path(cfg.runs_dir) / str(cfg.run)
    with user_errors():
        export.check_free(path, cfg.overwrite)
        had = saved.config(folder)

        import torch

        from dit.train import trained
        from dit.train.checkpoint import step_of

        about: dict[str, Any] = {"dit": __version__, "format": cfg.format, "precision": cfg.precision}
        if cfg.ema_std is None:
            source = trained.newest(folder, cfg.step)
            weights = trained.weights_of(source, cfg.weights)
            about |= {"weights": cfg.weights, "step": step_of(source)}
        else:
            made = trained.reconstructed(folder, cfg.ema_std, cfg.step)
            weights = made.weights
            about |= {"ema_std": cfg.ema_std, "step": made.step}
            print(f"an average of std {cfg.ema_std:g}, made of {made.num_snapshots} averages", end="")
            print(f", which miss {100 * made.misfit:.2g} % of its profile")
            way_out = "an ema_std nearer those of the run, or train with a smaller ema.snapshot_every_steps"
            if made.misfit > REFUSED:
                raise ValueError(
                    f"ema_std={cfg.ema_std}: the snapshots of run={cfg.run} cannot give it; take {way_out}"
                )
            if made.misfit > TOLERATED:
                print(f"dit: WARNING: that is much; take {way_out}")
        about |= {"parameters": sum(t.numel() for t in weights.values())}
        about |= {"config": OmegaConf.to_container(had, resolve=True)}
        export.native(path, _cast(weights, getattr(torch, cfg.precision)), about, overwrite=cfg.overwrite)
    print(f"{about['parameters']:,} parameters of step {about['step']}, {cfg.precision}: {path}")
    return 0


def _cast(weights: "dict[str, Tensor]", dtype: Any) -> "dict[str, Tensor]":
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
