"""Evaluations as runs keep them: figures, all that moves them, and which of them may stand side by side."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.train.files import append, replace
from dit.weights.card import brief

if TYPE_CHECKING:  # who reads them does so without torch
    from dit.train.judging import Judging

# Figures stand in one table, and in one panel, only where all of these agree.
ALIKE = ("metric", "extractors", "reference", "image_size", "num_samples", "labels", "precision")
VARIED = ("run", "weights", "sampler", "grid", "guidance", "seed", "batch_size")
KINDS: dict[str, Any] = {  # of all that `settings` gives
    **dict.fromkeys(("run", "labels", "precision", "device"), str),
    **dict.fromkeys(("weights", "sha256"), str | None),
    **dict.fromkeys(("seed", "batch_size", "step", "num_samples", "image_size"), int),
    **dict.fromkeys(("metric", "extractors", "reference"), dict),
    **dict.fromkeys(("sampler", "grid", "guidance"), dict | None),
}
TRAINING = {"by": "train"}  # what a line of training has besides, which is rewound with the run


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
        asked: with run, weights, sampler, grid, guidance, metric, num_samples, labels, seed, batch_size and precision;
            and compile, where that is true.
        judging: the metrics.
        step: of the weights.
        sha256: of the weights; None while training where devices have but shares of them, which are not gathered for
            it: run, step and weights then say which they are.
        device: where samples are drawn, `cpu` or `cuda`.
    """
    varied = {name: asked[name] for name in VARIED} | {"run": str(asked["run"])}
    varied["batch_size"] = min(asked["batch_size"], asked["num_samples"])
    found = {**varied, **way(asked, judging), "step": step, "sha256": sha256, "device": device}
    return found | ({"compile": True} if asked.get("compile") else {})  # which lines of before do not have


def evaluations(path: Path) -> list[dict[str, Any]]:
    """Those in a file, by training and by `dit evaluate`; a warning names the lines that are none."""
    records = [record for _, record in _lines(path)]
    if wrong := [str(number) for number, record in enumerate(records, 1) if record is None]:
        which = f"line{'s' if len(wrong) > 1 else ''} {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}"
        _warn(f"{path}: {which}: no evaluation that this version can read, and left out")
    return [record for record in records if record]


def is_evaluation(record: Any) -> bool:
    """Whether what was read has figures by name, and all settings, each of its kind."""
    if not (isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in ("figures", "settings"))):
        return False
    figures, settings = record["figures"], record["settings"]
    return (
        bool(figures)
        and all(_is(value, int | float) for value in figures.values())
        and all(name in settings and _is(settings[name], kind) for name, kind in KINDS.items())
        and isinstance(settings.get("compile", False), bool)
        and all(_is_node(settings[name] or {}) for name in ("sampler", "grid", "guidance"))
        and all(_is_node(node) and _is_node(node.get("figure", node)) for node in settings["metric"].values())
        and all(
            _is(about, dict) and all(_is(about.get(key), str) for key in ("name", "sha256", "resize"))
            for about in settings["extractors"].values()
        )
    )


def note(path: Path, figures: dict[str, float], settings: Mapping[str, Any]) -> dict[str, float]:
    """Append what training has judged, unless an equal evaluation stands there.

    Args:
        path: the evaluation.jsonl of the run.
        figures: by name.
        settings: all that moves them.

    Returns:
        The figures that stand there.
    """
    for _, record in _lines(path):
        if record and record["settings"] == settings:
            return dict(record["figures"])
    append(path, {**TRAINING, "figures": figures, "settings": settings})
    return figures


def rewind(path: Path, step: int) -> None:
    """Drop what training has judged after a step, and will judge again.

    All else stays: lines of `dit evaluate`, as they are of checkpoints that were there, and what cannot be read.
    """
    lines = list(_lines(path))
    kept = [
        text
        for text, record in lines
        if not (record and record.items() >= TRAINING.items() and record["settings"]["step"] > step)
    ]
    if len(kept) < len(lines):
        replace(path, b"".join(kept))


def drawn_by(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the samples of an evaluation were drawn, by the columns of a table; None where there is nothing to say."""
    sampler, guidance = dict(settings["sampler"] or {}), dict(settings["guidance"] or {})
    told = {"weights": settings["weights"], "step": settings["step"], "guidance": guidance.pop("scale", None)}
    told |= {"steps": sampler.pop("num_steps", None), "sampler": brief(sampler)}
    told |= {"grid": brief(settings["grid"]), "guided by": brief(guidance)}
    told |= {key.replace("_", " "): settings[key] for key in ("seed", "batch_size", "device")}
    return told | {"compile": settings.get("compile")}


def run_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs of evaluations, as tables and plots call them: one of a name that is taken, like an export, `a (2)`."""
    sources: dict[str, list[Mapping[str, Any]]] = {}
    told = []
    for settings in (record["settings"] for record in records):
        for number in count(1):
            name = settings["run"] if number == 1 else f"{settings['run']} ({number})"
            source = sources.setdefault(name, [])
            if not source or (settings not in source and _unvaried(settings) == _unvaried(source[0])):
                break
        source.append(settings)
        told.append(name)
    return told


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file, none if there is none: as it stands, and what it says; None if that is no evaluation."""
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        record = None
        with suppress(ValueError, RecursionError):  # half a line, or nothing of ours
            record = json.loads(text)
        yield text, record if is_evaluation(record) else None


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_node(node: Any) -> bool:
    """Whether it is one of a configuration, which cards and reports can say in words."""
    return (
        isinstance(node, dict)
        and "." in str(node.get("_target_", "."))
        and _is(node.get("eta", 0), int | float)
        and all(_is_node(child) for child in node.values() if isinstance(child, dict))
    )


@cache
def _warn(text: str) -> None:
    """Say it, but once, however often it is read."""
    print(f"dit: WARNING: {text}", flush=True)


def _unvaried(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all evaluations of one run in a table have in common."""
    varied = {"guidance": "scale", "sampler": "num_steps"}
    nodes = {group: {**(settings[group] or {}), name: None} for group, name in varied.items()}
    return {**settings, **nodes}
