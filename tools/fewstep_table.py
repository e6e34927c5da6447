"""Train the digits' teacher and its students, and print a table: python tools/fewstep_table.py [--table ...].

`students` (the default) compares the methods, `derivatives` students by an exact derivative and by differences,
`teachers` consistency students of teachers of other schedules and predictions, each by several routes, `guidance` a
student of a guided teacher. The judge is the classifier of metric=classifier, which no training has seen; 5,000 samples
a row, of the same noise and labels in all rows. It sees what the models say, before that is clipped to pictures, and
for `frechet_8bit` the pictures. A student is trained from each seed, among the methods the teacher, too, and a cell is
min / median / max of these; students of all seeds have one teacher, that of seed 0. Of a student that has learned
certain numbers of steps the others are left out. Runs that are already complete are only read. A few minutes a run on
one CPU core.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits_table import trained as train
from omegaconf import OmegaConf
from torch import Tensor

from dit.metric.classifier import Judge
from dit.metric.frechet import frechet_distance
from dit.metric.moments import Moments
from dit.train import saved, trained
from dit.train.build import Parts, build

TEACHER = "digits_teacher"
TEACHER_SEED = 0
STUDENTS = ("progressive", "consistency", "reflow", "meanflow", "continuous_consistency", "shortcut", "dmd")
DERIVED = ("meanflow", "continuous_consistency")  # those that learn by a derivative
COLUMNS = (
    "accuracy",
    "frechet",
    "frechet_held_out",
    "frechet_teacher",
    "diversity",
    "trajectory",
    "nearest",
    "frechet_8bit",
    "cpu_minutes",
)
STEPS = (1, 2, 4)
SCALE = 2.0  # of --table guidance
NUM_PAIRS, PAIRS_STEPS = 20_000, 16  # of the teacher's, for reflow
NOISE_SEED = 4321  # of the samples: no run's

Draw = Callable[..., Tensor]
Row = tuple[str, list[dict[str, float]]]  # a model in a number of steps; its figures, one for each seed


class Kind(NamedTuple):
    """A teacher of another schedule or prediction, and how to learn of it."""

    noise: str
    prediction: str
    others: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """What makes it of the digits' teacher."""
        return [f"noise={self.noise}", f"prediction={self.prediction}", *self.others]

    def routes(self, name: str) -> dict[str, list[str]]:
        """Overrides of experiment=digits_consistency, by route; each begins with the teacher's weights.

        `own` stays on the teacher's schedule, as LCM does; `matched` is exactly the teacher at first, but on the path
        of flow; `seen` sees there what the teacher would, but is to say a velocity from the first step on.
        """
        of = [f"objective.teacher.run={name}", f"init.path=${{runs_dir}}/{name}"]
        seen = [*of, "noise=matched", "noise@noise.path=flow", f"noise@noise.of={self.noise}"]
        return {
            "own": [*of, f"noise={self.noise}", f"prediction={self.prediction}", "weight=x0"],
            "matched": [*seen, "prediction=matched", f"prediction@prediction.prediction={self.prediction}"],
            "seen": seen,
        }


ROUTES = ("own", "matched", "seen")
TEACHERS = {
    "edm": Kind("edm", "edm"),
    "cosine_v": Kind("cosine", "v"),
    "linear_eps": Kind("linear", "eps"),
    "learned_variance": Kind("linear", "eps", ("model.learn_sigma=true", "objective.bound_weight=1")),
}


