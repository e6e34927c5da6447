"""Compose a verb's configuration, and answer mistakes before torch is imported: the value, the nearest name, exit 2."""

import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra import compose as hydra_compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from dit.train.saved import config_dir

OmegaConf.register_new_resolver("divide", lambda a, b: a // b, replace=True)


MOST = 10**15  # no count is larger
NULLABLE = (
    "objective.huber",
    "objective.clip",
    "trainer.max_grad_norm",
    "guard.spike_deviations",
    "trainer.timeout_seconds",
)  # keys that may be null though a recipe gives them a number


class ConfigError(ValueError):
    """A mistake in the configuration."""

    exit_code = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """What objects reject as they are built is a mistake in the configuration; so is a folder that cannot be used."""
    try:
        yield
    except (ValueError, ImportError, TypeError, ZeroDivisionError, OSError) as error:
        file = getattr(error, "filename", None)
        raise ConfigError(f"{file}: {error.strerror}" if isinstance(error, OSError) and file else str(error)) from error


def launch(verb: str, command: ModuleType, arguments: Sequence[str]) -> int:
    """Check a verb's command line, then run it through Hydra.

    Args:
        verb: the name of `conf/<verb>.yaml`.
        command: with `main(cfg) -> exit code`, `check(cfg)`, `tell_apart(cfg, suffix)` for the jobs of a multirun, and,
            where options depend on the overrides, `prepare(overrides)`, None if only help is asked for; where they
            choose among several files, `configuration(overrides)`; and `VERBATIM`, keys whose values are text. Instead
            of `main`, `main_of_all(jobs, options)` is given all jobs of a multirun at once, each a configuration and
            its overrides.
        arguments: what follows the verb.

    Returns:
        The exit code.
    """
    arguments = [quoted(argument, getattr(command, "VERBATIM", ())) for argument in arguments]
    args = get_args_parser().parse_args(arguments)
    try:
        if hasattr(command, "prepare"):
            command.prepare(None if args.help else args.overrides)
        name = command.configuration(args.overrides) if hasattr(command, "configuration") else verb
        batch = [] if args.help or args.hydra_help else jobs(args.overrides, args.multirun)
        composed = [compose(name, job, [args.config_dir] if args.config_dir else []) for job in batch]
        for cfg in composed:
            command.check(cfg)
    except Exception as error:
        return _exit_code(error)
    varied = {override for job in batch for override in job if not all(override in other for other in batch)}

    def tell_apart(cfg: DictConfig, overrides: Sequence[str]) -> None:
        if own := [o for o in overrides if o in varied]:
            command.tell_apart(cfg, "-".join(re.sub(r"[^\w.=-]", "_", o) for o in own))

    if hasattr(command, "main_of_all") and batch and not (args.cfg or args.info):
        for cfg, overrides in zip(composed, batch, strict=True):
            tell_apart(cfg, overrides)
        options = ["--config-dir", args.config_dir] if args.config_dir else []
        return exit_code_of(lambda: command.main_of_all(list(zip(composed, batch, strict=True)), options))

    def task(cfg: DictConfig) -> None:
        tell_apart(cfg, HydraConfig.get().overrides.task)
        if code := exit_code_of(lambda: command.main(cfg)):
            raise SystemExit(code)  # past Hydra, which would make it 1

    sys.argv = [f"dit {verb}", *arguments]
    hydra.main(config_path=str(config_dir()), config_name=name, version_base="1.3")(task)()
    return 0


def quoted(argument: str, keys: Sequence[str]) -> str:
    """An override whose value is text, with the quotes that Hydra wants; a list, or what has quotes, is left."""
    key, _, value = argument.partition("=")
    if key not in keys or not value or value[0] in "\"'[" or value == "null":
        return argument
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


def exit_code_of(work: Callable[[], int]) -> int:
    """The exit code of some work, or of what it raised, which is printed."""
    try:
        return work()
    except KeyboardInterrupt:
        print("\ndit: stopped; the same command starts or goes on", file=sys.stderr)
        return 130
    except Exception as error:
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    """Print an error that has an exit code of its own, and give the code; raise any other.

    Of several processes that all find a mistake in the configuration the first one says so; once they have met, each
    says what it alone has found.
    """
    code: int | None = getattr(error, "exit_code", None)
    if code is None:
        raise error
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        print(f"dit: {error}", file=sys.stderr)
    elif not isinstance(error, ConfigError) or getattr(error.__cause__, "everywhere", False) or _have_met():
        print(f"dit: rank {rank}: {error}", file=sys.stderr)
    return code


def _have_met() -> bool:
    """Whether this is one of several processes that are connected; asked without importing torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


@contextmanager
def _hydra(searchpath: Sequence[str]) -> Iterator[ConfigLoader]:
    """Hydra over conf/ and the user's own folders."""
    hydra.version.setbase("1.3")
    path = create_config_search_path(str(config_dir()))
    for folder in searchpath:
        path.prepend("user", folder if "://" in folder else f"file://{Path(folder).absolute()}")
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name="dit", config_search_path=path).config_loader
    finally:
        GlobalHydra.instance().clear()


