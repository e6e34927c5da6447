from pathlib import Path

import pytest
from PIL import Image

from dit.command import sample
from dit.command.compose import ConfigError, compose
from dit.train.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_dir):
    """Two tiny runs, one of them with EDM."""
    folder = tmp_path_factory.mktemp("sample") / "runs"
    for name, more in [("plain", []), ("edm", ["noise=edm", "prediction=edm", "sampler.num_steps=3"])]:
        overrides = [
            *("experiment=digits", f"run={name}", f"runs_dir={folder}", f"data_dir={digits_dir}", "metric=none"),
            *("logger=none", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "trainer.max_steps=3"),
            *("data.num_workers=0", *more),
        ]
        run = Run(compose("train", overrides))
        assert run.fit() is None
    return folder


def draw(runs, *overrides):
    """What `dit sample` writes."""
    overrides = [f"runs_dir={runs}", "accelerator=cpu", *overrides]
    sample.prepare(overrides)
    cfg = compose("sample", overrides)
    sample.check(cfg)
    assert sample.main(cfg) == 0
    return Path(cfg.out) if cfg.out else runs / cfg.run / "samples" / f"seed-{cfg.seed}.png"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
def test_the_same_command_writes_the_same_bytes(runs, sampler, tmp_path):
    command = ("run=plain", f"sampler={sampler}", "sampler.num_steps=5", "guidance.scale=2", "labels=[0,1,2,3]")
    first, second, other = (
        draw(runs, *command, "num_images=16", f"seed={seed}", f"out={tmp_path}/{i}.png").read_bytes()
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == second != other
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.size == (4 * 48 + 3 * 2, 4 * 48 + 3 * 2)  # a column a class


def test_a_run_draws_as_it_was_configured_unless_told_otherwise(runs):
    sample.prepare([f"runs_dir={runs}", "run=edm"])
    cfg = compose("sample", [f"runs_dir={runs}", "run=edm"])
    assert cfg.sampler.num_steps == 3 and cfg.grid._target_.endswith("karras")
    cfg = compose("sample", [f"runs_dir={runs}", "run=edm", "sampler=ddpm", "grid=evenly"])
    assert cfg.sampler.num_steps == 250 and cfg.grid._target_.endswith("evenly")


def test_raw_and_averaged_weights_differ(runs, tmp_path):
    pictures = [
        draw(runs, "run=plain", f"weights={w}", f"out={tmp_path}/{w}.png").read_bytes() for w in ("ema", "model")
    ]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("text", ["{{{", "a: 1", "\x89"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken/config\.yaml is damaged"):
        sample.prepare([f"runs_dir={tmp_path}", "run=broken"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "whose weights"),
        (["run=nope"], "no such run; runs in .*: edm, plain"),
        (["run=plain", "labels=[10]"], "give whole numbers from 0 to 9"),
        (["run=plain", "labels=[]"], "give whole numbers"),
        (["run=plain", "labels=cat"], "give whole numbers"),
        (["run=plain", "num_images=0"], "num_images=0 must be at least 1"),
        (["run=plain", "sampler.num_steps=0"], "must be at least 1"),
        (["run=plain", "sampler=dimm"], "did you mean ddim"),
        (["run=plain", "guidance.scale=-1"], "guidance.scale=-1"),
        (["run=plain", "weights=best"], "choose one of ema, model"),
        (["run=plain", "sampler.eta=2"], "eta=2"),
        (["run=plain", "out=config.yaml"], r"out=config\.yaml: the picture is a PNG"),
        (["run=plain", "out=/proc/x.png"], r"out=/proc/x\.png cannot be written"),
    ],
)
def test_mistakes_are_answered(runs, overrides, message):
    with pytest.raises(ConfigError, match=message):
        draw(runs, *overrides)