class Referee:
    """Judges samples of the classes in turn, and compares them with where a teacher's trajectories end.

    Args:
        judge: sees what is in them.
        ends: what the teacher makes of the same noise in 32 steps.
    """

    def __init__(self, judge: Judge, ends: Tensor):
        self.judge, self.ends = judge, ends
        self.asked = torch.arange(len(ends)) % judge.num_classes
        self.unrelated = _distance(ends.flip(0), ends)
        self.seen_ends, self.seen_held_out = (
            Moments.of(judge.features(images)) for images in (ends, judge.held_out["image"])
        )

    def __call__(self, images: Tensor) -> dict[str, float]:
        """The figures of a row."""
        features = self.judge.features(images)
        return self.judge.figures(images, self.asked) | {
            "frechet_held_out": frechet_distance(Moments.of(features), self.seen_held_out),
            "frechet_teacher": frechet_distance(Moments.of(features), self.seen_ends),
            "frechet_8bit": self.judge.frechet(images.round().clamp(0, 255)),
            "trajectory": _distance(images, self.ends) / self.unrelated,
        }

    def student(self, name: str, folders: list[Path], options: argparse.Namespace) -> Iterator[Row]:
        """The rows of runs that differ in their seed, one for each number of steps that they have learned."""
        for num_steps in STEPS:
            able = [folder for folder in folders if _learned(folder, num_steps)]
            if able:
                drawn = [drawer(folder, options.num_images)(None, num_steps) for folder in able]
                figures = [self(images) | _cost(folder) for images, folder in zip(drawn, able, strict=True)]
                yield f"{name} {num_steps}", figures


