"""dit sample: draw images with the weights of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_choices, check_least, check_run_name, user_errors

AS_THE_RUN_HAD_IT = ("sampler", "grid", "guidance")


def prepare(overrides: Sequence[str] | None) -> None:
    """Make what the run had the option `run` of the groups that may be chosen anew.

    Raises:
        ConfigError: if no run is named, or there is none of the name.
    """
    if overrides is None:
        return _offer({group: {} for group in AS_THE_RUN_HAD_IT})
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    runs_dir = Path(given.get("runs_dir", "runs"))
    there = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    choice = f"runs in {runs_dir}: {', '.join(there)}" if there else f"there is none yet in {runs_dir}"
    if "run" not in given:
        raise ConfigError(f"whose weights? give run=<name>; {choice}")
    check_run_name(given["run"])
    if given["run"] not in there:
        raise ConfigError(f"run={given['run']}: no such run; {choice}")
    path = runs_dir / given["run"] / "config.yaml"
    try:
        return _offer(OmegaConf.load(path))
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise ConfigError(f"{path} is damaged, restore it: {' '.join(str(error).split())[:200]}") from error


def _offer(config: Any) -> None:
    for group in AS_THE_RUN_HAD_IT:
        ConfigStore.instance().store(group=group, name="run", node=config[group])


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_least(cfg, {"num_images": 1, "batch_size": 1, "seed": 0, "sampler.num_steps": 1, "guidance.scale": 0})
    check_choices(cfg, {"weights": ("ema", "model"), "accelerator": ("auto", "cpu", "gpu")})
    if cfg.out is not None and Path(str(cfg.out)).suffix != ".png":
        raise ConfigError(f"out={cfg.out}: the picture is a PNG; give a name that ends in .png")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a picture of its own."""
    if cfg.out is None:
        cfg.out = str(Path(cfg.runs_dir) / cfg.run / "samples" / f"{suffix}.png")


def main(cfg: DictConfig) -> int:
    """Draw, write one picture, and say where it is; the exit code."""
    import torch

    from dit.data.image import encode_png, grid
    from dit.train import checkpoint
    from dit.train.build import Parts

    folder = Path(cfg.runs_dir) / cfg.run
    trained: Any = OmegaConf.load(folder / "config.yaml")
    with user_errors():
        parts = Parts(OmegaConf.create({**trained, **{group: cfg[group] for group in AS_THE_RUN_HAD_IT}}))
        path = checkpoint.newest(folder / "checkpoints")
        if path is None:
            raise ValueError(f"{folder} has no checkpoint yet: train it first, with dit train run={cfg.run} ...")
        labels = _labels(cfg.labels, trained.condition.num_classes)
        asked: dict[str, Any] = {"label": [labels[i % len(labels)] for i in range(cfg.num_images)]}
        parts.condition(asked)
        device = torch.device("cuda" if cfg.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        if cfg.accelerator == "gpu" and device.type == "cpu":
            raise ValueError("accelerator=gpu, but torch sees none: choose accelerator=cpu")
        latent = parts.latent().to(device)
        out = Path(cfg.out) if cfg.out else folder / "samples" / f"seed-{cfg.seed}.png"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("ab").close()
        except OSError as error:
            raise ValueError(f"out={out} cannot be written: {error.strerror}") from error
    denoiser = parts.denoiser()
    denoiser.network.load_state_dict(checkpoint.load_weights(path, "model"))
    denoiser.network.load_state_dict(checkpoint.load_weights(path, cfg.weights), strict=False)
    pipeline = parts.pipeline(denoiser.to(device).eval(), latent)
    images = pipeline(asked, cfg.num_images, seed=cfg.seed, batch_size=cfg.batch_size)
    out.write_bytes(encode_png(grid(images, min(len(labels), 20, cfg.num_images))))
    print(f"{cfg.num_images} images of step {checkpoint.step_of(path)}: {out}")
    return 0


def _labels(labels: Any, num_classes: int) -> list[int]:
    """The classes to draw, in turn."""
    if labels is None:
        return list(range(min(num_classes, 10)))
    labels = [labels] if isinstance(labels, int) else list(labels)
    if not labels or not all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        raise ValueError(f"labels={labels}: give whole numbers from 0 to {num_classes - 1}, like labels=[0,1]")
    return labels
