"""dit pack: images, with their classes and captions, into shards with an index."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_choices, check_least, check_texts, user_errors

VERBATIM = ("source", "out", "captions", "held_out", "columns.image", "columns.caption", "columns.label")


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without looking at the source.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_texts(cfg, ["out"])
    if not cfg.source or isinstance(cfg.source, int | float):
        raise ConfigError(f"source={'null' if cfg.source is None else cfg.source}: give a folder, or a list of tars")
    for key in ("size", "quality", "shard_bytes", "num_workers"):
        if cfg[key] is not None and type(cfg[key]) is not int:
            raise ConfigError(f"{key}={str(cfg[key]).lower()}: expected a whole number")
    if isinstance(cfg.max_broken, int | float) and cfg.max_broken > 1:
        raise ConfigError(f"max_broken={cfg.max_broken} is a share: give at most 1")
    check_least(
        cfg, {"seed": 0, "num_held_out": 0, "max_broken": 0.0}, ["size", "quality", "shard_bytes", "num_workers"]
    )
    check_choices(cfg, {"format": (None, "png", "jpg", "webp"), "classes": ("auto", True, False)})


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a folder of its own."""
    if "out=" not in suffix:
        cfg.out = f"{cfg.out}-{suffix}"


def main(cfg: DictConfig) -> int:
    """Pack, and say what was packed and left out; the exit code."""
    from dit.data.pack import pack

    options: Any = OmegaConf.to_container(cfg, resolve=True)
    with user_errors():
        pack(**options)
    return 0
