"""dit export: the weights of a run for others."""

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dit import __version__
from dit.command.compose import (
    ConfigError,
    check_choices,
    check_least,
    check_run_name,
    check_texts,
    compose,
    user_errors,
)
from dit.command.existing import weights_of
from dit.train import saved
from dit.train.kind import autoencodes
from dit.weights import export
from dit.weights.push import push

if TYPE_CHECKING:
    from torch import Tensor

VERBATIM = ("path", "published")
FORMATS = ("native", "diffusers", *export.PROGRAMS)
CONVENTIONS = ("published", "sit", "jit", "adm_legacy", "diffusers_dit")  # of conf/init
TEXTS = {  # what is a name, and of what kind
    "licence": (r"(?=.*[A-Za-z])\w[\w.+-]*", "the name that hubs have for it, like licence=apache-2.0"),
    "push": (r"\w[\w.-]*/\w[\w.-]*", "a repository of the hub, like push=name/model"),
}
MOST_GB = 10**6
TOLERATED = 0.05  # of the norm of a profile
REFUSED = 0.5


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_run_name(cfg.run)
    check_texts(cfg, ["path"])
    if cfg.published is not None:
        check_texts(cfg, ["published"])
        if cfg.recipe is None:
            raise ConfigError(
                f"published={cfg.published}: give the experiment with its network, like recipe=imagenet256_dit_xl_2"
            )
        check_texts(cfg, ["recipe"])
        check_choices(cfg, {"convention": (None, *CONVENTIONS)})
        if (cfg.weights, cfg.step, cfg.ema_std) != ("ema", None, None):
            raise ConfigError("published weights are what they are: leave weights=, step= and ema_std= out")
    for key in ("recipe", "convention"):
        if cfg.published is None and cfg[key] is not None:
            raise ConfigError(f"{key}={cfg[key]} is that of published weights: give published=<file>, or leave it out")
    weights = weights_of(cfg) if cfg.published is None else ["ema"]
    choices = {"weights": weights, "precision": ("float32", "bfloat16"), "format": FORMATS}
    check_choices(cfg, {**choices, "overwrite": (True, False)})
    check_least(cfg, {"step": 0, "batch_size": 1}, ["ema_std", "shard_gb"])
    if (cfg.shard_gb or 0) > MOST_GB:
        raise ConfigError(f"shard_gb={cfg.shard_gb} must be at most {MOST_GB}: leave it out for files of 5 gigabytes")
    for key, (pattern, way_out) in TEXTS.items():
        if cfg[key] is not None and not (isinstance(cfg[key], str) and re.fullmatch(pattern, cfg[key], re.ASCII)):
            raise ConfigError(f"{key}={cfg[key]}: give {way_out}")
    if cfg.batch_size is not None and cfg.format not in export.PROGRAMS:
        raise ConfigError(f"batch_size={cfg.batch_size} is for format=pt2 and format=onnx; others take any")
    if cfg.shard_gb is not None and cfg.format in export.PROGRAMS:
        raise ConfigError(f"shard_gb={cfg.shard_gb}: format={cfg.format} is one file; leave it out")
    _check_format(cfg)
    if cfg.ema_std is None:
        return
    if cfg.ema_std > 0.288:
        raise ConfigError(f"ema_std={cfg.ema_std} must lie in (0, 0.288], like 0.10")
    if cfg.weights != "ema":
        raise ConfigError(f"give weights={cfg.weights} or ema_std={cfg.ema_std}, not both")


