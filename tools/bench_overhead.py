"""`python tools/bench.py overhead`: what all that a run does beside forward, backward and optimizer takes of a step."""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from dit.command.compose import compose

MODEL = ("forward", "backward", "optimizer")


class Sections:
    """The process's CPU time by section, each without those within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack = ["other"]
        self._since = time.process_time()

    def enter(self, section: str | None) -> None:
        """From now on time is of a section; None: of the one before."""
        now = time.process_time()
        self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._stack = self._stack[:-1] if section is None else [*self._stack, section]
        self._since = now

    def of(self, owner: Any, name: str, section: str) -> None:
        """Have all calls of a method counted."""
        method: Callable[..., Any] = getattr(owner, name)

        @wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.enter(section)
            try:
                return method(*args, **kwargs)
            finally:
                self.enter(None)

        setattr(owner, name, counted)


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Train on images of 32 x 32 pixels, which are as many tokens as latents of 256, and print where time went."""
    from lightning.pytorch import Callback

    from dit.noise.denoiser import Denoiser
    from dit.noise.draw import Draw
    from dit.train.callbacks import Checkpoints, Recorder
    from dit.train.guard import Guard
    from dit.train.ledger import Ledger
    from dit.train.run import Run
    from dit.train.strategy import Strategy
    from dit.weights.ema import EMA

    with tempfile.TemporaryDirectory() as folder:
        cfg = compose("train", [*_recipe(Path(folder), options), *options.overrides])
        sections, steps = Sections(), list[dict[str, float]]()
        sections.of(Denoiser, "output", "forward")
        sections.of(Strategy, "backward", "backward")
        sections.of(Strategy, "step", "optimizer")
        sections.of(EMA, "update", "averages")
        for name in ("allows", "note", "bad"):
            sections.of(Guard, name, "guard")
        for name in ("uniform", "normal", "apply", "generator", "seed_layers"):
            sections.of(Draw, name, "keyed randomness")
        for owner, section in ((Recorder, "lines"), (Ledger, "ledger"), (Checkpoints, "checkpoints, beside saves")):
            for name in ("on_train_batch_start", "on_train_batch_end"):
                if name in vars(owner):
                    sections.of(owner, name, section)

        class Steps(Callback):
            """Notes each step's sections."""

            def on_train_batch_start(self, *_: Any) -> None:
                sections.enter("other")
                steps.append(dict(sections.seconds))

        with _also(Steps()), redirect_stdout(io.StringIO()):
            Run(cfg).fit()
    parts = [{k: b.get(k, 0.0) - a.get(k, 0.0) for k in b} for a, b in pairwise(steps)]
    _print(options, parts[options.warm :])
    return {"steps": parts[options.warm :]}


def _recipe(folder: Path, options: argparse.Namespace) -> list[str]:
    """Of random pictures, with every step noted, and nothing saved or drawn before the last."""
    from dit.command.pack import main as pack

    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(4 * options.batch_size):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (pictures / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(pictures / str(i % 2) / f"{i}.png")
    with redirect_stdout(io.StringIO()):
        pack(compose("pack", [f"source={pictures}", f"out={folder}/data", "num_workers=1"]))
    number = options.steps + options.warm + 1
    return [
        *("experiment=imagenet256_dit_b_2", "latent=pixels", "data.image_size=32", "data.num_classes=2"),
        *(f"data.path={folder}/data", f"runs_dir={folder}", "run=overhead", "trainer=cpu", "logger=none"),
        *(f"trainer.batch_size={options.batch_size}", "trainer.lanes=1", "data.num_workers=1", "trainer.ledger=true"),
        *(f"trainer.max_steps={number}", "trainer.log_every_steps=1", "sampler.num_steps=1", "metric=none"),
    ]


def _print(options: argparse.Namespace, steps: list[dict[str, float]]) -> None:
    names = sorted({name for step in steps for name in step})
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    whole = [sum(step.values()) for step in steps]
    beside = [1 - sum(step.get(name, 0.0) for name in MODEL) / sum(step.values()) for step in steps]
    what = " ".join(["DiT-B/2", *options.overrides])
    print(f"{what}, {options.batch_size} images a step")
    print("\n| | ms | of a step |\n|---|---|---|")
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / statistics.median(whole):.2%} |")
    print(f"| a step | {1000 * statistics.median(whole):.1f} | |")
    print(f"\nbeside the model: {statistics.median(beside):.2%} ({min(beside):.2%} - {max(beside):.2%}) of a step")


@contextmanager
def _also(callback: Any) -> Iterator[None]:
    """For the length of a `with`, Lightning's trainers have one more callback, the first."""
    from lightning.pytorch import Trainer

    before = Trainer.__init__

    def begin(trainer: Any, *args: Any, **options: Any) -> None:
        options["callbacks"] = [callback, *options["callbacks"]]
        before(trainer, *args, **options)

    with patch.object(Trainer, "__init__", begin):
        yield
