"""dit report: the curves, sample grids and final figures of runs in one file, from their folders alone."""

import base64
import html
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_choices, check_least, check_run_name, user_errors
from dit.command.existing import check_writable
from dit.train import saved
from dit.train.files import steps
from dit.train.judged import alike, drawn_by, evaluations
from dit.train.previews import contents, previews
from dit.weights.card import brief

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERBATIM = ("run", "out")
SUFFIXES = (".html", ".png")
FIRST = {  # the panels that come first, and what their axes say
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "images / s",
    "skipped": "steps left out so far",
    "replaced": "samples replaced so far",
}
LINEAR = ("lr", "images_per_second", "skipped", "replaced")
SPREAD = 10.0  # of the values, from which on an axis is logarithmic
WIDTH, PANEL_HEIGHT, PANELS_A_ROW = 12.0, 2.7, 2  # inches
DASHES = ("-", "--", ":", "-.")  # when the colours are used up
MOST_DIFFERENCES = 60
FINAL = {*saved.PROGRESS, "num_steps"}  # of a summary, what stands side by side however runs were judged
UNKNOWN = "which does not say how it was judged"
UNSAID = ("run", "runs_dir", "data_dir", "_partial_")  # keys that say where things are, or nothing
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { max-width: 100% } .samples { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0 } figcaption { color: #666 } .samples img { image-rendering: pixelated; border: 1px solid #ddd }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
"""


class Panel(NamedTuple):
    """Curves that share their axes."""

    figure: str
    told: str  # how it was judged
    points: list[list[tuple[float, float]]]  # of each run


class Told(NamedTuple):
    """What a run's folder tells."""

    name: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]
    config: dict[str, Any]  # by dotted keys
    pictures: list[tuple[int, bytes]]  # by step
    evaluations: list[dict[str, Any]]  # while training, and by `dit evaluate`
    plot: bytes | None  # of several of these


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration before anything is drawn.

    Raises:
        ConfigError: naming the value and the way out.
    """
    for name in _names(cfg):
        check_run_name(name)
        with user_errors():
            saved.config(Path(cfg.runs_dir) / name)
    check_choices(cfg, {"x": ("step", "images")})
    check_least(cfg, {"num_pictures": 0})
    if Path(str(cfg.out)).suffix not in SUFFIXES:
        raise ConfigError(f"out={cfg.out}: give a name that ends in {' or '.join(SUFFIXES)}")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a file of its own."""
    if "out=" not in suffix:
        out = Path(cfg.out)
        cfg.out = str(out.with_name(f"{out.stem}-{suffix}{out.suffix}"))


def main(cfg: DictConfig) -> int:
    """Draw, write one file, and say where it is; the exit code."""
    out = Path(cfg.out)
    with user_errors():
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ImportError("dit report needs matplotlib: pip install 'ditforge[plot]'") from error
        check_writable(out)
        runs = [_told(Path(cfg.runs_dir) / name, cfg.num_pictures) for name in _names(cfg)]
    if out.suffix == ".png":
        _drawn(runs, cfg.x, pictures=True).savefig(out, dpi=120)
    else:
        out.write_text(_page(runs, cfg.x))
    last = ", ".join(f"{run.name} at step {run.lines[-1]['step']:,}" for run in runs)
    print(f"{out}: {last}")
    return 0


def _names(cfg: DictConfig) -> list[str]:
    """The runs that are asked for; a name may have commas of its own."""
    if not isinstance(cfg.run, str):
        return [str(name) for name in (cfg.run if OmegaConf.is_list(cfg.run) else [cfg.run])]
    whole = any(path.name == cfg.run for path in Path(cfg.runs_dir).glob("*"))  # many may be too long for a path
    return [cfg.run] if whole else list(dict.fromkeys(name.strip() for name in cfg.run.split(",")))


