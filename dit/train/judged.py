"""Evaluations as runs keep them: figures, all that moves them, and which of them may stand side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.train.files import append, replace
from dit.train.sender import evaluations

if TYPE_CHECKING:  # who reads them does so without torch
    from dit.train.judging import Judging

# Figures stand in one table, and in one panel, only where all of these agree.
ALIKE = ("metric", "extractors", "reference", "image_size", "num_samples", "labels", "precision")
VARIED = ("run", "weights", "sampler", "grid", "guidance", "seed", "batch_size")


def alike(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How an evaluation was judged: what it must have in common with those it is compared with."""
    return {name: settings.get(name) for name in ALIKE}


def way(asked: Mapping[str, Any], judging: "Judging") -> dict[str, Any]:
    """The same of an evaluation that is only asked for, before there are weights."""
    about = {"extractors": judging.extractors, "reference": judging.about_reference}
    return alike({**asked, **about, "image_size": judging.data.decoder.image_size})


def settings(
    asked: Mapping[str, Any], judging: "Judging", *, step: int, sha256: str | None, device: str
) -> dict[str, Any]:
    """All that moves the figures of an evaluation, by `dit evaluate` or while training.

    Args:
        asked: with run, weights, sampler, grid, guidance, metric, num_samples, labels, seed, batch_size and precision.
        judging: the metrics.
        step: of the weights.
        sha256: of the weights; None while training where devices have but shares of them, which are not gathered for
            it: run, step and weights then say which they are.
        device: where samples are drawn, `cpu` or `cuda`.
    """
    varied = {name: asked[name] for name in VARIED} | {"batch_size": min(asked["batch_size"], asked["num_samples"])}
    return {**varied, **way(asked, judging), "step": step, "sha256": sha256, "device": device}


def note(path: Path, step: int, figures: Mapping[str, float], settings: Mapping[str, Any]) -> None:
    """Append what training has judged, unless it stands there; the line names its step, as none of `dit evaluate` does.

    Args:
        path: the evaluation.jsonl of the run.
        step: of the run.
        figures: by name.
        settings: all that moves them.
    """
    if not any(record["settings"] == settings for record in evaluations(path)):
        append(path, {"step": step, "figures": figures, "settings": settings})


def rewind(path: Path, step: int) -> None:
    """Drop what training has judged after a step, and will judge again.

    Lines of `dit evaluate` stay, as they are of checkpoints that were there.
    """
    records = evaluations(path)
    kept = [record for record in records if record.get("step", 0) <= step]
    if len(kept) < len(records):
        replace(path, "".join(json.dumps(record) + "\n" for record in kept))
