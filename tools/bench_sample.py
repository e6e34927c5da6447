"""`python tools/bench.py sample`: images a second from labels to pixels, beside diffusers' `DiTPipeline`.

Both have the same weights and draw the same images from the same noise, which is checked.
"""

import argparse
import contextlib
import copy
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_fixtures import trained, vae
from bench_machine import DEVICE, GPU, measured, ratio
from torch import Tensor, nn

from dit.command.compose import compose
from dit.train.build import Parts
from dit.train.execution import arrange
from dit.train.exporting import Exporting

PEER = "DiTPipeline"
TOLD = ["model.closed_frequencies=true", "model.learn_sigma=false", "objective.bound_weight=0"]
RECIPE = ["experiment=imagenet256_dit_s_2", "data.path=x", *TOLD]
AGREE = 3  # levels of 255, by which some pixels may differ


def sample(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; each way draws the same images from the same noise, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        vae(Path(folder) / "vae")
        cfg = compose("train", _words(options, f"{folder}/vae"))
        parts = Parts(cfg)
        weights = dict(trained(parts.denoiser().network).state_dict())
        interval = Parts(compose("train", [*_words(options, f"{folder}/vae"), f"guidance.interval={options.interval}"]))
        noise = torch.randn(options.images, *parts.latent().shape, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(options.images) % 1000

        ways: dict[str, Callable[[], Any]] = {}
        if options.against:
            pipeline = _peer(cfg, weights, Path(folder) / "stock")
            asked = {"guidance_scale": options.scale, "num_inference_steps": options.steps, "output_type": "np"}
            ways[PEER] = lambda: pipeline(labels.tolist(), generator=torch.Generator().manual_seed(0), **asked).images
        executions = _executions(options.compile).items()
        networks = {name: _network(parts, weights, **execution) for name, execution in executions}
        ways |= {f"ours, {name}": _ours(parts, network, noise, labels) for name, network in networks.items()}
        fastest, network = list(networks.items())[-1]
        ways[f"ours, {fastest}, guided within {options.interval}"] = _ours(interval, network, noise, labels)
        drawn = {name: work() for name, work in ways.items()}  # warm
        if options.against:
            _check_same(drawn[PEER], drawn["ours, eager"])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, work in ways.items():
                seconds[name].append(measured(work, 1))
        print(f"{options.images} images in {options.steps} steps, guidance {options.scale:g}")
        base = next(iter(ways))
        print(f"\n| | images a second | time over that of {base} (least - most) |\n|---|---|---|")
        for name, found in seconds.items():
            print(
                f"| {name} | {options.images / statistics.median(found):.3f} | {ratio(found, seconds[base], '.3f')} |"
            )
        table = _table(options, f"{folder}/vae", network, noise, labels)
    return {"seconds": seconds, "table": table}


def _executions(compile: bool) -> dict[str, dict[str, bool]]:
    """Ways of ours, the fastest last."""
    compiled = {"compiled": {"compile": True}} if compile else {}
    replayed = {"compiled, CUDA graphs": {"compile": True, "cuda_graphs": True}} if compile and GPU else {}
    return {"eager": {}, **compiled, **replayed}


def _table(
    options: argparse.Namespace, vae: str, network: nn.Module, noise: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Rows by sampler, steps and guidance, printed."""
    full = [f"guidance.scale={options.scale}"]
    guided = {"none": [], "full": full, "interval": [*full, f"guidance.interval={options.interval}"]}
    rows = []
    if options.samplers:
        print("\n| sampler | steps | guidance | images a second |\n|---|---|---|---|")
    for sampler, steps, guidance in itertools.product(options.samplers, options.table_steps, guided):
        cfg = compose("train", [*RECIPE, f"latent.name={vae}", *options.overrides, *guided[guidance]])
        plain = compose("train", ["experiment=digits", f"sampler={sampler}", f"sampler.num_steps={steps}"])
        cfg.sampler, cfg.grid = plain.sampler, plain.grid  # the recipe's own are of a learned variance
        work = _ours(Parts(cfg), network, noise, labels)
        work()
        seconds = [measured(work, 1) for _ in range(options.repeats)]
        rate = options.images / statistics.median(seconds)
        print(f"| {sampler} | {steps} | {guidance} | {rate:.3f} |", flush=True)
        rows.append({"sampler": sampler, "steps": steps, "guidance": guidance, "seconds": seconds})
    return rows


def _words(options: argparse.Namespace, vae: str) -> list[str]:
    """A recipe that a stock pipeline takes, on a VAE of a folder."""
    sampled = [f"sampler.num_steps={options.steps}", f"guidance.scale={options.scale}"]
    ddim = ["sampler=ddim", "sampler.variance=small", "grid=evenly"]
    return [*RECIPE, *ddim, f"latent.name={vae}", *options.overrides, *sampled]


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


def _network(parts: Parts, weights: dict[str, Tensor], **execution: Any) -> nn.Module:
    network = parts.denoiser().network
    network.load_state_dict(weights)
    network.to(DEVICE).eval()
    arrange(network, **execution)
    return network


def _ours(parts: Parts, network: nn.Module, noise: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    denoiser = parts.denoiser("meta").eval()
    denoiser.network = network
    pipeline = parts.pipeline(denoiser, parts.latent().to(DEVICE))
    sigma = parts.schedule(pipeline.times[0]).sigma.float()
    return lambda: pipeline({"label": labels}, len(labels), noise=(noise / sigma).to(DEVICE))


def _check_same(theirs: Any, ours: Tensor) -> None:
    """Both draw the same images."""
    apart = (torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255 - ours.float().cpu()).abs()
    assert apart.mean() < 1 and apart.quantile(0.99) <= AGREE, f"{apart.mean():.3g}, at most {apart.max():.3g}"
