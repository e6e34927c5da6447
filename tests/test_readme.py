"""The README's commands and claims are those of the code."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dit.command.compose import compose, jobs, quoted

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    dit ")]


def test_the_first_screen_has_the_two_commands():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    pip install -e")]
    assert commands == ["pip install -e . && dit train experiment=digits", "pip install -e '.[dev]' && pytest -n 2"]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with all runs that the README speaks of, as far as their configurations."""
    folder = tmp_path_factory.mktemp("readme")
    recipes = {name: [f"experiment={name}"] for name in re.findall(r"experiment=(digits\w*)", README)}
    for run, words in {**recipes, "power": ["experiment=digits", "ema=power", "run=power"]}.items():
        (folder / "runs" / run).mkdir(parents=True)
        OmegaConf.save(compose("train", words), folder / "runs" / run / "config.yaml", resolve=True)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_compose(command, there, monkeypatch):
    _, verb, *words = shlex.split(command)
    module = importlib.import_module(f"dit.command.{verb}")
    monkeypatch.chdir(there)
    words = [quoted(word, getattr(module, "VERBATIM", ())) for word in words]
    if hasattr(module, "prepare"):
        module.prepare(words)
    for overrides in jobs([word for word in words if word != "-m"], multirun="-m" in words):
        name = module.configuration(overrides) if hasattr(module, "configuration") else verb
        cfg = compose(name, overrides)
        module.check(cfg)
        OmegaConf.to_container(cfg, resolve=True)


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_rooms_are_all_listed():
    rooms = {
        path.name for path in (ROOT / "dit").iterdir() if path.is_dir() and path.name not in ("__pycache__", "conf")
    }
    assert rooms == set(re.findall(r"^- \[`(\w+)`\]", README, re.MULTILINE))


def test_the_python_example_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["x"].shape == (10, 1, 8, 8)
