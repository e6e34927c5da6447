"""dit evaluate: the figures of a run's weights."""

import json
from pathlib import Path

from omegaconf import DictConfig

from dit.command.compose import ConfigError, user_errors
from dit.command.existing import check_run, check_writable, load, offer

prepare = offer


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_run(cfg, {"num_images": 20})
    if not cfg.metric:
        raise ConfigError(f"run={cfg.run} has no metric of its own: choose one, like metric=likelihood")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a file of its own."""
    if cfg.out is None:
        cfg.out = str(Path(cfg.runs_dir) / cfg.run / f"evaluation-{suffix}.json")


def main(cfg: DictConfig) -> int:
    """Judge, print the figures, and write them with what they depend on; the exit code."""
    from omegaconf import OmegaConf

    from dit.metric.subject import check_given
    from dit.train.build import PIXELS, build

    with user_errors():
        run = load(cfg)
        trained = run.parts.cfg
        data = build(trained.data)
        data.check()
        data.check_images()
        data.prepare()
        metric = build(cfg.metric)
        check_given(metric, trained.data.get("fields", ["label"]), trained.latent._target_ == PIXELS)
        out = Path(cfg.out) if cfg.out else Path(cfg.runs_dir) / cfg.run / "evaluation.json"
        check_writable(out)
        train, held_out = data.read("train"), data.read("held_out")
    subject = run.parts.subject(run.denoiser, run.latent, seed=cfg.seed, batch_size=cfg.batch_size)
    with user_errors():
        figures = metric(subject, train, held_out, num_images=cfg.num_images)
    asked = OmegaConf.to_container(cfg, resolve=True)
    out.write_text(json.dumps({"step": run.step, **figures, "asked": asked}, indent=1) + "\n")
    for name, value in figures.items():
        print(f"  {name:<28} {value:.4g}")
    print(f"  {'written to':<28} {out}")
    return 0