def _told(folder: Path, most: int) -> Told:
    """Read a run's folder.

    Raises:
        ValueError: if it has no lines yet.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in steps(folder / "metrics.jsonl"):  # those of figures have lines of their own
        by_step.setdefault(line["step"], {}).update(line)
    if not by_step:
        raise ValueError(f"run={folder.name} has no lines in {folder / 'metrics.jsonl'} yet: train it first")
    config = OmegaConf.to_container(saved.config(folder))
    paths = list(previews(folder).items())
    chosen = {round((i + 1) * len(paths) / most) - 1 for i in range(most)} if len(paths) > most else range(len(paths))
    pictures = [(step, image) for step, path in (paths[i] for i in sorted(chosen)) if (image := contents(path))]
    plot = folder / "evaluation.png"
    lines = [line for _, line in sorted(by_step.items())]
    return Told(
        folder.name,
        lines,
        saved.summary_of(folder),
        dict(_flat(config)),
        pictures,
        evaluations(folder / "evaluation.jsonl"),
        contents(plot) if plot.exists() else None,
    )


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping by dotted keys."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in UNSAID:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _drawn(runs: Sequence[Told], x: str, pictures: bool) -> "Figure":
    """The curves, a panel a figure, and below them the pictures, a row a run."""
    from matplotlib.figure import Figure

    curves = _panels(runs, x)
    rows = math.ceil(len(curves) / PANELS_A_ROW)
    shown = [run for run in runs if run.pictures] if pictures else []
    columns = max((len(run.pictures) for run in shown), default=1)
    longest = max(len(run.name) for run in runs)
    legend_columns = max(1, min(len(runs), 130 // (longest + 8)))
    heights = [rows * PANEL_HEIGHT + 0.3 * math.ceil(len(runs) / legend_columns)]
    heights += [0.75 + _height(run.pictures, WIDTH / columns) for run in shown]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    panels = parts[0].subplots(rows, PANELS_A_ROW, squeeze=False).flatten()
    for axes, curve in itertools.zip_longest(panels, curves):
        if curve is None:
            axes.axis("off")
        else:
            _curve(axes, runs, curve, x)
    handles, labels = panels[0].get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside upper center", ncols=legend_columns, frameon=False)
    for part, run in zip(parts[1:], shown, strict=True):
        part.suptitle(run.name, x=0.01, ha="left", fontsize=10)
        for axis, picture in itertools.zip_longest(part.subplots(1, columns, squeeze=False)[0], run.pictures):
            axis.axis("off")
            if picture is not None:
                axis.imshow(_pixels(picture[1]), interpolation="nearest")
                axis.set_title(f"step {picture[0]:,}", fontsize=9)
    return figure


def _panels(runs: Sequence[Told], x: str) -> list[Panel]:
    """The curves: a figure of a metric has a panel for each way of judging, or for each run where none is noted."""
    there = {key for run in runs for line in run.lines for key, value in line.items() if _is_number(value)}
    found: dict[tuple[str, str], Panel] = {}
    for name in [name for name in FIRST if name in there] + sorted(there - {*FIRST, "step", "images"}):
        for number, run in enumerate(runs):
            for line in run.lines:
                if x not in line or not _is_number(line.get(name)):
                    continue
                key, told = "", ""
                if name not in FIRST:
                    record = _record(run, line, name)
                    key, told = _way(record["settings"]) if record else (run.name, f"{run.name}, {UNKNOWN}")
                panel = found.setdefault((name, key), Panel(name, told, [[] for _ in runs]))
                panel.points[number].append((line[x], line[name]))
    return list(found.values())


def _curve(axes: Any, runs: Sequence[Told], panel: Panel, x: str) -> None:
    """One figure of all runs over the steps; those without it leave room in the legend all the same."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    colours, name = colormaps["tab10"].colors, panel.figure  # type: ignore[attr-defined]
    values = [value for points in panel.points for _, value in points]
    drawn: list[Any] = []
    for number, (run, points) in enumerate(zip(runs, panel.points, strict=True)):
        dashes: Any = DASHES[number // len(colours) % len(DASHES)]
        if again := drawn.count(points):  # so that one is seen through the other, as of the same learning rates
            dashes = (0, (4, 4 * again))
        drawn.append(points)
        style = {"color": colours[number % len(colours)], "ls": dashes}
        marker = {"marker": "."} if len(points) < 20 else {}
        axes.plot(*zip(*points, strict=True) if points else ([], []), lw=1.1, label=run.name, **style, **marker)
    low, high = min(values, default=0), max(values, default=0)
    if name not in LINEAR and low > 0 and high / low > SPREAD:
        axes.set_yscale("log")
    elif name == "images_per_second":
        axes.set_ylim(bottom=0)
    axes.set(ylabel=FIRST.get(name, name.replace("_", " ")), xlabel=x)
    axes.set_title(textwrap.fill(panel.told, 100), fontsize=7)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def _pixels(data: bytes) -> Any:
    """A picture as an array (H, W, 3)."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _height(pictures: Iterable[tuple[int, bytes]], width: float) -> float:
    """How high the highest of some pictures is, each of a width."""
    sizes = (_pixels(data).shape for _, data in pictures)
    return max(width * height / across for height, across, _ in sizes)


def _page(runs: Sequence[Told], x: str) -> str:
    """The HTML, with all pictures inside."""
    buffer = io.BytesIO()
    _drawn(runs, x, pictures=False).savefig(buffer, format="png", dpi=120)
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>{html.escape(textwrap.shorten(title, 200))}</h1>", _image(buffer.getvalue(), "curves")]
    figures = {key: [run.summary.get(key) for run in runs] for run in runs for key in run.summary if key in FINAL}
    names = [run.name for run in runs]
    parts += _table("Final figures", list(figures.items()), names)
    parts += _evaluated(runs)
    for run in runs:
        known = {*FINAL, *(key for key in run.summary if _record(run, run.summary, key))}
        rows = [(key, [value]) for key, value in run.summary.items() if key not in known]
        parts += _table(f"Final figures of {run.name}, {UNKNOWN}", rows, [run.name])
    keys = dict.fromkeys(key for run in runs for key in run.config)
    settings = {key: [run.config.get(key) for run in runs] for key in keys}
    different = {key: values for key, values in settings.items() if any(value != values[0] for value in values)}
    heading = "What their configurations have otherwise"
    parts += _table(heading, list(different.items())[:MOST_DIFFERENCES], names)
    if (more := len(different) - MOST_DIFFERENCES) > 0:
        parts.append(f"<p>and {more} keys more</p>")
    for run in runs:
        if run.pictures:
            parts.append(f"<h2>Samples of {html.escape(run.name)}</h2><div class=samples>")
            for step, data in run.pictures:
                image = _image(data, f"samples at step {step}")
                parts.append(f"<figure>{image}<figcaption>step {step:,}</figcaption></figure>")
            parts.append("</div>")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return "\n".join([head, *parts, "</html>\n"])


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _gave(record: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether an evaluation, whoever made it, is that of a line of training, or of the summary."""
    return record["settings"]["step"] == line.get("step") and record["figures"].items() <= line.items()


def _record(run: Told, line: Mapping[str, Any], figure: str) -> dict[str, Any] | None:
    """The evaluation that says how a figure of a line, or of the summary, was judged; None if none does."""
    return next((record for record in run.evaluations if figure in record["figures"] and _gave(record, line)), None)


def _evaluated(runs: Sequence[Told]) -> Iterator[str]:
    """Evaluations, a table for each way of judging, as others cannot be compared; and the plots of several.

    Of those that curves have, of a run and judged alike, the last.
    """
    ways: dict[str, dict[Any, tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        lines = {line["step"]: line for line in run.lines}
        for record in run.evaluations:
            rows = ways.setdefault(_way(record["settings"])[0], {})
            there = (lines.get(record["settings"]["step"], {}), run.summary)
            rows[run.name if any(_gave(record, line) for line in there) else len(rows)] = run.name, record
    for named in (list(rows.values()) for rows in ways.values()):
        records = [record for _, record in named]
        first, names = records[0]["settings"], list(records[0]["figures"])
        drawn = [drawn_by(record["settings"]) for record in records]
        varied = [key for key, value in drawn[0].items() if any(one[key] != value for one in drawn)]
        common = [
            f"{key} {_said(value)}" for key, value in drawn[0].items() if key not in varied and value not in (None, "")
        ]
        rows_said = [
            (name, [*map(one.get, varied), *map(record["figures"].get, names)])
            for (name, record), one in zip(named, drawn, strict=True)
        ]
        by = ", ".join(dict.fromkeys(told["name"] for told in first["extractors"].values()))
        heading = f"Evaluated by {by or 'their metrics'}, {first['num_samples']} samples each"
        yield from _table(heading, rows_said, [*varied, *names], "; ".join([_way(first)[1], *common]))
    for run in runs:
        if run.plot:
            yield f"<h2>Evaluations of {html.escape(run.name)}</h2>{_image(run.plot, 'evaluations')}"


def _way(settings: Mapping[str, Any]) -> tuple[str, str]:
    """How an evaluation was judged: a key, the same of all that may be compared, and in words."""
    way = alike(settings)
    by: dict[str, list[str]] = {}
    for name, node in way["metric"].items():
        about = way["extractors"].get(name)
        look = f" by {about['name']} ({about['sha256'][:8]}, resized: {about['resize']})" if about else ""
        options = brief({key: value for key, value in node.get("figure", node).items() if key != "_target_"})
        by.setdefault(look, []).append(f"{name} ({options})" if options else name)
    told = [", ".join(names) + look for look, names in by.items()]
    told += [f"{way['num_samples']} samples", f"labels {way['labels']}", f"{way['precision']}"]
    reference = [f"{name.replace('_', ' ')} {_hashes(value)}" for name, value in way["reference"].items()]
    return json.dumps(way, sort_keys=True), "; ".join([*told, f"reference: {', '.join(reference)}"])


def _hashes(value: Any) -> str:
    """A number, or the beginnings of hashes."""
    return "+".join(part[:8] for part in str(value).split("+"))


def _table(
    heading: str, rows: Sequence[tuple[str, Sequence[Any]]], columns: Sequence[str], common: str = ""
) -> list[str]:
    """A table, below what its rows have in common; nothing without rows."""
    if not rows:
        return []
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    said = f"<p>{html.escape(common)}</p>" if common else ""
    lines = [f"<h2>{html.escape(heading)}</h2>{said}<div class=wide><table><tr><th></th>{head}</tr>"]
    for key, values in rows:
        cells = "".join(f"<td>{html.escape(_said(value))}</td>" for value in values)
        lines.append(f"<tr><td>{html.escape(key)}</td>{cells}</tr>")
    return [*lines, "</table></div>"]


def _said(value: Any) -> str:
    """A value in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
