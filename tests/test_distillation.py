"""Students of a run: they begin as their teacher, go on bit-equal, and have the same numbers in two processes."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from together import differences, lines, train_together, weights

from dit.command import encode
from dit.command.compose import ConfigError, compose
from dit.command.dry_run import sound
from dit.train.layout import assumed_layout

STUDENTS = {
    "consistency": ["objective.target=target", "ema=target"],
    "curriculum": ["objective/interval=shrinking", "objective.weigh_gaps=true", "experiment=digits_consistency"],
    "training": ["objective/teacher=data", "objective/interval=doubling", "experiment=digits_consistency"],
    "progressive": ["objective.num_stages=3", "ema.profiles.before.every_steps=4"],
    "meanflow": [],
    "central": ["objective/derivative=central", "objective.own_direction=true", "experiment=digits_meanflow"],
    "shortcut": [],
    "continuous_consistency": ["objective.warmup_steps=4"],
    "reflow": [],
}
STEPS, STOP = 12, 7  # in the midst of the second stage of three


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, digits_dir):
    """The configuration of a small run by its name."""
    folder = tmp_path_factory.mktemp("students")

    def of(run, *overrides, steps=STEPS):
        small = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.qk_norm=true"]
        return compose(
            "train",
            [
                *(f"run={run}", f"runs_dir={folder}/runs", f"data_dir={digits_dir}", "metric=none", "logger=none"),
                *(*small, "learning_rate=constant", "ema.decay=0.9", "data.num_workers=0", "optimizer.lr=1e-3"),
                *("trainer.batch_size=32", "trainer.log_every_steps=1", "trainer.precision=32-true"),
                *(f"trainer.max_steps={steps}", "trainer.checkpoint_every_steps=600"),
                *("trainer.preview_every_steps=1000", *overrides),
            ],
        )

    return of


@pytest.fixture(scope="module")
def student(recipe):
    """(method, run, ...) -> the configuration of a student of a teacher that has been trained a little."""
    teacher = recipe("teacher", "experiment=digits_teacher", "trainer.max_steps=30")
    assert train_together([teacher], 1) == 0
    folder = Path(teacher.runs_dir).parent / "pairs"
    made = ["run=teacher", f"runs_dir={teacher.runs_dir}", f"out={folder}", "num_images=160", "sampler.num_steps=2"]
    encode.prepare(made)
    assert encode.main(compose("pairs", made)) == 0

    def of(method, run, *overrides, steps=STEPS):
        chosen = STUDENTS[method]
        if not any(word.startswith("experiment=") for word in chosen):
            chosen = [f"experiment=digits_{method}", *chosen]
        told = {"training": [], "reflow": [f"data.path={folder}"]}.get(method, ["objective.teacher.run=teacher"])
        lasts = [f"objective.max_steps={STEPS}"] if "max_steps" in _objective(chosen) else []
        init = f"init.path={teacher.runs_dir}/teacher"
        return recipe(run, *chosen, *told, *lasts, init, *overrides, steps=steps)

    return of


def _objective(chosen):
    """The objective's node of an experiment."""
    name = next(word for word in chosen if word.startswith("experiment="))
    return compose("train", [name, "run=x"]).objective


@pytest.mark.parametrize("method", STUDENTS)
def test_a_student_goes_on_bit_equal(student, method):
    """Progressive distillation across a change of its teacher."""
    whole, parts = student(method, f"{method}-whole"), student(method, f"{method}-parts")
    assert train_together([whole, student(method, f"{method}-parts", steps=STOP), parts], 1) == 0
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines(parts)] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in lines(whole)
    ]
    for group, tensors in weights(whole).items():
        for name, value in weights(parts)[group].items():
            assert torch.equal(value, tensors[name]), (group, name)


@pytest.fixture(scope="module")
def together(student):
    """Each student by one process and, with some strategies, by two."""
    strategies = {
        "ddp": STUDENTS,
        "fsdp": STUDENTS,
        "zero2": ["consistency", "progressive", "central", "shortcut", "reflow"],
    }
    single = {method: student(method, f"{method}-one") for method in STUDENTS}
    double = {
        (method, name): student(method, f"{method}-{name}", f"trainer={name}")
        for name, methods in strategies.items()
        for method in methods
    }
    assert train_together(single.values(), 1) == 0
    assert train_together(double.values(), 2) == 0
    return {key: (run, single[key[0]]) for key, run in double.items()}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(together):
    # A loss is a small difference of large numbers, where a student begins as its teacher, and by central differences.
    tolerance = {"loss": 5e-3, "grad_norm": 5e-3, "ema": 1e-5, "model": 1e-5}
    for key, (run, reference) in together.items():
        found = differences(run, reference)
        assert all(found[name] <= most for name, most in tolerance.items()), (key, found)


def test_a_student_begins_as_its_teacher(student):
    """Whatever path it is on, and whatever it is told besides."""
    from dit.train.build import Parts
    from dit.train.run import Run

    for method in ("consistency", "meanflow", "continuous_consistency"):
        cfg = student(method, f"{method}-begin", "sampler=heun", "sampler.num_steps=8")
        run = Run(cfg)
        run.prepare()
        parts, teacher = Parts(cfg), run.objective.teacher
        denoiser = parts.denoiser()
        denoiser.network.load_state_dict(run.init)
        run._leave()
        x, told = torch.randn(4, 1, 8, 8), {"label": torch.arange(4)}
        t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64) * denoiser.schedule.t_max
        with torch.no_grad():
            ours, theirs = denoiser.eval()(x, t, **told), teacher.on(denoiser.schedule)(x, t, **told)
        torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("consistency", ["objective.teacher.run=nobody"], "run=nobody: no such run"),
        ("consistency", ["data.num_classes=11"], "data.num_classes=10"),
        ("consistency", ["objective.target=nothing"], "ema.profiles.nothing"),
        ("consistency", ["objective.teacher.solver=rk4"], "objective.teacher.solver=rk4"),
        ("consistency", ["noise=cosine", "prediction=eps"], "times as large in x0"),
        ("progressive", ["objective.max_steps=13"], "must be a multiple"),
        ("meanflow", ["model.lands=false"], "model.lands=true"),
        ("meanflow", ["noise=cosine", "prediction=v"], "noise=flow"),
        ("reflow", ["data=digits"], "dit encode run=<a teacher>"),
        ("reflow", ["noise=cosine", "prediction=eps"], "times as large in x0"),
        ("continuous_consistency", ["noise=flow", "prediction=flow"], "noise=trigonometric"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(student, method, overrides, message):
    cfg = student(method, "mistaken", *overrides)
    with pytest.raises((ConfigError, ValueError), match=message):
        sound(cfg, assumed_layout(cfg.trainer)[0])
    assert not (Path(cfg.runs_dir) / "mistaken").exists()
    assert OmegaConf.is_config(cfg)
