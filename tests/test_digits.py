"""What a trained network must show; a minute of training on two cores."""

import importlib.util
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dit.command import encode
from dit.command.compose import compose
from dit.metric.classifier import judge
from dit.train import saved, trained
from dit.train.build import Parts, build
from dit.train.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_dir):
    """A run of 1,500 steps."""
    folder = tmp_path_factory.mktemp("digits")
    overrides = ["experiment=digits", "noise=cosine", "prediction=v", "trainer.max_steps=1500", "metric=none"]
    overrides += [f"runs_dir={folder}", f"data_dir={digits_dir}", "logger=none", "trainer.preview_every_steps=1500"]
    assert Run(compose("train", overrides)).fit() is None
    return folder / "digits"


def test_hidden_halves_are_completed_to_plausible_digits(run, capsys):
    path = Path(__file__).parents[1] / "tools" / "editing_table.py"
    spec = importlib.util.spec_from_file_location("editing_table", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    figures = tool.table(run, resample=[5])
    with capsys.disabled():
        print(f"\naccuracy of a classifier of real digits: {figures['accuracy']}")
    accuracy = {name: value for name, (value, _) in figures["accuracy"].items()}
    assert all(kept for _, kept in figures["accuracy"].values())
    assert accuracy["completed, told the class, each step 5 x"] > 0.95
    assert accuracy["completed, told nothing, each step 5 x"] > accuracy["right half hidden"] + 0.05
    distances = [distance for distance, _ in figures["distance"].values()]
    assert distances[0] == 0 and distances == sorted(distances)


def test_few_steps_of_a_solver_are_as_good_as_many_of_ddpm(run):
    figures = {}
    for name, steps in [("ddpm", 250), ("ddim", 50), ("dpmpp", 20), ("heun", 18), ("unipc", 20), ("ddim", 3)]:
        cfg = saved.config(run)
        cfg.sampler = OmegaConf.load(Path(__file__).parents[1] / "conf" / "sampler" / f"{name}.yaml")
        cfg.sampler.num_steps = steps
        parts, data = Parts(cfg), build(cfg.data)
        denoiser = trained.load(parts, trained.newest(run))
        subject = parts.subject(denoiser, parts.latent(), seed=0, batch_size=500)
        figures[name, steps] = judge(subject, data.read("train"), data.read("held_out"), num_images=2000)
    reference = figures["ddpm", 250]
    for name, steps in [("ddim", 50), ("dpmpp", 20), ("heun", 18), ("unipc", 20)]:
        assert figures[name, steps]["accuracy"] > 0.9 * reference["accuracy"]
        assert figures[name, steps]["frechet"] < 1.5 * reference["frechet"]  # 2,000 samples are worth 10 %
    assert figures["ddim", 3]["frechet"] > 2 * reference["frechet"]


def test_a_vae_of_ones_own_makes_a_space_to_train_in(tmp_path, digits_dir):
    """Trained, encoded, trained in, sampled: the README's commands, shortened."""
    pytest.importorskip("diffusers")
    where = [f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/data"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits_dir / "digits")
    short = [*where, "logger=none", "trainer.preview_every_steps=10000"]
    assert Run(compose("train", ["experiment=digits_vae", "trainer.max_steps=500", *short])).fit() is None
    assert json.loads((tmp_path / "runs/digits_vae/summary.json").read_text())["psnr"] > 22
    out = f"out={tmp_path}/data/digits_latents"
    assert encode.main(compose("encode", ["data=digits", "latent=digits_vae", out, *where])) == 0
    assert Run(compose("train", ["experiment=digits_latent", "trainer.max_steps=1000", *short])).fit() is None
    summary = json.loads((tmp_path / "runs/digits_latent/summary.json").read_text())
    assert summary["accuracy"] > 0.9 and summary["diversity"] > 0.6
    assert summary["frechet"] < 2 * summary["frechet_floor"]
