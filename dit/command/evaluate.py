"""dit evaluate: the figures of a run's weights, or the statistics of data by which runs are judged."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from dit.command.compose import (
    ConfigError,
    check_choices,
    check_least,
    check_texts,
    compose,
    exit_code_of,
    user_errors,
)
from dit.command.existing import check_run, check_writable, chosen, execution, load, offer, weights_asked
from dit.command.plot import plot
from dit.train import judged, saved

if TYPE_CHECKING:
    from dit.train.judging import Judging
    from dit.train.loaded import Loaded
    from dit.train.world import World

FILES = {"reference": ".npz", "samples": ".npz", "out": ".jsonl"}
VERBATIM = tuple(FILES)
DRAWN = (*judged.VARIED, "step", "sha256", "labels", "precision", "device", "compile")  # what moves samples


def configuration(overrides: Sequence[str]) -> str:
    """The file of conf/: a run is judged, or a reference is made."""
    makes = any(o.startswith("reference=") for o in overrides) and not any(o.startswith("run=") for o in overrides)
    return "reference" if makes else "evaluate"


def prepare(overrides: Sequence[str] | None) -> None:
    """Make what the run had an option, if one is judged."""
    if overrides is None or configuration(overrides) == "evaluate":
        offer(overrides)


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_least(cfg, {"processes": 1})
    check_choices(cfg, {"accelerator": ("auto", "cpu", "gpu")})
    for key, suffix in FILES.items():
        if cfg.get(key) is not None:
            check_texts(cfg, [key])
            if Path(cfg[key]).suffix != suffix:
                raise ConfigError(f"{key}={cfg[key]}: the file is a {suffix}; give a name that ends so")
    if "run" not in cfg:
        check_least(cfg, {"num_images": 0})
        check_choices(cfg, {"split": ("train", "held_out"), "overwrite": (True, False)})
        if Path(cfg.reference).exists() and not cfg.overwrite:
            raise ConfigError(f"reference={cfg.reference} exists: take another name, or overwrite=true")
        return
    check_run(cfg, {"num_samples": 20})
    check_choices(cfg, {"labels": ("in_turn", "random")})
    check_choices(cfg, {"keep_samples": (True, False)})
    if not cfg.metric:
        raise ConfigError(f"there is no metric for run={cfg.run}: choose one, like metric=fid or metric=likelihood")
    for key, least in {"scales": 0.0, "steps": 1}.items():
        values = _several(cfg[key])
        for value in values:
            check_least(OmegaConf.create({key: value}), {key: least})
        group, name = ("guidance", "scale") if key == "scales" else ("sampler", "num_steps")
        if values and name not in (cfg[group] or {}):
            raise ConfigError(f"{key}={cfg[key]}: run={cfg.run} has no {group}.{name} to vary; leave {key} out")
    there = {_folder(cfg, cfg.run).resolve()}
    for other in _several(cfg.against):
        with user_errors():
            saved.config(_folder(cfg, other))
        if (folder := _folder(cfg, other).resolve()) in there:
            raise ConfigError(f"against={cfg.against}: run={other} is in the table already; name each run once")
        there.add(folder)
    if cfg.samples is not None and Path(cfg.samples).exists():
        raise ConfigError(f"samples={cfg.samples} exists: take another name, or delete it")
    if cfg.samples is not None and (_several(cfg.scales) or _several(cfg.steps) or _several(cfg.against)):
        raise ConfigError(f"samples={cfg.samples} takes those of one evaluation: leave scales, steps and against out")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a file of its own."""
    if "run" in cfg and cfg.out is None:
        cfg.out = str(Path(cfg.runs_dir) / cfg.run / f"evaluation-{suffix}.jsonl")


def main(cfg: DictConfig) -> int:
    """Judge, print the figures, and write them with what they depend on; the exit code."""
    with user_errors():
        import torch

        from dit.train.world import World

        if cfg.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("accelerator=gpu, but torch sees none: choose accelerator=cpu")
        gpus = 0 if cfg.accelerator == "cpu" else torch.cuda.device_count()
        number = 1 if World().launched else cfg.processes or max(1, gpus)
        jobs = [cfg, *_others(cfg)]
    if number > 1:
        from dit.train.launch import launch

        return launch(one_of_several, jobs, number)
    return work(jobs)


def one_of_several(jobs: list[DictConfig]) -> int:
    """As one of the processes that `main` launched; the exit code."""
    return exit_code_of(lambda: work(jobs))


