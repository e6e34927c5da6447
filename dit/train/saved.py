"""The configuration that a run has saved; read without torch, so that a wrong name is answered at once."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

NEEDED = ("noise", "prediction", "model", "condition", "latent", "objective", "sampler", "grid", "guidance", "metric")


def choice(runs_dir: Path) -> str:
    """The runs that there are, to choose from."""
    there = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    return f"runs in {runs_dir}: {', '.join(there)}" if there else f"there is none yet in {runs_dir}"


def config(folder: Path) -> DictConfig:
    """The configuration with which a run was trained.

    Raises:
        ValueError: if there is no such run, or its configuration is damaged.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise ValueError(f"run={folder.name}: no such run; {choice(folder.parent)}")
    try:
        cfg: Any = OmegaConf.load(path)
        for group in NEEDED:
            cfg[group]
        return cfg
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise ValueError(f"{path} is damaged, restore it: {' '.join(str(error).split())[:200]}") from error
