"""Imports only go down, and rooms on one floor are blind to each other (design: 2)."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import dit
from dit.command.compose import compose
from dit.train.saved import config_dir

FLOOR = {
    **dict.fromkeys(("condition", "data", "latent", "metric", "model", "noise"), 0),
    **dict.fromkeys(("objective", "sampler", "weights"), 1),
    "train": 2,
    "command": 3,
}
ROOT = Path(dit.__file__).parent


def rooms_imported(file: Path) -> set[str]:
    """The rooms of dit that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if re.match(r"dit\.\w+", name)} & FLOOR.keys()


def test_imports_go_down():
    for file in ROOT.rglob("*.py"):
        if file.parent != ROOT:
            own = file.relative_to(ROOT).parts[0]
            up = {room for room in rooms_imported(file) - {own} if FLOOR[room] >= FLOOR[own]}
            assert not up, f"{file} imports {up}"


def test_every_room_is_on_the_plan():
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} <= FLOOR.keys()


def test_the_noise_room_stays_small_and_samplers_are_bare_functions():
    for file in (ROOT / "noise").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 115, f"{file} is no pleasure to read any more"
    for path in set((config_dir() / "sampler").glob("*.yaml")) - {config_dir() / "sampler" / "none.yaml"}:
        target = compose("train", ["experiment=digits", f"sampler={path.stem}"]).sampler._target_
        module, _, name = target.rpartition(".")
        assert name == "sample" and inspect.isfunction(getattr(importlib.import_module(module), name))


def test_instantiate_is_called_in_one_file():
    calls = [file.name for file in ROOT.rglob("*.py") if "instantiate(" in file.read_text()]
    assert calls == ["build.py"]