def _check_format(cfg: DictConfig) -> None:
    """See whether what a run trains can be had in a format."""
    with user_errors():
        had = _recipe(cfg) if cfg.published else saved.config(Path(cfg.runs_dir) / str(cfg.run))
    if cfg.format == "native":
        return
    if autoencodes(had):
        raise ConfigError(f"format={cfg.format} is for denoisers: take format=native, or the run's folder vae/")
    if cfg.format in export.PROGRAMS and "dit.condition.text.Text" in str(had.condition):
        raise ConfigError(f"format={cfg.format} is for networks that are told no text: take format=native or diffusers")
    if had.guidance.get("weak"):
        raise ConfigError(f"format={cfg.format} has no place for a second network, guidance.weak: take format=native")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a folder of its own."""
    if "path=" not in suffix:
        cfg.path = f"{cfg.path}-{suffix}"


def main(cfg: DictConfig) -> int:
    """Write the weights, and say where they are; the exit code."""
    path, folder = Path(cfg.path), Path(cfg.runs_dir) / str(cfg.run)
    with user_errors():
        export.check(path, cfg.overwrite)
        had = _recipe(cfg) if cfg.published else saved.config(folder)

        import torch

        from dit.train import lineage, trained
        from dit.train.exporting import Exporting, identities

        adapted = None
        exported = {} if cfg.published else saved.exported(folder)
        about: dict[str, Any] = {"dit": __version__, "format": cfg.format, "precision": cfg.precision}
        if cfg.published is not None:
            weights = _published(had)
            folder = Path(cfg.published)
            about |= {"weights": "ema", "step": 0, "published": folder.name}
        elif cfg.ema_std is None:
            source = trained.newest(folder, cfg.step)
            weights = trained.weights_of(source, cfg.weights)
            about |= {name: exported[name] for name in ("ema_std", "published") if name in exported}
            about |= {"step": trained.state_of(source).step}
            about |= {} if "ema_std" in about else {"weights": cfg.weights}
            if not exported and OmegaConf.select(had, "adapter._target_"):
                adapted = _adapted(source, cfg.weights)
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
        record = None if cfg.published else _few_step(folder, had, about)
        written = _cast(weights, getattr(torch, cfg.precision))
        about |= identities(weights, written, adapted, exported)
        most = export.MOST_BYTES if cfg.shard_gb is None else int(cfg.shard_gb * 1e9)
        exporting = Exporting(folder, had, written, about, record, licence=cfg.licence, most_bytes=most)
        export.commit(path, partial(exporting.write, batch_size=cfg.batch_size), overwrite=cfg.overwrite)
        print(f"{about['parameters']:,} parameters of step {about['step']}, {cfg.precision}: {path}")
        if cfg.published is None and not exported:
            lineage.note_made(folder, path)
        if cfg.push is not None:
            print(f"pushed to {push(path, cfg.push)}")
    return 0


def _recipe(cfg: DictConfig) -> DictConfig:
    """The configuration of a run that would begin with published weights."""
    weights = [f"init={cfg.convention or CONVENTIONS[0]}", f"init.path={json.dumps(cfg.published)}"]
    return compose("train", [f"experiment={cfg.recipe}", *weights, f"run={cfg.run}", "data.path=unknown"])


def _published(had: DictConfig) -> "dict[str, Tensor]":
    """Published weights by our names; the configuration then says nothing of where they were."""
    from dit.train.build import Parts
    from dit.train.published import beginning

    weights = beginning(had.init, had.noise, had.prediction, Parts(had).denoiser("meta").network)
    had.init = {}
    return weights


def _adapted(source: Path, name: str) -> "dict[str, Tensor]":
    """The weights of a checkpoint as they were trained, with their adapter beside."""
    from dit.train import checkpoint

    raw = checkpoint.load_weights(source, "model")
    return raw if name == "model" else raw | checkpoint.load_weights(source, name)


def _few_step(folder: Path, had: Any, about: dict[str, Any]) -> dict[str, Any] | None:
    """How a student is drawn, and how well, which its configuration then says, too; None: it is none."""
    from dit.train import trained
    from dit.train.build import build
    from dit.train.exporting import COMMON

    few_step = trained.few_step_at(folder, about["step"])
    if few_step is None:
        return None
    had.sampler.num_steps = few_step.nearest(had.sampler.num_steps)
    schedule, grid, measured = build(had.noise), build(had.grid), saved.summary_of(folder)
    judged = about.get("weights") == "ema" and measured.get("step") == about["step"]
    return {
        **few_step._asdict(),
        "path": OmegaConf.to_container(had.noise, resolve=True),
        "prediction": OmegaConf.to_container(had.prediction, resolve=True),
        "times": {n: grid(schedule, num_steps=n).tolist() for n in few_step.steps or COMMON},
        "measured": {k: v for k, v in measured.items() if k not in saved.PROGRESS} if judged else {},
    }


def _cast(weights: "dict[str, Tensor]", dtype: Any) -> "dict[str, Tensor]":
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