def work(jobs: list[DictConfig]) -> int:
    """What there is to do, in this process; the exit code."""
    with user_errors():
        import torch

        from dit.train.world import World

        world = World()
        kind = "cuda" if jobs[0].accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        if world.size > 1:
            world.join(kind)
    try:
        if "run" not in jobs[0]:
            _make_reference(jobs[0], world, kind)
            return 0
        judges = [(cfg, _judging(cfg, world, kind)) for cfg in jobs]
        with user_errors():  # before anything is drawn
            check_alike([{"run": cfg.run, **judged.way(_asked(cfg), judging)} for cfg, judging in judges])
        records = [record for cfg, judging in judges for record in _records(cfg, judging, world)]
        if world.is_first:
            _say(jobs, records)
        return 0
    finally:
        world.leave()


def _several(value: Any) -> list[Any]:
    """The values of a key that may have one, several, or none."""
    return [] if value is None else list(value) if isinstance(value, ListConfig | list) else [value]


def _others(cfg: DictConfig) -> list[DictConfig]:
    """The evaluations of what a run is compared with, as each was configured."""
    if "run" not in cfg or not (names := _several(cfg.against)):
        return []
    from hydra.core.hydra_config import HydraConfig

    asked = [word for word in HydraConfig.get().overrides.task if not word.startswith(("run=", "against="))]
    found = []
    for name in names:
        folder = _folder(cfg, name)
        words = [word for word in asked if not word.startswith("runs_dir=")]
        words += [f"run={folder.name}", f"runs_dir={folder.parent}"]
        offer(words)
        found.append(compose("evaluate", words))
        check(found[-1])
    return found


def _folder(cfg: DictConfig, name: Any) -> Path:
    """That of a run or export to compare with: a name below runs_dir, or a path."""
    return Path(str(name)) if "/" in str(name) else Path(cfg.runs_dir) / str(name)


def _varied(cfg: DictConfig) -> Iterator[DictConfig]:
    """An evaluation for each scale of guidance and number of steps."""
    for scale in dict.fromkeys(_several(cfg.scales) or [None]):
        for num_steps in dict.fromkeys(_several(cfg.steps) or [None]):
            job = cfg.copy()
            if scale is not None:
                job.guidance.scale = scale
            if num_steps is not None:
                job.sampler.num_steps = num_steps
            yield job


def _out(cfg: DictConfig) -> Path:
    """Where the evaluations of a run are written."""
    return Path(cfg.out) if cfg.out else Path(cfg.runs_dir) / str(cfg.run) / "evaluation.jsonl"


def _judging(cfg: DictConfig, world: "World", kind: str) -> "Judging":
    """The metrics of all evaluations of a run, which look at its reference once."""
    from dit.train.build import build
    from dit.train.judging import Judging, check_metrics

    with user_errors():
        trained = saved.config(Path(cfg.runs_dir) / str(cfg.run))
        data = build(trained.data)
        data.check()
        data.check_images()
        world.once(data.prepare)
        check_metrics(cfg.metric, trained.data.get("fields", ["label"]), trained.latent)
        if world.is_first:
            check_writable(_out(cfg))
            if cfg.samples is not None:
                check_writable(Path(cfg.samples), "samples")
        judging = Judging(
            cfg.metric,
            data,
            world=world,
            device=world.device(kind),
            cache=Path(cfg.runs_dir) / "references",
            reference=cfg.reference,
            rank=world.rank,
            size=world.size,
        )
        for key in ("reference", "samples"):
            if cfg[key] is not None and not judging.extractors:
                raise ValueError(
                    f"{key}={cfg[key]} is for metrics that look at samples, like fid: choose one of them, too"
                )
        return judging


def _records(cfg: DictConfig, judging: "Judging", world: "World") -> Iterator[dict[str, Any]]:
    """All evaluations of a run, whose weights are loaded once."""
    from dit.weights.identity import sha256

    first, *others = _varied(cfg)
    with user_errors():
        run = load(first)
        digest = sha256(run.denoiser)
        run = run.arranged(**execution(first))
    yield _record(first, run, digest, judging, world)
    for job in others:
        with user_errors():
            run = run.otherwise(chosen(job))
        yield _record(job, run, digest, judging, world)


