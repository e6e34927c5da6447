"""The configuration of a run or of an export; read without torch, so that a wrong name is answered at once."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dit.weights.export import CONFIG, WEIGHTS

NEEDED = ("noise", "prediction", "model", "condition", "latent", "objective", "sampler", "grid", "guidance", "metric")

# The figures of a summary that no metric gave.
PROGRESS = {"step", "loss", "images_per_second", "skipped", "replaced", "goodput"}


def choice(runs_dir: Path) -> str:
    """The runs that there are, to choose from."""
    there = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    return f"runs in {runs_dir}: {', '.join(there)}" if there else f"there is none yet in {runs_dir}"


def config(folder: Path) -> DictConfig:
    """The configuration with which a run was trained, or of which an export was made.

    Raises:
        ValueError: if there is no such run, or its configuration is damaged.
    """
    about = exported(folder)
    path = folder / (CONFIG if about else "config.yaml")
    if not path.exists():
        raise ValueError(f"run={folder.name}: no such run; {choice(folder.parent)}")
    try:
        cfg: Any = OmegaConf.create(about["config"]) if about else OmegaConf.load(path)
        for group in NEEDED:
            cfg[group]
        return cfg
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise ValueError(f"{path} is damaged, restore it: {' '.join(str(error).split())[:200]}") from error


def exported(folder: Path) -> dict[str, Any]:
    """What an export says of itself; nothing if the folder is none.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / CONFIG
    if not (folder / WEIGHTS).exists() or not path.exists():
        return {}
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        return {"weights": "ema", **about, "config": about["config"], "step": int(about["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, export it again: {error}") from error


def summary_of(folder: Path) -> dict[str, Any]:
    """The final figures of a run; nothing if they are not there, or damaged."""
    try:
        told = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
