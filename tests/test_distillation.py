"""Students of a run: they begin as their teacher, go on bit-equal, and have the same numbers in two processes."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from together import differences, lines, train_together, weights

from dit.command import encode, existing, export, sample
from dit.command.compose import ConfigError, compose, user_errors
from dit.command.dry_run import sound
from dit.noise.flow import Flow
from dit.noise.prediction import flow
from dit.train import checkpoint, trained
from dit.train.build import Parts
from dit.train.checked import checked
from dit.train.devices import settled
from dit.train.layout import assumed_layout
from dit.train.run import Run
from dit.weights import manifest
from dit.weights.lora import merged
from dit.weights.manifest import DamagedError

STUDENTS = {
    "consistency": ["objective.target=target", "ema=target"],
    "curriculum": ["objective/interval=shrinking", "objective.weigh_gaps=true", "experiment=digits_consistency"],
    "training": ["objective/teacher=data", "objective/interval=doubling", "experiment=digits_consistency"],
    "progressive": ["objective.num_stages=3", "ema.profiles.before.every_steps=4"],
    "meanflow": ["objective/derivative=jvp"],
    "central": ["objective.own_direction=true", "experiment=digits_meanflow"],
    "shortcut": [],
    "continuous_consistency": ["objective/derivative=jvp", "objective.warmup_steps=4"],
    "guidance_distillation": [
        *("experiment=digits_guidance_distillation", "objective.teacher.scale=1", "objective.scales=[1,4]"),
        *("model.guided=true", "guidance=told", "sampler.num_steps=2"),
    ],
    "lora": ["adapter=lora", "adapter.rank=4", "experiment=digits_consistency_lora"],
    "dmd": ["objective=dmd_gan", "objective.every=3", "sampler.num_steps=2", "experiment=digits_dmd"],
    "reflow": [],
}
STATEFUL = ("consistency", "progressive", "continuous_consistency", "dmd")  # what the others do they do, too
STEPS, STOP = 12, 7  # in the midst of the second stage of three, and of what a critic learns between two steps


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


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[] if method in STATEFUL else pytest.mark.slow) for method in STUDENTS],
)
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


def test_the_average_is_that_of_the_students_own_steps(student):
    """And they alone are counted: of five steps of the trainer, in which the critic learns, the third."""
    cfg = student("dmd", "dmd-average", "ema.warmup=true", steps=5)
    assert train_together([cfg], 1) == 0
    began, found = weights(OmegaConf.merge(cfg, {"run": "teacher"}))["ema"], weights(cfg)
    share = (1 + 1) / (10 + 1)
    for name, value in began.items():
        torch.testing.assert_close(found["ema"][name], share * value + (1 - share) * found["model"][name])
    assert all(value == 1 for name, value in found["optimizer"].items() if name.endswith("/step"))
    assert all(value == 5 for name, value in found["optimizer-critic"].items() if name.endswith("/step"))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_several_optimizers_are_refused_under_zero(student):
    cfg = student("dmd", "dmd-zero", "trainer=zero2")
    with pytest.raises(ValueError, match=r"trainer\.strategy=zero2: .* another for its critic; choose trainer=ddp"):
        sound(cfg, assumed_layout(cfg.trainer)[0])


@pytest.fixture(scope="module")
def together(student):
    """Each student by one process and, with some strategies, by two."""
    strategies = {
        "ddp": STUDENTS,
        "fsdp": STUDENTS,
        "zero2": [method for method in STUDENTS if method != "dmd"],
        "zero3": ["lora"],
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
    for key, (run, reference) in together.items():
        loosely = 3e-2 if key[0] == "central" else 5e-3
        tolerance = {"loss": loosely, "grad_norm": loosely, "ema": 1e-5, "model": 1e-5}
        found = differences(run, reference)
        assert all(found[name] <= most for name, most in tolerance.items()), (key, found)


@pytest.mark.parametrize("objective", ["meanflow", pytest.param("shortcut", marks=pytest.mark.slow)])
def test_a_unet_is_told_where_it_lands(tmp_path, digits_dir, objective):
    """And its dropout is no hindrance; it learns to heed it."""
    cfg = compose(
        "train",
        [
            *("experiment=digits", "run=unet", f"runs_dir={tmp_path}", f"data_dir={digits_dir}", "metric=none"),
            *("model=unet_digits", "model.lands=true", "model.model_channels=8", "model.head_channels=8"),
            *("model.dropout=0.1", "noise=flow", "prediction=flow", "sampler=flow_map", "sampler.num_steps=2"),
            *(f"objective={objective}", "objective/teacher=data", "learning_rate=constant", "optimizer.lr=1e-3"),
            *("trainer.max_steps=4", "trainer.batch_size=32", "trainer.log_every_steps=1", "logger=none"),
            *("data.num_workers=0", "trainer.preview_every_steps=4"),
        ],
    )
    assert train_together([cfg], 1) == 0
    assert weights(cfg)["model"]["gap_embedder.mlp.2.weight"].abs().max() > 0
    assert [line["step"] for line in lines(cfg)] == [1, 2, 3, 4] and list((tmp_path / "unet" / "samples").iterdir())


def test_a_student_begins_as_its_teacher(student):
    """Whatever path it is on, and whatever it is told besides."""
    for method in ("consistency", "meanflow", "continuous_consistency"):
        cfg = student(method, f"{method}-begin")
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


def test_a_student_may_say_something_else_of_what_its_teacher_sees(student, capsys):
    """A velocity, of what another schedule would show; that it is not its equal is said."""
    cfg = student("consistency", "seen", "noise=matched", "noise@noise.path=flow", "noise@noise.of=linear")
    run = Run(cfg)
    run.prepare()
    run._leave()
    assert (
        "teacher knows noise=flow prediction=flow, and this network is to know noise=linear" in capsys.readouterr().out
    )
    teacher = weights(OmegaConf.merge(cfg, {"run": "teacher"}))["ema"]
    assert all(torch.equal(run.init[name], value) for name, value in teacher.items())
    assert run.parts.schedule.of.num_steps == 1000 and run.parts.prediction.func is flow


def test_a_student_with_an_adapter(student, monkeypatch):
    """The adapter alone is trained; what is drawn, begun with and followed has it merged, and knows no peft."""
    from dit.command.export import main
    from dit.train.build import Parts
    from dit.train.run import Run

    cfg = student("lora", "adapted", steps=3)
    run = Run(cfg)
    plain = trained.initial(cfg.init.path)
    assert all(torch.equal(value, plain[name]) for name, value in merged(run.init).items())
    run.prepare()
    assert run.fit() is None

    folder = Path(cfg.runs_dir) / "adapted"
    path = trained.newest(folder)
    averages, frozen = (checkpoint.load_weights(path, group) for group in ("ema", "model"))
    assert averages and all(".lora_" in name for name in averages)
    assert {name.rpartition("/")[0] for name in checkpoint.layout(path, "optimizer")} == averages.keys()
    names = {name: name.replace(".base_layer", "") for name in frozen.keys() - averages.keys()}
    assert all(torch.equal(frozen[name], plain[short]) for name, short in names.items())

    monkeypatch.setitem(sys.modules, "peft", None)
    weights = trained.initial(str(folder))
    assert weights.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(weights[name], plain[name])}
    assert changed == {short for name, short in names.items() if name.endswith(".base_layer.weight")}
    begun = Run(student("consistency", "grandchild", f"init.path={folder}", steps=3))
    assert all(torch.equal(value, weights[name]) for name, value in begun.init.items())
    begun._leave()
    loaded = trained.load(Parts(cfg), path).network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    assert main(compose("export", ["run=adapted", f"runs_dir={cfg.runs_dir}", f"path={folder}/out"])) == 0
    Parts(cfg).denoiser().network.load_state_dict(load_file(folder / "out" / "model.safetensors"))

    with pytest.raises(ValueError, match=r"adapter\.rank=None, was 4"):
        Run(student("consistency", "adapted", steps=5))


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("consistency", ["objective.teacher.run=nobody"], "objective.teacher.run=nobody: no such run"),
        ("consistency", ["objective.teacher.run=null"], "objective.teacher.run=None: give the name"),
        ("consistency", ["objective.teacher.weights=fast"], "objective.teacher.weights=fast: teacher has ema, model"),
        ("consistency", ["objective.teacher.step=7"], "objective.teacher.run=teacher: .* has no checkpoint of step 7"),
        ("consistency", ["data.num_classes=11"], "data.num_classes=10"),
        ("consistency", ["objective.target=nothing"], "ema.profiles.nothing"),
        ("consistency", ["objective.teacher.solver=rk4"], "objective.teacher.solver=rk4"),
        ("consistency", ["noise=cosine", "prediction=eps"], "times as large in x0"),
        ("consistency", ["objective.teacher.scale=-1"], "scale=-1"),
        ("consistency", ["objective.teacher.scale=2", "objective.teacher.interval=[0.9,0.1]"], "interval"),
        ("progressive", ["objective.max_steps=13"], "must be a multiple"),
        ("progressive", ["objective/teacher=data"], "take objective/teacher=run"),
        ("meanflow", ["model.lands=false"], "model.lands=true"),
        ("meanflow", ["noise=cosine", "prediction=v"], "noise=flow"),
        ("reflow", ["data=digits"], "dit encode run=<a teacher>"),
        ("reflow", ["noise=cosine", "prediction=eps"], "times as large in x0"),
        ("continuous_consistency", ["noise=flow", "prediction=flow"], "noise=trigonometric"),
        ("consistency", ["sampler=heun"], "the sampler heun does not draw a student of consistency"),
        ("progressive", ["sampler.num_steps=2"], "has learned 1 step: take sampler.num_steps=1"),
        ("shortcut", ["sampler.num_steps=3"], "has learned 1, 2, 4, 8, 16, 32 or 64 steps: take sampler.num_steps=2"),
        (
            "consistency",
            ["objective.teacher.scale=2", "guidance.scale=2"],
            "would guide twice: a student of consistency has guidance of scale 2 for good; take guidance.scale=1",
        ),
        ("guidance_distillation", ["model.guided=false", "guidance=classifier_free"], "model.guided=true, or neither"),
        ("guidance_distillation", ["guidance.scale=5"], "guidance.scale=4"),
        ("guidance_distillation", ["guidance=classifier_free"], "take guidance=told"),
        ("guidance_distillation", ["objective.scales=[4,1]"], "two rising scales"),
        ("guidance_distillation", ["objective.teacher.scale=2"], "give one of them"),
        ("guidance_distillation", ["objective.scales=null"], "is no guidance, so that there is nothing to learn"),
        ("guidance_distillation", ["objective/teacher=data"], "take objective/teacher=run"),
        ("guidance_distillation", ["model.guided=false"], "guidance=told is for a network with model.guided=true"),
        ("meanflow", ["trainer=fsdp_tp", "trainer.tensor_parallel_size=2"], "objective/derivative=central"),
        ("consistency", ["objective/teacher=export"], "run=teacher: no such run"),
        (
            "consistency",
            ["objective/teacher=published", "objective.teacher.init.path=/nowhere.pt"],
            "objective.teacher.init.path=/nowhere.pt: /nowhere.pt: no such file",
        ),
        (
            "consistency",
            [
                *("objective/teacher=published", "objective.teacher.init.path=/nowhere.pt"),
                *("noise=matched", "noise@noise.path=flow", "noise@noise.of=linear"),
            ],
            "prediction=matched names what published weights predict",
        ),
        ("dmd", ["objective/critic=none"], "objective/critic=run"),
        (
            "dmd",
            ["objective/teacher=published", "objective/critic=published", "objective.teacher.init.path=/nowhere.pt"],
            "init.path=/nowhere.pt: /nowhere.pt: no such file",
        ),
        ("dmd", ["objective.every=0"], "objective.every=0"),
        ("central", ["objective.derivative.h=0"], "objective.derivative.h=0"),
        ("continuous_consistency", ["times.std=0"], "times.std=0"),
        ("consistency", ["prediction=matched"], "take noise=matched"),
        ("dmd", ["objective.critic.run=nobody"], "run=nobody: no such run"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(student, method, overrides, message):
    cfg = student(method, "mistaken", *overrides)
    with pytest.raises((ConfigError, ValueError), match=message):
        sound(cfg, assumed_layout(cfg.trainer)[0])
    assert not (Path(cfg.runs_dir) / "mistaken").exists()
    assert OmegaConf.is_config(cfg)


def test_a_teacher_of_another_latent_space_is_refused(recipe, student):
    """Of the same shape, but scaled otherwise."""
    cfg = recipe("vae", "latent=sd_vae", "data.image_size=64", "objective=consistency", "objective.teacher.run=teacher")
    assert cfg.objective.teacher.needs["latent.scale"] == 0.18215
    with pytest.raises(ValueError, match=r"trained with latent\.scale=None, but this run has 0\.18215"):
        trained.teacher("teacher", cfg.runs_dir, needs={"latent.scale": 0.18215})


def test_a_teacher_may_move_but_not_become_another(recipe, student, tmp_path):
    cfg = student("consistency", "pupil", steps=2)
    assert train_together([cfg, recipe("other", "experiment=digits_teacher", steps=2)], 1) == 0
    for name, of in (("moved", "teacher"), ("other", "other")):
        shutil.copytree(Path(cfg.runs_dir) / of, tmp_path / name / "teacher")
    Run(student("consistency", "pupil", f"objective.teacher.runs_dir={tmp_path}/moved", steps=2))._leave()
    with pytest.raises(ValueError, match=r"a teacher of other weights: .* objective\.teacher\.step=<its step>"):
        Run(student("consistency", "pupil", f"objective.teacher.runs_dir={tmp_path}/other", steps=2))


@pytest.fixture(scope="module")
def kept(student):
    """The folder of runs, with a student of each kind: one number of steps a stage, any, and with guidance told."""
    every = ["trainer.checkpoint_every_steps=4", "trainer.keep_every_steps=4"]
    cfgs = [
        student("progressive", "halved", *every),
        student("consistency", "any", "objective.teacher.scale=2"),
        student("guidance_distillation", "told"),
        student("meanflow", "guided", "objective.teacher.scale=2", steps=2),
    ]
    assert train_together(cfgs, 1) == 0
    return Path(cfgs[0].runs_dir)


def loaded(runs, run, *overrides):
    """What `dit sample` would draw with."""
    overrides = [f"run={run}", f"runs_dir={runs}", *overrides]
    sample.prepare(overrides)
    cfg = compose("sample", overrides)
    sample.check(cfg)
    with user_errors():
        return existing.load(cfg)


def drawn(run):
    """What it draws of fixed noise, as numbers."""
    parts, x = run.parts, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    guided, told = parts._guidance(run.denoiser, parts.condition.null), {"label": torch.arange(4)}
    with torch.no_grad():
        return parts._sampler(
            lambda x_t, t, s=None: guided(x_t, t.expand(4), s if s is None else s.expand(4), **told),
            parts.schedule,
            x,
            parts.grid(parts.schedule),
            generator=torch.Generator().manual_seed(1),
        )


@pytest.mark.parametrize(
    ("run", "step", "num_steps"),
    [("halved", 4, 4), ("halved", 8, 2), ("halved", 12, 1), *[("any", 12, n) for n in (1, 2, 5)], ("told", 12, 3)],
)
def test_an_export_draws_what_its_run_does(kept, tmp_path, run, step, num_steps):
    """In all numbers of steps that it supports."""
    overrides = ["run=" + run, f"runs_dir={kept}", f"path={tmp_path}/weights", f"step={step}"]
    assert export.main(compose("export", overrides)) == 0
    said = json.loads((tmp_path / "weights" / "few_step.json").read_text())
    known = {"halved": [num_steps], "any": None, "told": None}[run]
    assert said["steps"] == known and said["guidance"] == {"halved": 1.0, "any": 2.0, "told": [1.0, 4.0]}[run]
    assert (said["path"]["_target_"], said["prediction"]["_target_"]) == (
        "dit.noise.flow.Flow",
        "dit.noise.prediction.flow",
    )
    assert said["times"]["1" if known is None else str(num_steps)][-1] == 0
    ours = loaded(kept, run, f"step={step}", f"sampler.num_steps={num_steps}")
    own = [] if run == "halved" else [f"sampler.num_steps={num_steps}"]  # an export draws as it can, if not told
    theirs = loaded(tmp_path, "weights", *own)
    assert theirs.step == ours.step == step
    assert (drawn(ours) - drawn(theirs)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("run", "overrides", "message"),
    [
        ("halved", ["sampler.num_steps=4"], "has learned 1 step: take sampler.num_steps=1, or step=4 for 4"),
        ("halved", ["sampler.num_steps=3"], "take sampler.num_steps=1$"),
        ("halved", ["step=8"], "has learned 2 steps: take sampler.num_steps=2, or step=12 for 1"),
        ("halved", ["grid=karras"], "leave grid= out"),
        ("halved", ["sampler=heun"], "the sampler heun does not draw a student of progressive: take sampler=flow_map"),
        ("any", ["guidance.scale=2"], "guidance.scale=2 would guide twice"),
        ("told", ["guidance.scale=4.5"], "guidance=told, and guidance.scale=4"),
        ("told", ["guidance=classifier_free"], "take guidance=told"),
    ],
)
def test_students_are_not_drawn_as_they_have_not_learned_to_be(kept, tmp_path, run, overrides, message):
    """Neither a run, nor its export, which has no other checkpoints to offer."""
    with pytest.raises(ConfigError, match=message) as error:
        loaded(kept, run, *overrides)
    assert error.value.exit_code == 2
    if not any(word.startswith("step=") for word in overrides):
        assert export.main(compose("export", ["run=" + run, f"runs_dir={kept}", f"path={tmp_path}/weights"])) == 0
        with pytest.raises(ConfigError, match=message.split(", or step")[0]):
            loaded(tmp_path, "weights", *overrides)


@pytest.mark.parametrize("what", ["lost", "null", "nested", {"steps": "abc"}, {"steps": []}, {"guidance": None}])
def test_what_an_export_says_of_a_student_is_not_believed_blindly(kept, tmp_path, what):
    assert export.main(compose("export", ["run=any", f"runs_dir={kept}", f"path={tmp_path}/weights"])) == 0
    file = tmp_path / "weights" / "few_step.json"
    said = json.loads(file.read_text())
    if what == "lost":
        file.unlink()
        with pytest.raises(DamagedError, match=r"few_step\.json is missing"):
            loaded(tmp_path, "weights", "sampler.num_steps=1")
    else:
        other = json.dumps(said | what) if isinstance(what, dict) else {"null": "null", "nested": "[" * 100_000}[what]
        file.write_text(other)
    manifest.write(tmp_path / "weights")  # as a stranger may, too
    with pytest.raises(ConfigError, match=r"few_step\.json is missing or damaged, export it again"):
        loaded(tmp_path, "weights", "sampler.num_steps=1")


def test_an_export_calls_only_what_conf_names(kept, tmp_path):
    assert export.main(compose("export", ["run=any", f"runs_dir={kept}", f"path={tmp_path}/weights"])) == 0
    file = tmp_path / "weights" / "config.json"
    about = json.loads(file.read_text())
    for strange in ("os.system", "dit.train.launch.os.system"):
        about["config"]["sampler"] = {"_target_": strange, "command": f"touch {tmp_path}/touched"}
        file.write_text(json.dumps(about))
        with pytest.raises(ConfigError, match=rf"_target_: {strange} is nothing that conf/ names"):
            loaded(tmp_path, "weights")
    assert not (tmp_path / "touched").exists()


def test_a_student_is_previewed_in_the_steps_of_its_stage(student, monkeypatch):
    asked = []
    monkeypatch.setattr(Parts, "subject", lambda self, *_, num_steps, **__: asked.append(num_steps) or Nothing())
    assert train_together([student("progressive", "seen", "trainer.preview_every_steps=3")], 1) == 0
    assert asked == [4, 2, 1, 1]


class Nothing:
    """Draws black."""

    restores = False

    def draw(self, samples):
        return torch.zeros(40, 1, 8, 8, dtype=torch.uint8)


def test_teachers_of_an_export_and_of_published_weights_say_what_the_run_does(student, tmp_path):
    method, runs = "meanflow", Path(student("meanflow", "x").runs_dir)
    assert export.main(compose("export", ["run=teacher", f"runs_dir={runs}", f"path={tmp_path}/weights"])) == 0
    torch.save({"ema": trained.weights_of(trained.newest(runs / "teacher"))}, tmp_path / "published.pt")
    files = ["objective/teacher=published", f"objective.teacher.init.path={tmp_path}/published.pt"]
    said = []
    for chosen in (
        ["objective.teacher.runs_dir=" + str(runs)],
        ["objective/teacher=export", f"objective.teacher.runs_dir={tmp_path}", "objective.teacher.run=weights"],
        files,
    ):
        cfg = student(method, "taught", "objective.teacher.scale=2", *chosen)
        objective = checked(settled(cfg), assumed_layout(cfg.trainer)[0]).objective
        x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 4)
        said.append(objective.teacher.on(Flow())(x, t, label=torch.arange(4)).x0)
        assert objective.few_step().guidance == 2
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    for wrong, message in ((["data.num_classes=11"], "10 classes"), (["model.hidden_size=64"], "do not fit")):
        cfg = student(method, "taught", *files, *wrong)
        with pytest.raises(ValueError, match=rf"objective\.teacher\.init\.path=.*{message}"):
            sound(cfg, assumed_layout(cfg.trainer)[0])


def test_a_student_of_one_that_was_guided_is_not_guided_again(student, kept):
    """And has the guidance of its teacher's teacher; what is told is told once and for all."""
    assert kept
    for teacher, scale, message in [
        ("guided", 3, r"objective\.teacher\.scale=3 would guide twice: guided has guidance of scale 2"),
        ("any", 1, r"objective\.teacher\.run=any is a student of consistency, which knows where its steps end"),
        ("halved", 1, r"objective\.teacher\.run=halved is a student of progressive"),
    ]:
        cfg = student("meanflow", "again", f"objective.teacher.run={teacher}", f"objective.teacher.scale={scale}")
        with pytest.raises(ValueError, match=message):
            sound(cfg, assumed_layout(cfg.trainer)[0])
    for teacher, scale in (("guided", 1.0), ("told", 3.0)):
        cfg = student("meanflow", "again", f"objective.teacher.run={teacher}", f"objective.teacher.scale={scale}")
        objective = checked(settled(cfg), assumed_layout(cfg.trainer)[0]).objective
        assert objective.few_step().guidance == {"guided": 2.0, "told": 3.0}[teacher]


