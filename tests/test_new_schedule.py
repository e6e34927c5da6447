"""Adding a schedule is one file and one yaml, in a folder of one's own."""

import sys

import pytest
from test_sample import SAMPLERS

from dit.command import sample
from dit.command.compose import compose
from dit.train.run import Run

SCHEDULE = '''
from dit.noise.schedule import NoiseLevel, Schedule


class Parabola(Schedule):
    """alpha = 1 - 0.99 t^2, sigma = t."""

    def __call__(self, t):
        return NoiseLevel(1 - 0.99 * t**2, t)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With one file and one yaml."""
    (tmp_path / "parabola.py").write_text(SCHEDULE)
    (tmp_path / "conf" / "noise").mkdir(parents=True)
    (tmp_path / "conf" / "noise" / "parabola.yaml").write_text("_target_: parabola.Parabola\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("parabola", None)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "edm"])
def test_a_new_schedule_trains_and_samples_with_every_prediction_and_sampler(folder, tiny, prediction):
    search = f"hydra.searchpath=[file://{folder}/conf]"
    run = Run(compose("train", tiny(search, "noise=parabola", f"prediction={prediction}", "trainer.max_steps=3")))
    assert run.fit() is None
    overrides = ["run=digits", f"runs_dir={folder}/runs", "accelerator=cpu", "num_images=4", "sampler.num_steps=3"]
    sample.prepare(overrides)
    for sampler in SAMPLERS:
        out = folder / f"{sampler}.png"
        cfg = compose("sample", [*overrides, f"sampler={sampler}", f"out={out}"])
        sample.check(cfg)
        assert sample.main(cfg) == 0 and out.exists()
