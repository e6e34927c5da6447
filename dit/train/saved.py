"""The configuration of a run or of an export; read without torch, so that a wrong name is answered at once."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dit.weights.export import CONFIG, INDEX, VAE, WEIGHTS
from dit.weights.manifest import MANIFEST, DamagedError, listed

NEEDED = ("noise", "prediction", "model", "condition", "latent", "objective", "sampler", "grid", "guidance", "metric")

# The figures of a summary that no metric gave.
PROGRESS = {"step", "loss", "images_per_second", "skipped", "replaced", "goodput"}


def choice(runs_dir: Path) -> str:
    """The runs that there are, to choose from."""
    there = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    return f"runs in {runs_dir}: {', '.join(there)}" if there else f"there is none yet in {runs_dir}"


def config(folder: Path) -> DictConfig:
    """The configuration with which a run was trained, or of which an export was made.

    An export that has its VAE within names it where it lies.

    Raises:
        ValueError: if there is no such run, or its configuration is damaged.
        DamagedError: if a file of an export is missing.
    """
    about = exported(folder)
    path = folder / (CONFIG if about else "config.yaml")
    if not path.exists():
        raise ValueError(f"run={folder.name}: no such run; {choice(folder.parent)}")
    try:
        cfg: Any = OmegaConf.create(about["config"]) if about else OmegaConf.load(path)
        if about:
            _check_targets(OmegaConf.to_container(cfg))
        for group in NEEDED:
            cfg[group]
        if "_target_" in (cfg.metric or {}):  # of a run from before there could be several
            cfg.metric = {cfg.metric._target_.split(".")[2]: cfg.metric}
        if "extractor" not in cfg:  # the same; what recipes have
            cfg.extractor = OmegaConf.load(config_dir() / "extractor" / "inception.yaml")
        if about and (folder / VAE).is_dir():
            cfg.latent.update({"name": str(folder / VAE), "subfolder": None})
        return cfg
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise ValueError(f"{path} is damaged, restore it: {' '.join(str(error).split())[:200]}") from error


def config_dir() -> Path:
    """The folder conf/, of the checkout or of the installed package."""
    package = Path(__file__).parents[1]
    beside = package.parent / "conf"
    return beside if (beside / "train.yaml").exists() else package / "conf"


def averages(cfg: DictConfig) -> list[str]:
    """The weights that a run keeps: its averages, and the raw ones."""
    return [*OmegaConf.select(cfg, "ema.profiles", default=["ema"]), "model"]


def _check_targets(node: Any) -> None:
    """See that what an export would have called is what conf/ names: it may be from a stranger.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(node, dict):
        if "_target_" in node and str(node["_target_"]) not in _named():
            raise ValueError(
                f"_target_: {node['_target_']} is nothing that conf/ names, and an export may call nothing else"
            )
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _check_targets(child)


@cache
def _named() -> frozenset[str]:
    """Each `_target_` in conf/."""
    files = config_dir().rglob("*.yaml")
    return frozenset(match for file in files for match in re.findall(r"_target_: ([\w.]+)", file.read_text()))


def exported(folder: Path) -> dict[str, Any]:
    """What an export says of itself; nothing if the folder is none.

    Raises:
        ValueError: if what it says is damaged.
        DamagedError: if a file of it is missing.
    """
    path = folder / CONFIG
    if not any((folder / name).exists() for name in (MANIFEST, WEIGHTS, INDEX)):
        return {}
    if (folder / MANIFEST).exists() and (missing := [n for n in listed(folder) if not (folder / n).is_file()]):
        raise DamagedError(f"{folder / missing[0]} is missing: get {folder} anew, or export it again")
    if not path.exists():
        return {}
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        about = {"weights": "ema", **about, "config": about["config"], "step": int(about["step"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, export it again: {error}") from error
    if about.get("manifest") and not (folder / MANIFEST).exists():
        raise DamagedError(f"{folder / MANIFEST} is missing: get {folder} anew, or export it again")
    return about


def summary_of(folder: Path) -> dict[str, Any]:
    """The final figures of a run; nothing if they are not there, or damaged."""
    try:
        told = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