def test_a_student_of_a_teacher_with_a_learned_variance_leaves_it_out(recipe, student):
    """Begun as its equal, on another path."""
    linear = ["noise=linear", "prediction=eps", "model.learn_sigma=true", "objective.bound_weight=1", "sampler=ddim"]
    teacher = recipe("learned", "experiment=digits_teacher", *linear, steps=4)
    cfg = student(
        "consistency",
        "unlearned",
        *("noise=matched", "noise@noise.path=flow", "noise@noise.of=linear", "prediction=matched"),
        *("prediction@prediction.prediction=eps", "objective.teacher.run=learned"),
        f"init.path={teacher.runs_dir}/learned",
        steps=2,
    )
    assert train_together([teacher], 1) == 0
    run = Run(cfg)
    run.prepare()
    denoiser, teacher = run.parts.denoiser(), run.objective.teacher
    denoiser.network.load_state_dict(run.init)
    run._leave()
    assert (teacher.denoiser.network.learn_sigma, denoiser.network.learn_sigma) == (True, False)
    x, told = torch.randn(4, 1, 8, 8), {"label": torch.arange(4)}
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = denoiser.eval()(x, t, **told), teacher.on(denoiser.schedule)(x, t, **told)
    torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-4, atol=1e-5)
    assert train_together([cfg], 1) == 0