def _record(cfg: DictConfig, run: "Loaded", digest: str, judging: "Judging", world: "World") -> dict[str, Any]:
    """The figures of one evaluation, and all that they depend on; those of before, if they are there."""
    from dit.train.files import append
    from dit.train.samples import Kept

    with user_errors():
        out = _out(cfg)
        subject = run.parts.subject(
            run.denoiser, run.latent, seed=cfg.seed, batch_size=cfg.batch_size, within=run.narrowed
        )
        judging.check(subject, [cfg.num_samples])
        settings = judged.settings(_asked(cfg), judging, step=run.step, sha256=digest, device=run.device.type)
        known = world.once(lambda: next((r for r in judged.evaluations(out) if r["settings"] == settings), None))
        if known and cfg.samples is None:
            return known
        key = hashlib.sha256(_text({name: settings[name] for name in DRAWN if name in settings})).hexdigest()[:16]
        shape = (settings["batch_size"], *judging.image_shape)
        kept = Kept(out.parent / "evaluation" / key, world, shape) if judging.extractors else None
    world.say(f"dit: judging {cfg.num_samples:,} samples of run={cfg.run} at step {run.step}{_told(cfg)}")
    with user_errors():
        how: dict[str, Any] = {"seed": cfg.seed, "labels": cfg.labels, **({"drawn": kept} if kept else {})}
        figures = judging(subject, cfg.num_samples, cfg.batch_size, **how)
    record = known or {"figures": figures, "settings": settings}
    if world.is_first:
        if kept and cfg.samples is not None:  # by figures of all processes, which have drawn theirs
            kept.write(Path(cfg.samples), cfg.num_samples)
        if not known:
            append(out, record)
        if kept:
            if cfg.keep_samples:
                kept.stay()
            kept.drop()
    return record


def _asked(cfg: DictConfig) -> dict[str, Any]:
    """What is asked for, resolved."""
    asked: Any = OmegaConf.to_container(cfg, resolve=True)
    return {**asked, "weights": weights_asked(cfg)}


def _told(cfg: DictConfig) -> str:
    """What is varied, in words."""
    scale = f", guidance {cfg.guidance.scale:g}" if _several(cfg.scales) else ""
    return scale + (f", {cfg.sampler.num_steps} steps" if _several(cfg.steps) else "")


def check_alike(several: Sequence[Mapping[str, Any]]) -> None:
    """See whether figures may stand in one table.

    Args:
        several: settings of evaluations: `run`, and those of `judged.ALIKE`.

    Raises:
        ValueError: if they are not judged alike, naming what differs.
    """
    for other in several[1:]:
        for name in judged.ALIKE:
            ours, theirs = several[0][name], other[name]
            if ours != theirs:
                raise ValueError(
                    f"run={several[0]['run']} and run={other['run']} are not judged alike, so that their figures "
                    f"cannot be compared: {name} is {_short(ours)} and {_short(theirs)}"
                )


def _say(jobs: Sequence[DictConfig], records: Sequence[Mapping[str, Any]]) -> None:
    """Print one evaluation, or several as a table, with a plot of what was varied."""
    cfg, out = jobs[0], _out(jobs[0])
    if len(records) == 1:
        for name, value in records[0]["figures"].items():
            print(f"  {name:<28} {value:.4g}")
    else:
        columns = list(records[0]["figures"])
        print("| run | guidance | steps | " + " | ".join(columns) + " |")
        print("|---" * (3 + len(columns)) + "|")
        for name, record in zip(judged.run_names(records), records, strict=True):
            settings = record["settings"]
            scale, num_steps = (
                (settings["guidance"] or {}).get("scale", 1),
                (settings["sampler"] or {}).get("num_steps", ""),
            )
            cells = " | ".join(f"{record['figures'][column]:.4g}" for column in columns)
            print(f"| {name} | {scale} | {num_steps} | {cells} |")
        if len(_several(cfg.scales)) > 1 or len(_several(cfg.steps)) > 1:
            try:
                plot(records, out.with_suffix(".png"))
                print(f"  {'plot':<28} {out.with_suffix('.png')}")
            except ImportError:
                print("dit: for a plot, too: pip install 'ditforge[plot]', and the same command again")
    print(f"  {'written to':<28} {', '.join(str(_out(job)) for job in jobs)}")


def _make_reference(cfg: DictConfig, world: "World", kind: str) -> None:
    """Statistics of data, by all processes, and the first images."""
    from dit.train.build import build
    from dit.train.look import Look
    from dit.train.reference import make_reference

    path = Path(cfg.reference)
    with user_errors():
        if world.is_first:
            check_writable(path)
        data = build(cfg.data)
        data.check()
        world.once(data.prepare)
        if not data.has_images(cfg.split):
            raise ValueError(f"the {cfg.split} shards have no images: give shards of images as data.path")
        look = Look(build(cfg.extractor)(), world.device(kind))
        total = make_reference(path, data, cfg.split, look, world, num_images=cfg.num_images)
    world.say(f"  {'statistics of':<28} {total:,} images, by {look.about['name']}")
    world.say(f"  {'written to':<28} {path}, {path}.json")


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 120 else text[:117] + "..."
