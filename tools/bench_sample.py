"""`python tools/bench.py sample`: images a second from labels to pixels, beside diffusers' `DiTPipeline`.

Both have the same weights and draw the same images from the same noise, which is checked, each in a process of its own.
"""

import argparse
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_apart import Apart
from bench_fixtures import trained, vae
from bench_machine import DEVICE, GPU, autocast, measured, ratio
from torch import Tensor

from dit.command.compose import compose
from dit.train.build import Parts
from dit.train.execution import arrange
from dit.train.exporting import Exporting

PEER = "DiTPipeline"
TOLD = ["model.closed_frequencies=true", "model.learn_sigma=false", "objective.bound_weight=0"]
RECIPE = ["experiment=imagenet256_dit_s_2", "data.path=x", *TOLD]
AGREE = 3  # levels of 255, by which some pixels may differ


class Ours:
    """Our network, and what it draws by one configuration or another.

    Args:
        words: of the configuration that it is trained by.
        images: drawn at once.
        execution: of `arrange`.
        precision: as of `dit sample`.
    """

    def __init__(self, words: list[str], images: int, execution: dict[str, Any], precision: str):
        parts = Parts(compose("train", words))
        self.network = trained(parts.denoiser().network).to(DEVICE).eval()
        narrow = precision == "bfloat16"
        arrange(self.network, **execution, frozen=True, narrow=narrow)  # as of dit.load
        self.within = partial(autocast, narrow)
        self.noise = torch.randn(images, *parts.latent().shape, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(images) % 1000
        self._works: dict[tuple[str, ...], Callable[[], Tensor]] = {}

    def draw(self, words: list[str], plain: Sequence[str] = ()) -> Tensor:
        """The images.

        Args:
            words: of the configuration.
            plain: of experiment=digits, whose sampler and grid are taken instead of these.
        """
        return self._work(words, plain)().cpu()

    def seconds(self, words: list[str], plain: Sequence[str] = ()) -> float:
        """What drawing takes."""
        return measured(self._work(words, plain), 1)

    def _work(self, words: list[str], plain: Sequence[str]) -> Callable[[], Tensor]:
        known = self._works.get((*words, *plain))
        if known is None:
            cfg = compose("train", words)
            if plain:
                other = compose("train", ["experiment=digits", *plain])
                cfg.sampler, cfg.grid = other.sampler, other.grid
            known = self._works[(*words, *plain)] = self._pipeline(Parts(cfg))
        return known

    def _pipeline(self, parts: Parts) -> Callable[[], Tensor]:
        denoiser = parts.denoiser("meta").eval()
        denoiser.network = self.network
        pipeline = parts.pipeline(denoiser, parts.latent().to(DEVICE), within=self.within)
        sigma = parts.schedule(pipeline.times[0]).sigma.float()
        noise = (self.noise / sigma).to(DEVICE)
        return lambda: pipeline({"label": self.labels}, len(self.labels), noise=noise)


class Peer:
    """The pipeline of a folder, and what it draws."""

    def __init__(self, folder: Path, images: int, scale: float, steps: int, precision: str):
        import diffusers

        loaded: Any = diffusers.DiTPipeline.from_pretrained(folder, torch_dtype=getattr(torch, precision))
        self.pipeline = loaded.to(DEVICE)
        self.pipeline.set_progress_bar_config(disable=True)
        self.labels = [label % 1000 for label in range(images)]
        self.asked = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "np"}

    def draw(self) -> Tensor:
        """The images."""
        return torch.from_numpy(self._drawn()).permute(0, 3, 1, 2) * 255

    def seconds(self) -> float:
        """What drawing takes."""
        return measured(self._drawn, 1)

    def _drawn(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return self.pipeline(self.labels, generator=generator, **self.asked).images


class Row(NamedTuple):
    """Of the table: what draws, in a process of its own, and how."""

    drawn: Apart
    asked: tuple[Any, ...] = ()

    def call(self, method: str) -> Any:
        """What this method returns."""
        return self.drawn.call(method, *self.asked)


def sample(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; each row draws the same images from the same noise, in turn."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:

        def apart(*made: Any) -> Apart:
            return processes.enter_context(Apart(*made))

        vae(Path(folder) / "vae")
        full = _words(options, f"{folder}/vae")
        within = [*full, f"guidance.interval={options.interval}"]
        for words in (full, within):
            Parts(compose("train", words))  # what does not fit fails here
        peers = _peers(options.precision) if options.against else {}
        if peers:
            _export(full, Path(folder) / "stock")
        asked = Path(folder) / "stock", options.images, options.scale, options.steps
        rows = {name: Row(apart(Peer, *asked, precision)) for name, precision in peers.items()}
        executions = _executions(options.compile)
        ours = {name: apart(Ours, full, options.images, how, options.precision) for name, how in executions.items()}
        rows |= {f"ours, {name}": Row(drawn, (full,)) for name, drawn in ours.items()}
        fastest = list(ours)[-1]
        rows[f"ours, {fastest}, guided within {options.interval}"] = Row(ours[fastest], (within,))
        drawn = {name: row.call("draw") for name, row in rows.items()}  # warm
        for name in peers:
            _check_same(drawn[name], drawn["ours, eager"])
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(options.repeats):
            for name, row in rows.items():
                seconds[name].append(row.call("seconds"))
        print(f"{options.images} images in {options.steps} steps, guidance {options.scale:g}")
        base = next(iter(rows))
        print(f"\n| | images a second | time over that of {base} (least - most) |\n|---|---|---|")
        for name, found in seconds.items():
            print(
                f"| {name} | {options.images / statistics.median(found):.3f} | {ratio(found, seconds[base], '.3f')} |"
            )
        for name in list(peers)[1:]:
            over = ratio(seconds[f"ours, {fastest}"], seconds[name], ".3f")
            print(f"\nours, {fastest}, over {name}: {over}")
        table = _table(options, f"{folder}/vae", ours[fastest])
    return {"seconds": seconds, "table": table}


def _export(words: list[str], folder: Path) -> None:
    """What `dit export format=diffusers` makes of the same network."""
    cfg = compose("train", words)
    weights = dict(trained(Parts(cfg).denoiser().network).state_dict())
    about = {"format": "diffusers", "precision": "float32", "weights": "ema", "step": 0, "parameters": 0}
    folder.mkdir()
    with redirect_stdout(io.StringIO()):
        Exporting(folder.parent, cfg, weights, about).write(folder)


def _peers(precision: str) -> dict[str, str]:
    """The pipeline as it comes, and in the precision of ours: their precision by name."""
    return {PEER: "float32"} | ({} if precision == "float32" else {f"{PEER}, {precision}": precision})


def _executions(compile: bool) -> dict[str, dict[str, Any]]:
    """Ways of ours, the fastest last."""
    compiled = {"compiled": {"compile": True}} if compile else {}
    replayed = {"compiled, CUDA graphs": {"compile": True, "cuda_graphs": True}} if compile and GPU else {}
    return {"eager": {}, **compiled, **replayed}


def _table(options: argparse.Namespace, vae: str, ours: Apart) -> list[dict[str, Any]]:
    """Rows by sampler, steps and guidance, printed."""
    full = [f"guidance.scale={options.scale}"]
    guided = {"none": [], "full": full, "interval": [*full, f"guidance.interval={options.interval}"]}
    rows = []
    if options.samplers:
        print("\n| sampler | steps | guidance | images a second |\n|---|---|---|---|")
    for sampler, steps, guidance in itertools.product(options.samplers, options.table_steps, guided):
        words = [*RECIPE, f"latent.name={vae}", *options.overrides, *guided[guidance]]
        row = Row(ours, (words, [f"sampler={sampler}", f"sampler.num_steps={steps}"]))  # the recipe's: learned variance
        row.call("draw")
        seconds = [row.call("seconds") for _ in range(options.repeats)]
        rate = options.images / statistics.median(seconds)
        print(f"| {sampler} | {steps} | {guidance} | {rate:.3f} |", flush=True)
        rows.append({"sampler": sampler, "steps": steps, "guidance": guidance, "seconds": seconds})
    return rows


def _words(options: argparse.Namespace, vae: str) -> list[str]:
    """A recipe that a stock pipeline takes, on a VAE of a folder."""
    sampled = [f"sampler.num_steps={options.steps}", f"guidance.scale={options.scale}"]
    ddim = ["sampler=ddim", "sampler.variance=small", "grid=evenly"]
    return [*RECIPE, *ddim, f"latent.name={vae}", *options.overrides, *sampled]


def _check_same(theirs: Tensor, ours: Tensor) -> None:
    """Both draw the same images."""
    apart = (theirs - ours.float()).abs()
    assert apart.mean() < 1 and apart.quantile(0.99) <= AGREE, f"{apart.mean():.3g}, at most {apart.max():.3g}"
