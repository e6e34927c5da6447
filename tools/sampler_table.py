"""Train the digits once, judge samplers by number of steps, print the table: python tools/sampler_table.py.

About an hour on two CPU cores, most of it for the columns of 250 and 1,000 steps; the solvers of second order, which
have converged by 250, are not asked for 1,000. What is already drawn is only read.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from dit.command.compose import config_dir
from dit.train import saved, trained
from dit.train.build import Parts, build

RECIPE = ["noise=cosine", "prediction=v", "trainer.max_steps=10000", "ema.decay=0.999"]
SAMPLERS = {"DDPM": "ddpm", "DDIM": "ddim", "Heun": "heun", "DPM-Solver++ 2M": "dpmpp", "UniPC-2": "unipc"}


FIRST_ORDER = ("DDPM", "DDIM")
PROMISES = (("DDIM", 50), ("DPM-Solver++ 2M", 20))  # as good as DDPM's 1,000


def main() -> None:
    """Train what is not trained yet, draw what is not drawn yet; print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 250, 1000])
    parser.add_argument("--num-images", type=int, default=5000)
    options = parser.parse_args()
    folder = options.runs_dir / "sampler_table"
    command = [sys.executable, "-m", "dit", "train", "experiment=digits", "run=sampler_table", *RECIPE]
    subprocess.run([*command, f"runs_dir={options.runs_dir}"], check=True, stdout=sys.stderr)

    cfg = saved.config(folder)
    data = build(cfg.data)
    train, held_out = data.read("train"), data.read("held_out")
    path = trained.newest(folder)
    known = folder / f"sampler_table-{path.name}-{options.num_images}.json"
    figures = json.loads(known.read_text()) if known.exists() else {}
    for num_steps in options.steps:
        for name, sampler in SAMPLERS.items():
            if f"{name} {num_steps}" in figures or (num_steps > 250 and name not in FIRST_ORDER):
                continue
            cfg.sampler = OmegaConf.load(config_dir() / "sampler" / f"{sampler}.yaml")
            cfg.sampler.num_steps = num_steps
            parts = Parts(cfg)
            subject = parts.subject(trained.load(parts, path), parts.latent(), seed=0, batch_size=500)
            judged = build(cfg.metric)(subject, train, held_out, num_images=options.num_images)
            figures[f"{name} {num_steps}"] = judged
            print(name, num_steps, judged, file=sys.stderr, flush=True)
            known.write_text(json.dumps(figures, indent=1) + "\n")

    for title, key in [("accuracy", "accuracy"), ("Frechet distance", "frechet"), ("diversity", "diversity")]:
        print(f"| {title} | " + " | ".join(f"{n:,} steps" for n in options.steps) + " |")
        print("|---" * (1 + len(options.steps)) + "|")
        for name in SAMPLERS:
            cells = [figures.get(f"{name} {n}") for n in options.steps]
            print(f"| {name} | " + " | ".join(f"{cell[key]:.3f}" if cell else "" for cell in cells) + " |")
        print()
    if reference := figures.get("DDPM 1000"):
        for name, num_steps in PROMISES:
            ratios = {key: figures[f"{name} {num_steps}"][key] / reference[key] for key in ("accuracy", "frechet")}
            print(f"{name} at {num_steps} over DDPM at 1,000:", {key: round(ratio, 3) for key, ratio in ratios.items()})


if __name__ == "__main__":
    main()
