import sys

import numpy as np
import pytest
from PIL import Image
from test_conf import dit

from dit.command import schedule
from dit.command.compose import ConfigError, compose


def draw(*overrides):
    cfg = compose("schedule", overrides)
    schedule.check(cfg)
    return schedule.main(cfg)


XL = ["experiment=imagenet256_dit_xl_2", "data.path=x"]
RECIPES = [
    ["experiment=digits"],
    XL,
    ["noise=cosine", "noise.zero_terminal_snr=true", "prediction=v", "weight=min_snr", "sampler=dpmpp", "grid=karras"],
    ["noise=flow", "prediction=x0", "weight=flow", "times=logit_normal", "sampler.num_steps=1"],
    ["noise=edm", "prediction=edm", "objective=uncertain", "objective.max_weight=0.5"],
    ["noise=linear", "noise.num_steps=1"],
]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("overrides", RECIPES, ids=" ".join)
def test_a_recipe_is_drawn(overrides, tmp_path, capsys):
    out = tmp_path / "deep" / "picture.png"
    assert draw(*overrides, f"out={out}") == 0
    with Image.open(out) as image:
        assert image.size == (1440, 840)
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_the_curves_are_those_of_the_papers():
    edm = schedule._curves(compose("schedule", ["noise=edm", "prediction=edm"]))
    np.testing.assert_allclose(edm.f_weight, 1)
    sigma = np.exp(-edm.trained / 2)
    np.testing.assert_allclose(edm.x0_weight, (sigma**2 + 0.25) / (0.5 * sigma) ** 2, rtol=1e-6)
    np.testing.assert_allclose(edm.white_loss, 1)  # F has unit variance and nothing to go by
    np.testing.assert_allclose(edm.quantiles(0.5), 2.4, atol=1e-3)
    assert np.isclose(edm.mass.sum(), 1)
    direct = schedule._curves(compose("schedule", ["noise=flow", "prediction=flow"]))
    by_x0 = schedule._curves(compose("schedule", ["noise=flow", "prediction=x0", "weight=flow"]))
    np.testing.assert_allclose(by_x0.x0_weight, direct.x0_weight)
    np.testing.assert_allclose(by_x0.white_loss, direct.white_loss)


def test_the_density_is_that_of_the_training_times():
    curves = schedule._curves(compose("schedule", ["noise=cosine"]))
    log_snr = np.unique(curves.trained)  # of the thousand steps
    steps = [curves.mass[np.isclose(curves.trained, value)].sum() for value in log_snr[[1, 500, 998]]]
    np.testing.assert_allclose(steps, 1e-3, rtol=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["noise=flow"], "noise.t_max=0.999"),
        (["sampler.num_steps=0"], "sampler.num_steps=0 must be at least 1"),
        (["noise.beta_end=3"], r"betas must lie in \(0, 1\)"),
        (["noise=flow", "prediction=flow", "times=discrete"], "choose times=uniform"),
        (["noise=edm", "times.mean=-60"], "choose other times"),
        (["weight=min_snr", "weight.gamma=0"], "weight.gamma=0 must be positive"),
        (["objective.max_weight=0"], "objective.max_weight=0 must be greater than 0"),
        (["out=picture.jpg"], "ends in .png"),
        (["out=/proc/picture.png"], "out=/proc/picture.png cannot be written"),
        (["nosie=flow"], "did you mean noise"),
    ],
)
def test_mistakes_are_answered(overrides, message):
    with pytest.raises(ConfigError, match=message):
        draw(*overrides)


def test_neither_a_name_nor_data_are_asked_for():
    cfg = compose("schedule", ["experiment=imagenet256_dit_xl_2"])
    assert cfg.data.path is None and cfg.sampler.num_steps == compose("train", XL).sampler.num_steps


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'ditforge\[plot\]'"):
        draw("experiment=digits")


def test_the_verb(tmp_path):
    code, output, _ = dit("schedule", "--help")
    assert code == 0 and "dit schedule experiment=digits" in output and "out: schedule.png" in output
    code, output, _ = dit("schedule", "-m", "experiment=digits", "grid=evenly,karras", cwd=tmp_path)
    assert code == 0 and "grid=karras" in output
    assert {path.name for path in tmp_path.glob("*.png")} == {"schedule-grid=evenly.png", "schedule-grid=karras.png"}
    code, output, _ = dit("schedule", "noise=flow", cwd=tmp_path)
    assert code == 2 and "cannot be solved for x0" in output and "Traceback" not in output
