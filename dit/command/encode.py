"""dit encode: from shards of images to shards of latents."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dit.command.compose import ConfigError, check_choices, check_least, check_texts, user_errors
from dit.data.index import MANIFEST
from dit.data.parallel import each
from dit.data.store import DataError

if TYPE_CHECKING:
    from dit.train.encoding import Encoding

VERBATIM = ("out",)


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
        encoding = _encoding(cfg, "cuda" if gpus else "cpu")
    total = len(encoding.shards.all)
    if (encoding.out / MANIFEST).exists():
        print(f"{encoding.out} is complete: {encoding.shards.total:,} samples in {total:,} shards")
        return 0
    print(f"dit: {encoding.shards.total:,} samples in {total:,} shards, by {encoding.latent.name}", flush=True)
    processes = cfg.processes or max(1, gpus)
    if processes == 1:
        _encode(encoding, cfg, 0, 1)
    else:
        resolved = OmegaConf.to_container(cfg, resolve=True)
        context = torch.multiprocessing.spawn(_process, (resolved, processes, gpus), processes, join=False)
        for process in context.processes:
            process.join()
        if code := max(abs(process.exitcode) for process in context.processes):
            return int(code)
    if (found := encoding.commit()) is None:
        print(f"dit: {encoding.out} waits for the shards of other tasks")
        return 0
    left_out = found.about.get("left_out", 0)
    print(f"  {'encoded':<12} {sum(shard.samples for shard in found.shards):,} samples in {total:,} shards")
    print(f"  {'left out':<12} {left_out:,}" + (f", listed in {encoding.out}/*.left_out.jsonl" if left_out else ""))
    flip = f"data.flip={str(cfg.data.flip).lower()}"
    print(f"  {'train by':<12} data=latents data.path={encoding.out} {flip}; latent= and other data.* as here")
    return 0


def _process(rank: int, resolved: dict[str, Any], processes: int, gpus: int) -> None:
    """One of several processes, each with a GPU if there are some."""
    cfg = OmegaConf.create(resolved)
    try:
        _encode(_encoding(cfg, f"cuda:{rank % gpus}" if gpus else "cpu"), cfg, rank, processes)
    except DataError as error:
        print(f"dit: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _encode(encoding: "Encoding", cfg: DictConfig, rank: int, processes: int) -> None:
    """A process's share of the shards of a task."""
    workers = cfg.tasks * processes
    numbers = range(cfg.task * processes + rank, len(encoding.shards.all), workers)
    for _ in each(encoding.one, numbers, 1, "shards encoded"):
        pass


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
