"""Train the digits' teacher and its students, and print one table: python tools/fewstep_table.py.

A student is trained from each of three seeds, and a cell is min / median / max of these; of a student that has learned
certain numbers of steps the others are left out. The judge is the classifier of metric=classifier, which no training
has seen; 5,000 samples a cell, of the same noise and labels in all rows. Runs that are already complete are only read.
A few minutes a student and seed on two CPU cores.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from digits_table import trained as train
from omegaconf import OmegaConf
from torch import Tensor

from dit.metric.classifier import Judge
from dit.metric.frechet import frechet_distance
from dit.train import saved, trained
from dit.train.build import Parts, build

TEACHER = "digits_teacher"
STUDENTS = ("progressive", "consistency", "reflow", "meanflow", "continuous_consistency", "shortcut", "dmd")
NUM_PAIRS, PAIRS_STEPS = 20_000, 16  # of the teacher's, for reflow
COLUMNS = ("accuracy", "frechet", "frechet_held_out", "frechet_teacher", "diversity", "trajectory", "nearest")
NOISE_SEED = 4321  # of the samples: no run's


class Row(NamedTuple):
    """A model in a number of steps: its figures, one for each seed."""

    name: str
    figures: list[dict[str, float]]


def main() -> None:
    """Train what is not trained yet; print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", nargs="*", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("overrides", nargs="*", help="for every run, like trainer.log_every_steps=10")
    options = parser.parse_args()
    print("| model and steps | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|", sep="\n")
    for row in table(options):
        cells = [_cell([figures[column] for figures in row.figures if column in figures]) for column in COLUMNS]
        print(f"| {row.name} | " + " | ".join(cells) + " |", flush=True)


def table(options: argparse.Namespace) -> Iterator[Row]:
    """The rows, in order."""
    folder = run_of(TEACHER, [], options)
    draw = drawer(folder, options.num_images)
    data = build(saved.config(folder).data)
    judge = Judge(data.read("train"), data.read("held_out"))
    asked = torch.arange(options.num_images) % judge.num_classes
    ends = draw("heun", 32)
    unrelated, seen_held_out = _distance(ends.flip(0), ends), judge.features(judge.held_out["image"])
    seen_ends = judge.features(ends)

    def figures(images: Tensor) -> dict[str, float]:
        features = judge.features(images)
        return judge.figures(images, asked) | {
            "frechet_held_out": frechet_distance(features, seen_held_out),
            "frechet_teacher": frechet_distance(features, seen_ends),
            "trajectory": _distance(images, ends) / unrelated,
        }

    if "reflow" in options.students:
        pairs_of(options)
    yield Row("held-out digits", [{"frechet": judge.frechet(judge.held_out["image"])}])
    for sampler, num_steps in [*(("euler", n) for n in (1, 2, 4, 8, 32)), ("heun", 32)]:
        yield Row(f"teacher, {sampler} {num_steps}", [figures(draw(sampler, num_steps))])
    for student in options.students:
        folders = [run_of(f"digits_{student}", [f"seed={seed}"], options) for seed in options.seeds]
        for num_steps in (1, 2, 4):
            able = [folder for folder in folders if _learned(folder, num_steps)]
            if able:
                drawn = [drawer(folder, options.num_images)(None, num_steps) for folder in able]
                yield Row(f"{student} {num_steps}", [figures(images) for images in drawn])


def run_of(experiment: str, seed: list[str], options: argparse.Namespace) -> Path:
    """The folder of a run, which is trained first if it is not yet."""
    name = "-".join([experiment, *(word.replace("=", "") for word in seed)])
    train([f"experiment={experiment}", *seed], options, run=name)
    return options.runs_dir / name


def pairs_of(options: argparse.Namespace) -> None:
    """Make what the teacher leads noise to into shards, unless they are there."""
    run, out = f"run={TEACHER}", f"out={options.data_dir}/digits_pairs"
    words = [run, f"runs_dir={options.runs_dir}", out, f"num_images={NUM_PAIRS}", f"sampler.num_steps={PAIRS_STEPS}"]
    subprocess.run([sys.executable, "-m", "dit", "encode", *words], check=True, stdout=subprocess.DEVNULL)


def drawer(folder: Path, num_images: int) -> Callable[[str | None, int], Tensor]:
    """(sampler, None for the run's own, num_steps) -> images of the classes in turn, all from the same noise."""
    cfg = saved.config(folder)

    def draw(sampler: str | None, num_steps: int) -> Tensor:
        path = _learned(folder, num_steps)
        assert path, f"{folder} has not learned {num_steps} steps"
        denoiser = trained.load(Parts(cfg), path)
        target = {"euler": "dit.sampler.ancestral.sample", "heun": "dit.sampler.heun.sample"}
        chosen = {"_target_": target[sampler], "_partial_": True} if sampler else dict(cfg.sampler)
        parts = Parts(OmegaConf.create({**cfg, "sampler": {**chosen, "num_steps": num_steps}}))
        labels = {"label": [i % parts.condition.sizes["num_classes"] for i in range(num_images)]}
        return parts.pipeline(denoiser, parts.latent())(labels, num_images, seed=NOISE_SEED, batch_size=1000)

    return draw


def _learned(folder: Path, num_steps: int) -> Path | None:
    """The newest checkpoint that is drawn in so many steps; None: none is."""
    path = trained.newest(folder)
    few_step = trained.state_of(path).few_step
    if few_step is None or few_step.takes(num_steps):
        return path
    step = trained.student_of(folder, num_steps)
    return None if step is None else trained.newest(folder, step)


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square, of pixels."""
    return (a.float() - b.float()).square().mean().sqrt().item()


def _cell(values: list[float]) -> str:
    """One value, or min / median / max."""
    some = [min(values), statistics.median(values), max(values)] if len(values) > 1 else values
    return " / ".join(f"{value:.3g}" for value in some)


if __name__ == "__main__":
    main()
