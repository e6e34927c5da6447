"""A plot of evaluations over guidance or steps."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dit.train.judged import run_names

CLOSE = 0.08  # of an axis: numbers this near to each other stand upright


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each figure, over the scale of guidance where it varies, or else over steps; a line for each other.

    Args:
        records: with `figures` and `settings`, as `dit evaluate` writes them.
        path: of the PNG.

    Raises:
        ImportError: if matplotlib is missing, an optional dependency.
    """
    from matplotlib.figure import Figure

    by_scale = len({record["settings"]["guidance"].get("scale", 1) for record in records}) > 1
    runs = run_names(records)
    asked = sorted({record["settings"]["sampler"]["num_steps"] for record in records})
    crowded = any(b / a < (asked[-1] / asked[0]) ** CLOSE for a, b in pairwise(asked))
    names = list(records[0]["figures"])
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for run, record in zip(runs, records, strict=True):
            settings = record["settings"]
            scale, num_steps = settings["guidance"].get("scale", 1), settings["sampler"]["num_steps"]
            label = f"{num_steps} steps" if by_scale else f"guidance {scale:g}"
            label = f"{run}, {label}" if len(set(runs)) > 1 else label
            lines.setdefault(label, []).append((scale if by_scale else num_steps, record["figures"][name]))
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(xlabel="scale of guidance" if by_scale else "steps of the sampler", ylabel=name.replace("_", " "))
        axis.grid(alpha=0.3)
        if not by_scale:
            axis.set_xscale("log")
            upright = {"rotation": 90, "fontsize": 8} if crowded else {}
            axis.set_xticks(asked, [f"{number}" for number in asked], **upright)
            axis.set_xticks([], minor=True)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    axes.flat[0].legend(fontsize=8)
    first = records[0]["settings"]
    told = f"{', '.join(dict.fromkeys(runs))}: {first['num_samples']:,} samples, weights={first['weights']}"
    figure.suptitle(told, fontsize=10)
    figure.savefig(path, dpi=120)