def jobs(overrides: Sequence[str], multirun: bool = False) -> list[list[str]]:
    """The overrides of every job: one, or with multirun one for each combination of comma-separated values.

    Raises:
        ConfigError: if an override cannot be parsed.
    """
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            reason = str(error).splitlines()[0].removeprefix(f"Error parsing override '{text}'").strip() or "no value"
            way_out = "write key=value, and quote special characters: 'key=\"value\"'"
            raise ConfigError(f"cannot read {text!r} ({reason}): {way_out}") from error
    if multirun:
        [batch] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [list(job) for job in batch]
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line} names several values: add -m to run them all")
    return [list(overrides)]


def compose(verb: str, overrides: Sequence[str], searchpath: Sequence[str] = ()) -> DictConfig:
    """The configuration of a verb, each override checked against what exists.

    Args:
        verb: the name of `conf/<verb>.yaml`.
        overrides: `<group>=<option>` and `<key>=<value>`.
        searchpath: folders besides conf/, like those of `hydra.searchpath`.

    Raises:
        ConfigError: naming the override and the way out.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    try:
        own = [folder for o in parsed if o.key_or_group == "hydra.searchpath" for folder in _list(o.value())]
        with _hydra([*searchpath, *own]) as loader:
            names = loader.list_groups("")
            groups = [o for o in parsed if o.key_or_group in names or "/" in o.key_or_group]
            for override in groups:
                _check_option(loader, override)
            base = hydra_compose(verb, [o.input_line or "" for o in groups])
            for override in parsed:
                if override not in groups and not override.key_or_group.startswith("hydra"):
                    _check_key(base, override, names)
            cfg = hydra_compose(verb, list(overrides))
            _check_complete(cfg)
    except ConfigError:
        raise
    except InterpolationKeyError as error:
        way_out = f"give it, or another {str(error.full_key).partition('.')[0]}"
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; {way_out}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return cfg


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_option(loader: ConfigLoader, override: Override) -> None:
    options = loader.get_group_options(override.key_or_group, ObjectType.CONFIG)
    value = override.value()
    if override.is_delete() or override.is_add():
        raise ConfigError(f"{override.input_line}: a group is chosen, not added or deleted; {_nearest('', options)}")
    for option in value if isinstance(value, list) and value else [value]:
        if option not in options:
            raise ConfigError(f"{override.input_line}: no such option; {_nearest(str(option), options)}")


def _check_key(base: DictConfig, override: Override, groups: Sequence[str]) -> None:
    """The key must exist, and a number must stay a number."""
    key = override.key_or_group
    node: Any = base
    for name in key.split("."):
        if not isinstance(node, DictConfig) or name not in list(node.keys()):
            candidates = [*_keys(base), *groups]
            raise ConfigError(f"{override.input_line}: there is no key {key}; {_nearest(key, candidates)}")
        node = node._get_node(name)
    if override.is_delete():
        raise ConfigError(f"{override.input_line}: keys cannot be deleted; set {key}=null where that is allowed")
    default = None if node._is_missing() else OmegaConf.select(base, key, throw_on_missing=False)
    value = override.value()
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{override.input_line}: expected true or false, like {key}={str(default).lower()}")
    if isinstance(default, int | float) and not isinstance(default, bool):
        wanted = int | float if isinstance(default, float) else int
        if value is None and key in NULLABLE:
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{override.input_line}: expected a finite number, like {key}={default}")
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "a number" if isinstance(default, float) else "a whole number"
            raise ConfigError(f"{override.input_line}: expected {kind}, like {key}={default}")
    if isinstance(default, ListConfig) and not isinstance(value, list):
        raise ConfigError(f"{override.input_line}: expected a list, like {key}={list(default)}".replace(" ]", "]"))
    if isinstance(default, DictConfig) and not isinstance(value, dict):
        raise ConfigError(f"{override.input_line}: {key} is a group of keys; {_nearest(key + '.', _keys(base))}")


def _check_complete(cfg: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} is not set: give {missing[0]}=<value>")
    OmegaConf.to_container(cfg, resolve=True)


def check_least(cfg: DictConfig, least: dict[str, float], positive: Sequence[str] = ()) -> None:
    """Numbers that must not be smaller: whole ones, where the least is whole; null stands for none.

    Raises:
        ConfigError: naming the key, its value and the least one.
    """
    for key, bound in least.items():
        value = _number(cfg, key, whole=isinstance(bound, int))
        if value is not None and not bound <= value <= MOST:
            raise ConfigError(f"{key}={value} must be at least {bound}" + (f", at most {MOST}" if value > MOST else ""))
    for key in positive:
        value = _number(cfg, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value} must be greater than 0")


def _number(cfg: DictConfig, key: str, whole: bool = False) -> float | None:
    value = OmegaConf.select(cfg, key)
    if value is None or (isinstance(value, int if whole else int | float) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}={_said(value)} must be a {'whole ' if whole else ''}number")


def check_choices(cfg: DictConfig, choices: dict[str, Sequence[Any]]) -> None:
    """Values that are one of a few.

    Raises:
        ConfigError: naming the key, its value and the choices.
    """
    for key, allowed in choices.items():
        if (value := OmegaConf.select(cfg, key)) not in allowed:
            raise ConfigError(f"{key}={_said(value)}: choose one of {', '.join(map(_said, allowed))}")


def check_texts(cfg: DictConfig, keys: Sequence[str]) -> None:
    """Values that must be given, as text.

    Raises:
        ConfigError: naming the key and its value.
    """
    for key in keys:
        if not isinstance(value := OmegaConf.select(cfg, key), str) or not value:
            raise ConfigError(f"{key}={_said(value)}: give a name or a path")


def _said(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value).replace(", ", ",") if isinstance(value, ListConfig) else str(value)


def check_run_name(name: Any) -> None:
    """A run's name is the name of a folder.

    Raises:
        ConfigError: if it could lead elsewhere.
    """
    named = isinstance(name, str | int) and not isinstance(name, bool)
    if not named or not re.fullmatch(r"[A-Za-z0-9_][\w.=,+-]*", str(name), re.ASCII) or ".." in str(name):
        allowed = "letters, digits and . _ - = , + after a letter or digit, no '..'"
        raise ConfigError(f"run={name}: a run's name is a folder's name, of {allowed}")


def _keys(node: DictConfig | ListConfig, prefix: str = "") -> list[str]:
    """All dotted keys."""
    if not isinstance(node, DictConfig):
        return []
    keys = []
    for name in node:
        if str(name).startswith("_"):
            continue  # Hydra's own
        child = node._get_node(name)
        keys.append(f"{prefix}{name!s}")
        if isinstance(child, DictConfig):
            keys += _keys(child, f"{prefix}{name!s}.")
    return keys


def _nearest(name: Any, candidates: Sequence[str]) -> str:
    name = str(name)
    close = difflib.get_close_matches(name, sorted(set(candidates)), n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    siblings = [c for c in candidates if c.rpartition(".")[0] == name.rpartition(".")[0]] or candidates
    return "choose one of " + ", ".join(sorted(set(siblings)))
