"""Complete half-hidden digits, and vary whole ones, with a run's weights: python tools/editing_table.py --run digits.

Prints how often a classifier that was trained on the real training digits recognises the 540 held-out ones: whole, with
the right half hidden, and completed; and how far img2img goes from the picture by its strength. Half a minute.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.data.image import encode_png, grid
from dit.metric.classifier import Classifier, to_float, train_classifier
from dit.sampler.editing import edited
from dit.train import saved, trained
from dit.train.build import Parts, build


def main() -> None:
    """Print the table; write a picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--run", default="digits")
    parser.add_argument("--resample", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--out", type=Path, help="a PNG: digits, hidden halves, completions")
    options = parser.parse_args()
    figures = table(options.runs_dir / options.run, options.resample, options.out)
    print("| | accuracy | pixels kept |\n|---|---|---|")
    for name, (accuracy, kept) in figures["accuracy"].items():
        print(f"| {name} | {accuracy:.3f} | {kept} |")
    print("\n| img2img, strength | distance from the picture | accuracy |\n|---|---|---|")
    for strength, (distance, accuracy) in figures["distance"].items():
        print(f"| {strength} | {distance:.3f} | {accuracy:.3f} |")


def table(folder: Path, resample: list[int], out: Path | None = None) -> dict[str, Any]:
    """The figures of a run's folder."""
    cfg = saved.config(folder)
    parts, data = Parts(cfg), build(cfg.data)
    denoiser, latent = trained.load(parts, trained.newest(folder)), parts.latent()
    train, held_out = data.read("train"), data.read("held_out")
    images, labels = held_out["image"], held_out["label"]
    hide = torch.zeros(images.shape[-2:], dtype=torch.bool)
    hide[:, images.shape[-1] // 2 :] = True
    half = torch.where(hide, 0, images)
    classifier = train_classifier(train["image"], train["label"], cfg.data.num_classes, seed=1)
    of_halves = train_classifier(torch.where(hide, 0, train["image"]), train["label"], cfg.data.num_classes, seed=1)

    def draw(told: bool = True, **options: Any) -> Tensor:
        pipeline = parts.pipeline(denoiser, latent)
        pipeline.sampler = edited(pipeline.sampler, to_float(images), **options)
        if not told:
            pipeline.guidance = lambda denoiser, null: lambda x_t, t, s=None, **cond: denoiser(x_t, t, s, **null(cond))
        return pipeline({"label": labels}, len(images), batch_size=len(images))

    @torch.no_grad()
    def accuracy(drawn: Tensor, classifier: Classifier = classifier) -> float:
        return (classifier(to_float(drawn)).argmax(1) == labels).float().mean().item()

    drawn = {"whole": images, "right half hidden": half}
    for told in (False, True):
        for times in resample:
            name = f"completed, {'told the class' if told else 'told nothing'}, each step {times} x"
            drawn[name] = draw(told, mask=hide, resample=times)
    distance = {}
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        image = draw(strength=strength)
        distance[strength] = ((to_float(image) - to_float(images)).square().mean().sqrt().item(), accuracy(image))
    if out:
        rows = [pictures[:10] for pictures in drawn.values()]
        out.write_bytes(encode_png(grid(torch.cat(rows), 10)))
    kept = {name: bool(torch.equal(x[..., ~hide], images[..., ~hide])) for name, x in drawn.items()}
    accuracies = {name: (accuracy(x), kept[name]) for name, x in drawn.items()}
    accuracies["left half, by a classifier of left halves"] = accuracy(half, of_halves), True
    return {"accuracy": accuracies, "distance": distance}


if __name__ == "__main__":
    main()
