"""`python tools/bench.py sample`: images a second from labels to pixels, beside `DiTPipeline` with the same weights."""

import argparse
import contextlib
import copy
import io
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ema import DEVICE, measured, ratio
from torch import Tensor, nn

from dit.command.compose import compose
from dit.train.build import Parts
from dit.train.execution import arrange
from dit.train.exporting import Exporting

PEER = "DiTPipeline"
AGREE = 3  # levels of 255, by which some pixels may differ


def sample(options: argparse.Namespace) -> None:
    """Measure and print; each way draws the same images from the same noise, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        vae(Path(folder) / "vae")
        cfg = compose("train", _words(options, f"{folder}/vae"))
        parts, weights = Parts(cfg), _weights(cfg)
        pipeline = _peer(cfg, weights, Path(folder) / "stock")
        interval = Parts(compose("train", [*_words(options, f"{folder}/vae"), f"guidance.interval={options.interval}"]))
        noise = torch.randn(options.images, *parts.latent().shape, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(options.images) % 1000

        def theirs() -> Any:
            generator = torch.Generator().manual_seed(0)
            asked = {"guidance_scale": options.scale, "num_inference_steps": options.steps, "output_type": "np"}
            return pipeline(labels.tolist(), generator=generator, **asked).images

        ways: dict[str, Callable[[], Any]] = {PEER: theirs}
        ways["ours, eager"] = _ours(parts, weights, noise, labels, compile=False)
        if options.compile:
            ways["ours, compiled"] = _ours(parts, weights, noise, labels, compile=True)
        name, compile = ("compiled", True) if options.compile else ("eager", False)
        ways[f"ours, {name}, guided within {options.interval}"] = _ours(
            interval, weights, noise, labels, compile=compile
        )
        drawn = {name: work() for name, work in ways.items()}  # warm
        _check_same(*(drawn[name] for name in list(ways)[:2]))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, work in ways.items():
                seconds[name].append(measured(work, 1))
    print(f"{options.images} images in {options.steps} steps, guidance {options.scale:g}; torch {torch.__version__}")
    print(f"\n| | images a second | time over that of {PEER} (least - most) |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {options.images / statistics.median(found):.3f} | {ratio(found, seconds[PEER])} |")
    asked = {key: value for key, value in vars(options).items() if key != "run"}
    print("\n" + json.dumps({"asked": asked, "seconds": seconds}))


def _words(options: argparse.Namespace, vae: str) -> list[str]:
    """A recipe that a stock pipeline takes, on a VAE of a folder."""
    sampled = [f"sampler.num_steps={options.steps}", f"guidance.scale={options.scale}"]
    told = ["model.closed_frequencies=true", "model.learn_sigma=false", "objective.bound_weight=0"]
    recipe = ["experiment=imagenet256_dit_s_2", "data.path=x", "sampler=ddim", "sampler.variance=small", "grid=evenly"]
    return [*recipe, f"latent.name={vae}", *told, *options.overrides, *sampled]


def vae(folder: Path) -> None:
    """A small random VAE of stride 8, which both decode by."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    torch.manual_seed(0)
    made: Any = diffusers.AutoencoderKL(**blocks, **sizes, sample_size=256)
    made.save_pretrained(folder)


def _weights(cfg: Any) -> dict[str, Tensor]:
    """Of a network as it is after some training, where nothing is zero."""
    network = Parts(cfg).denoiser().network
    for p in network.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    return dict(network.state_dict())


def _peer(cfg: Any, weights: dict[str, Tensor], folder: Path) -> Any:
    """What `dit export format=diffusers` makes of it."""
    import diffusers

    about = {"format": "diffusers", "precision": "float32", "weights": "ema", "step": 0, "parameters": 0}
    folder.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        Exporting(folder, copy.deepcopy(cfg), weights, about).write(folder)
    pipeline = diffusers.DiTPipeline.from_pretrained(folder).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ours(
    parts: Parts, weights: dict[str, Tensor], noise: Tensor, labels: Tensor, *, compile: bool
) -> Callable[[], Tensor]:
    denoiser = parts.denoiser().eval()
    denoiser.network.load_state_dict(weights)
    arrange(denoiser.network, compile=compile)
    pipeline = parts.pipeline(denoiser.to(DEVICE), parts.latent().to(DEVICE))
    sigma = parts.schedule(pipeline.times[0]).sigma.float()
    return lambda: pipeline({"label": labels}, len(labels), noise=(noise / sigma).to(DEVICE))


def _check_same(theirs: Any, ours: Tensor) -> None:
    """Both draw the same images."""
    apart = (torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255 - ours.float()).abs()
    assert apart.mean() < 1 and apart.quantile(0.99) <= AGREE, f"{apart.mean():.3g}, at most {apart.max():.3g}"
