"""dit encode: from shards of images to shards of latents, or from a run to shards of pairs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_choices, check_least, check_texts, user_errors
from dit.command.existing import check_run, execution, load, offer, weights_asked
from dit.data.index import MANIFEST
from dit.data.parallel import each
from dit.data.store import DataError
from dit.train import saved
from dit.train.kind import check_denoiser

if TYPE_CHECKING:
    from dit.train.encoding import Encoding
    from dit.train.pairs import Pairs

VERBATIM = ("out",)


def configuration(overrides: Sequence[str]) -> str:
    """The file of conf/: a run is made into pairs, data into latents."""
    return "pairs" if any(override.startswith("run=") for override in overrides) else "encode"


def prepare(overrides: Sequence[str] | None) -> None:
    """Make how a run is sampled an option, if one is named."""
    if overrides is None or configuration(overrides) == "pairs":
        offer(overrides)


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_least(cfg, {"batch_size": 1, "processes": 1, "task": 0, "tasks": 1})
    check_texts(cfg, ["out"])
    check_choices(cfg, {"accelerator": ("auto", "cpu", "gpu"), "dtype": ("float32", "float16")})
    if cfg.task >= cfg.tasks:
        raise ConfigError(f"task={cfg.task} must be one of 0..{cfg.tasks - 1}, as tasks={cfg.tasks}")
    if "run" in cfg:
        with user_errors():
            check_denoiser(saved.config(Path(cfg.runs_dir) / cfg.run))
        return check_run(cfg, {"num_images": 1, "samples_per_shard": 1})
    if cfg.data.get("encoded") or cfg.data.get("crop", "centre") != "centre":
        raise ConfigError("encode shards of images, cropped in the centre: data.encoded=false data.crop=centre")


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a folder of its own."""
    cfg.out = f"{cfg.out}-{suffix}"


def main(cfg: DictConfig) -> int:
    """Encode; the exit code."""
    with user_errors():
        import torch

        if cfg.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("accelerator=gpu, but torch sees none: choose accelerator=cpu")
        gpus = 0 if cfg.accelerator == "cpu" else torch.cuda.device_count()
        work = _work(cfg, "cuda" if gpus else "cpu")
    if (work.out / MANIFEST).exists():
        print(f"{work.out} is complete: {work.num_samples:,} samples in {work.num_shards:,} shards")
        return 0
    print(f"dit: {work.num_samples:,} samples in {work.num_shards:,} shards, by {work.by}", flush=True)
    processes = cfg.processes or max(1, gpus)
    if processes == 1:
        _share(work, cfg, 0, 1)
    else:
        resolved = OmegaConf.to_container(cfg, resolve=True)
        context = torch.multiprocessing.spawn(_process, (resolved, processes, gpus), processes, join=False)
        for process in context.processes:
            process.join()
        if code := max(abs(process.exitcode) for process in context.processes):
            return int(code)
    if (found := work.commit()) is None:
        print(f"dit: {work.out} waits for the shards of other tasks")
        return 0
    left_out = found.about.get("left_out", 0)
    print(f"  {'encoded':<12} {sum(shard.samples for shard in found.shards):,} samples in {work.num_shards:,} shards")
    print(f"  {'left out':<12} {left_out:,}" + (f", listed in {work.out}/*.left_out.jsonl" if left_out else ""))
    if "run" in cfg:
        words = f"objective=reflow data=pairs data.path={work.out}; latent=, condition= and other data.* as in that run"
    else:
        flip = f"data.flip={str(cfg.data.flip).lower()}"
        words = f"data=latents data.path={work.out} {flip}; latent= and other data.* as here"
    print(f"  {'train by':<12} {words}")
    return 0


def _process(rank: int, resolved: dict[str, Any], processes: int, gpus: int) -> None:
    """One of several processes, each with a GPU if there are some."""
    cfg = OmegaConf.create(resolved)
    try:
        _share(_work(cfg, f"cuda:{rank % gpus}" if gpus else "cpu"), cfg, rank, processes)
    except DataError as error:
        print(f"dit: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _share(work: "Encoding | Pairs", cfg: DictConfig, rank: int, processes: int) -> None:
    """A process's share of the shards of a task."""
    workers = cfg.tasks * processes
    numbers = range(cfg.task * processes + rank, work.num_shards, workers)
    for _ in each(work.one, numbers, 1, "shards encoded"):
        pass


def _work(cfg: DictConfig, device: str) -> "Encoding | Pairs":
    """What is to be done, checked.

    Raises:
        ValueError: if something does not fit together.
    """
    return _pairs(cfg, device) if "run" in cfg else _encoding(cfg, device)


def _pairs(cfg: DictConfig, device: str) -> "Pairs":
    """Pairs of a run."""
    import torch

    from dit.data.stream import Stream
    from dit.train.build import build
    from dit.train.encoding import space
    from dit.train.pairs import Pairs, in_turn, of_data
    from dit.weights.identity import sha256

    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    run = load(cfg)
    condition, step = run.parts.condition, run.step
    about = {
        "latent": space(run.latent, run.parts.cfg.data.image_size, cfg.dtype),
        "pairs": {
            "run": cfg.run,
            "step": step,
            "weights": weights_asked(cfg),
            "sha256": sha256(run.denoiser.network),
            "told": condition.sizes,
            "scale": run.scale,
            **{name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("sampler", "grid", "guidance")},
            **({} if cfg.precision == "float32" else {"precision": cfg.precision}),  # which those of before do not have
        },
    }
    run = run.arranged(**execution(cfg))
    if set(condition.fields) == {"label"}:
        told = in_turn(condition.sizes["num_classes"])
    else:
        data = build(run.parts.cfg.data, fields=list(condition.fields))
        if not isinstance(data, Stream):
            raise ValueError(f"what run={cfg.run} is told is read of its data by their index: it had no data=shards")
        data.prepare()
        data.check()
        told = of_data(data.shards, condition, cfg.seed)
        about |= {name: value for name, value in data.about.items() if name == "text"}
    return Pairs(
        run.pipeline(),
        told,
        Path(cfg.out),
        about,
        num_images=cfg.num_images,
        samples_per_shard=cfg.samples_per_shard,
        seed=cfg.seed,
        dtype=cfg.dtype,
        batch_size=cfg.batch_size,
        by=f"run={cfg.run} at step {step}",
    )


def _encoding(cfg: DictConfig, device: str) -> "Encoding":
    """What is to be done, checked.

    Raises:
        ValueError: if something does not fit together.
    """
    from dit.condition.label import Label
    from dit.condition.text import Text
    from dit.condition.unconditional import Unconditional
    from dit.data.stream import Stream
    from dit.train.build import build
    from dit.train.encoding import Encoding

    condition = build(cfg.condition)
    if not isinstance(condition, Text | Label | Unconditional):
        raise ValueError("of conditions only captions are encoded: take condition=text, or condition=none")
    text = condition.encoder if isinstance(condition, Text) else None
    data = build(cfg.data, fields=["caption"] if text else [])
    if not isinstance(data, Stream):
        raise ValueError("shards are encoded by their index: take data=shards")
    data.prepare()
    data.check()
    return Encoding(
        data.shards,
        build(cfg.latent).to(device),
        Path(cfg.out),
        image_size=cfg.data.image_size,
        channels=cfg.data.channels,
        text=text,
        flip=cfg.data.flip,
        keep_images=cfg.keep_images,
        dtype=cfg.dtype,
        batch_size=cfg.batch_size,
        num_threads=max(1, cfg.data.num_workers),
        max_bad=cfg.data.max_bad,
    )