def main() -> None:
    """Train what is not trained yet; print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=list(TABLES), default="students")
    parser.add_argument("--students", nargs="*", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--teachers", nargs="*", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--routes", nargs="*", default=ROUTES, choices=ROUTES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("overrides", nargs="*", help="for every run, like trainer.log_every_steps=10")
    options = parser.parse_args()
    print("| model and steps | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|", sep="\n")
    for name, figures in TABLES[options.table](options):
        cells = [_cell([one[column] for one in figures if column in one]) for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def students(options: argparse.Namespace) -> Iterator[Row]:
    """The methods, and teachers in several numbers of steps."""
    folders = [run_of(TEACHER, options), *seeds_of(TEACHER, options, but=TEACHER_SEED)]
    draws = [drawer(folder, options.num_images) for folder in folders]
    judge = judge_of(folders[0])
    referees = [Referee(judge, draw("heun", 32)) for draw in draws]
    yield "held-out digits", [{"frechet": judge.frechet(judge.held_out["image"])}]
    each = list(zip(referees, draws, folders, strict=True))
    for num_steps in (1, 2, 4, 8, 32):
        yield f"teacher, euler {num_steps}", [one(draw("euler", num_steps)) | _cost(path) for one, draw, path in each]
    yield "teacher, heun 32", [one(one.ends) | _cost(path) for one, _, path in each]
    if "reflow" in options.students:
        pairs_of(options)
    for student in options.students:
        yield from referees[0].student(student, seeds_of(f"digits_{student}", options), options)


def derivatives(options: argparse.Namespace) -> Iterator[Row]:
    """Students that learn by a derivative: by differences, as their recipes have it, and by an exact one."""
    folder = run_of(TEACHER, options)
    referee = Referee(judge_of(folder), drawer(folder, options.num_images)("heun", 32))
    yield "teacher, heun 32", [referee(referee.ends) | _cost(folder)]
    for student in [student for student in options.students if student in DERIVED]:
        experiment = f"digits_{student}"
        yield from referee.student(f"{student}, central", seeds_of(experiment, options), options)
        exact = seeds_of(experiment, options, "objective/derivative=jvp", run=f"{experiment}_jvp")
        yield from referee.student(f"{student}, jvp", exact, options)


def teachers(options: argparse.Namespace) -> Iterator[Row]:
    """Teachers of other schedules and predictions, each with its consistency students."""
    for kind in options.teachers:
        name = f"{TEACHER}_{kind}"
        folder = run_of(TEACHER, options, *TEACHERS[kind].overrides, run=name)
        referee = Referee(judge_of(folder), drawer(folder, options.num_images)("heun", 32))
        yield f"{kind}, heun 32", [referee(referee.ends) | _cost(folder)]
        for route in options.routes:
            overrides, run = TEACHERS[kind].routes(name)[route], f"digits_consistency_{kind}_{route}"
            folders = seeds_of("digits_consistency", options, *overrides, run=run)
            yield from referee.student(f"{kind}, {route}", folders, options)


def guidance(options: argparse.Namespace) -> Iterator[Row]:
    """A guided teacher, and a consistency student of it, which needs one evaluation where it needs 126."""
    folder = run_of(TEACHER, options)
    referee = Referee(judge_of(folder), drawer(folder, options.num_images)("heun", 32, scale=SCALE))
    yield "unguided teacher, heun 32", [referee(drawer(folder, options.num_images)("heun", 32))]
    yield f"teacher of scale {SCALE:g}, heun 32", [referee(referee.ends)]
    run = f"digits_consistency_scale_{SCALE:g}"
    folders = seeds_of("digits_consistency", options, f"objective.teacher.scale={SCALE}", run=run)
    yield from referee.student(f"consistency of scale {SCALE:g},", folders, options)


TABLES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "students": students,
    "derivatives": derivatives,
    "teachers": teachers,
    "guidance": guidance,
}


def run_of(experiment: str, options: argparse.Namespace, *overrides: str, run: str | None = None) -> Path:
    """The folder of a run, which is trained first if it is not yet."""
    name = run or experiment
    train([f"experiment={experiment}", *overrides], options, run=name)
    return options.runs_dir / name


def seeds_of(
    experiment: str, options: argparse.Namespace, *overrides: str, run: str | None = None, but: int | None = None
) -> list[Path]:
    """The same, from each seed but one."""
    return [
        run_of(experiment, options, *overrides, f"seed={seed}", run=f"{run or experiment}-seed{seed}")
        for seed in options.seeds
        if seed != but
    ]


def pairs_of(options: argparse.Namespace) -> None:
    """Make what the teacher leads noise to into shards, unless they are there."""
    run, out = f"run={TEACHER}", f"out={options.data_dir}/digits_pairs"
    words = [run, f"runs_dir={options.runs_dir}", out, f"num_images={NUM_PAIRS}", f"sampler.num_steps={PAIRS_STEPS}"]
    subprocess.run([sys.executable, "-m", "dit", "encode", *words], check=True, stdout=subprocess.DEVNULL)


def judge_of(folder: Path) -> Judge:
    """One that has learned of the data of a run."""
    data = build(saved.config(folder).data)
    return Judge(data.read("train"), data.read("held_out"))


def drawer(folder: Path, num_images: int) -> Draw:
    """(sampler, None for the run's own, num_steps) -> images of the classes in turn, of the same noise; not clipped.

    Black is 0 and white 255, as in pictures: an error of either sign stays one, where clipping would leave but a veil.
    """
    cfg: Any = saved.config(folder)

    def draw(sampler: str | None, num_steps: int, scale: float = 1.0) -> Tensor:
        path = _learned(folder, num_steps)
        assert path, f"{folder} has not learned {num_steps} steps"
        denoiser = trained.load(Parts(cfg), path)
        target = {"euler": "dit.sampler.ancestral.sample", "heun": "dit.sampler.heun.sample"}
        chosen: dict[str, Any] = {"_target_": target[sampler], "_partial_": True} if sampler else dict(cfg.sampler)
        asked = {
            **cfg,
            "sampler": {**chosen, "num_steps": num_steps},
            "guidance": {**cfg.guidance, "scale": scale},
        }
        parts = Parts(OmegaConf.create(asked))
        labels = {"label": [i % parts.condition.sizes["num_classes"] for i in range(num_images)]}
        latent = parts.latent()
        drawn = parts.pipeline(denoiser, latent).latents(labels, num_images, seed=NOISE_SEED, batch_size=1000)
        return torch.cat([latent.decode(z).float() * 127.5 + 127.5 for z in drawn])

    return draw


def _learned(folder: Path, num_steps: int) -> Path | None:
    """The newest checkpoint that is drawn in so many steps; None: none is."""
    path = trained.newest(folder)
    few_step = trained.state_of(path).few_step
    if few_step is None or few_step.takes(num_steps):
        return path
    step = trained.student_of(folder, num_steps)
    return None if step is None else trained.newest(folder, step)


def _cost(folder: Path) -> dict[str, float]:
    """What `digits_table.trained` has noted."""
    noted = folder / "cpu_minutes.json"
    return json.loads(noted.read_text()) if noted.exists() else {}


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square, of pixels."""
    return (a.float() - b.float()).square().mean().sqrt().item()


def _cell(values: list[float]) -> str:
    """One value, or min / median / max."""
    some = [min(values), statistics.median(values), max(values)] if len(values) > 1 else values
    return " / ".join(f"{round(value, 4) + 0:.3g}" for value in some)  # no -0


if __name__ == "__main__":
    main()
