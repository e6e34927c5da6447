"""What the verbs share that work on a run that exists."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_choices, check_least, check_run_name, user_errors
from dit.train import saved

if TYPE_CHECKING:
    from dit.train.loaded import Loaded

AS_THE_RUN_HAD_IT = ("sampler", "grid", "guidance", "extractor", "metric")


def offer(overrides: Sequence[str] | None) -> None:
    """Make what the run had the option `run` of the groups that may be chosen anew.

    Args:
        overrides: of the command line; None where only help is asked for.

    Raises:
        ConfigError: if no run is named, or there is none of the name.
    """
    if overrides is None:
        return _store({})
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    runs_dir = Path(given.get("runs_dir", "runs"))
    if "run" not in given:
        raise ConfigError(f"whose weights? give run=<name>; {saved.choice(runs_dir)}")
    check_run_name(given["run"])
    with user_errors():
        return _store(saved.config(runs_dir / given["run"]))


def _store(config: Any) -> None:
    for group in AS_THE_RUN_HAD_IT:
        node = config.get(group) if config else {}
        ConfigStore.instance().store(group=group, name="run", node=OmegaConf.create({} if node is None else node))


def check_run(cfg: DictConfig, least: dict[str, float]) -> None:
    """What can be said of what these verbs have in common, and of numbers that must not be smaller.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_least(cfg, {"batch_size": 1, "seed": 0, "step": 0, "sampler.num_steps": 1, "guidance.scale": 0.0, **least})
    check_choices(cfg, {"accelerator": ("auto", "cpu", "gpu"), "precision": ("float32", "bfloat16")})
    there = weights_of(cfg)
    if cfg.weights is not None:
        check_choices(cfg, {"weights": there})


def weights_of(cfg: DictConfig) -> list[str]:
    """The weights that a run has: its averages, and the raw ones; those of which an export was made.

    Raises:
        ConfigError: if there is no such run.
    """
    folder = Path(cfg.runs_dir) / str(cfg.run)
    with user_errors():
        had, about = saved.config(folder), saved.exported(folder)
    if about:
        return [about["weights"]]
    return saved.averages(had)


def weights_asked(cfg: DictConfig) -> str:
    """The weights that a configuration names, or the first that there are."""
    return str(cfg.weights or weights_of(cfg)[0])


def check_picture(out: str) -> None:
    """The name of a picture to write.

    Raises:
        ConfigError: if it is not a PNG's.
    """
    if Path(str(out)).suffix != ".png":
        raise ConfigError(f"out={out}: the picture is a PNG; give a name that ends in .png")


def check_writable(out: Path, key: str = "out") -> None:
    """See, before anything is drawn, whether the file that a key names can be written.

    Raises:
        ValueError: if not.
    """
    before = out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
        if not before:
            out.unlink()
    except OSError as error:
        raise ValueError(f"{key}={out} cannot be written: {error.strerror}") from error


def chosen(cfg: DictConfig) -> dict[str, Any]:
    """What a configuration has in the place of the run's own."""
    return {group: cfg[group] for group in AS_THE_RUN_HAD_IT if group in cfg} | {"runs_dir": cfg.runs_dir}


def load(cfg: DictConfig) -> "Loaded":
    """The run that a configuration names, sampled as the configuration says.

    Args:
        cfg: with run, runs_dir, weights, step, accelerator, cuda_graphs, and the groups that may be chosen anew.

    Raises:
        ValueError: if something does not fit together, there is no checkpoint, or a student would be drawn in another
            way than it has learned.
    """
    import torch

    from dit.train import loaded, trained

    folder = Path(cfg.runs_dir) / cfg.run
    device = torch.device("cuda" if cfg.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    if cfg.accelerator == "gpu" and device.type == "cpu":
        raise ValueError("accelerator=gpu, but torch sees none: choose accelerator=cpu")
    if cfg.cuda_graphs and device.type == "cpu":
        raise ValueError("cuda_graphs=true needs a GPU, and it is drawn on the CPU: leave it out")
    return loaded.load(folder, trained.newest(folder, cfg.step), chosen(cfg), weights_asked(cfg), device)


def execution(cfg: DictConfig) -> dict[str, Any]:
    """How a configuration has the network executed: of `Loaded.arranged`."""
    return {key: cfg[key] for key in ("compile", "cuda_graphs", "precision")}
