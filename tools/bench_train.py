"""`python tools/bench.py train`: a training step of ours beside those of other libraries, and where its time goes.

Each row is trained in a process of its own, as a run is, and they take turns.

A step is data, forward, backward, optimizer and EMA, on one device: what processes send each other is no part of it.
Ours reads latents from shards as a run does; peers are given the same tensors at each step. On a CPU time is the
process's CPU time, reading included; on a GPU it is the stream's, in which waiting for the data's workers shows. Shares
of a rate are three times the FLOPs of our forward over the step's time, over that rate; the matmul rate is that of the
model's own matrix products, in the same run and precision. The published recipe is in float32, whatever --precision.
"""

import argparse
import copy
import gc
import itertools
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_apart import Apart
from bench_fixtures import latents, trained
from bench_machine import DEVICE, GPU, Laps, autocast, datasheet, measured, ratio, spread
from bench_peers import (
    check,
    diffusers_average,
    diffusers_network,
    published_average,
    published_network,
    tf32,
)
from torch import Tensor, nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from dit.command.compose import compose
from dit.train import float8
from dit.train.build import Parts, build
from dit.train.cost import Alive, memory, multiply_adds
from dit.train.execution import CHECKPOINTING
from dit.train.run import PRECISION
from dit.train.strategy import Strategy
from dit.train.strategy import trained as parameters_of

IN_TRAINING = {ours: theirs for theirs, ours in PRECISION.items()}  # what trainer.precision calls it
PARTS = ("data", "forward", "backward", "optimizer", "EMA")
WARM = 2  # steps
TRACED = 3
GIB = 2**30

Inputs = tuple[Tensor, Tensor, Tensor]  # x (B, C, H, W), time (B,), label (B,)


class Trained:
    """A network as it is trained, of which single steps are measured.

    Args:
        network: on the device.
        optimizer: trained parameters -> optimizer.
        average: network -> one update of its moving average.
        inputs: of each step.
        target: of the mean squared error, (B, C or 2C, H, W).
        within: the precision.
        call: (network, x, time, label) -> output.
    """

    def __init__(
        self,
        network: Any,
        optimizer: Callable[..., torch.optim.Optimizer],
        average: Callable[[Any], Callable[[], None]],
        inputs: Iterable[Inputs],
        target: Tensor,
        within: Callable[[], AbstractContextManager[Any]],
        call: Callable[..., Tensor] = lambda network, *inputs: network(*inputs),
    ):
        self.network, self.target, self.within, self.call = network, target, within, call
        self.optimizer = optimizer(list(parameters_of(network).values()))
        self.average = average(network)
        self.inputs = iter(inputs)

    def run(self, steps: int) -> dict[str, float]:
        """So many steps: the mean seconds of their parts."""
        laps = Laps()
        for _ in range(steps):
            laps.mark()
            inputs = next(self.inputs)
            laps.mark("data")
            with self.within():
                loss = F.mse_loss(self.call(self.network, *inputs).float(), self.target)
                laps.mark("forward")
                loss.backward()
            laps.mark("backward")
            self.optimizer.step()
            self.optimizer.zero_grad()
            laps.mark("optimizer")
            self.average()
            laps.mark("EMA")
        return {part: seconds / steps for part, seconds in laps.seconds().items()}

    def measure(self, steps: int) -> tuple[dict[str, float], int | None]:
        """The same, and the most bytes of a GPU that were taken.

        Between its turns a row leaves the GPU what it need not keep, and takes it again in a step that does not count.
        """
        if not GPU:
            return self.run(steps), None
        self.run(1)
        torch.cuda.reset_peak_memory_stats()
        seconds, peak = self.run(steps), torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        return seconds, peak

    @torch.no_grad()
    def answer(self) -> Tensor:
        """The output of a step in float32, without the dropout of labels that diffusers' network has in training."""
        self.network.eval()
        output = self.call(self.network, *next(self.inputs))
        self.network.train()
        return output.cpu()

    def products(self) -> Counter[tuple[int, int, int]]:
        """Matrix products of the linear layers that see every token: (rows, in, out), and how many there are."""
        found: Counter[tuple[int, int, int]] = Counter()

        def note(layer: nn.Linear, told: tuple[Tensor], _: Tensor) -> None:
            if told[0].ndim == 3:
                found[told[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

        hooks = [m.register_forward_hook(note) for m in self.network.modules() if isinstance(m, nn.Linear)]
        self.answer()
        for hook in hooks:
            hook.remove()
        return found

    def trace(self, path: str) -> str:
        """Write what the profiler sees of some steps: a table of the operations that take the most."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
        with profile(activities=activities) as seen:
            self.run(TRACED)
        seen.export_chrome_trace(path)
        column = "self_cuda_time_total" if GPU else "self_cpu_time_total"
        return seen.key_averages().table(sort_by=column, row_limit=15, max_name_column_width=50)


class Way(NamedTuple):
    """How a network is trained: a row of the table."""

    make: Callable[..., Trained]  # parts, network with its weights, inputs=, target=
    compiled: bool = False
    peer: str = ""  # of --against
    tuned: bool = False  # a peer in another way than it comes


@dataclass
class Row:
    """A way to train, in a process of its own, and what was measured of it."""

    name: str
    trained: Apart
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})  # one entry a repeat
    peak_bytes: int | None = None  # of a GPU

    def measure(self, steps: int) -> None:
        """One more repeat."""
        seconds, self.peak_bytes = self.trained.call("measure", steps)
        for part, found in seconds.items():
            self.seconds[part].append(found)

    @property
    def way(self) -> Way:
        """How."""
        return WAYS[self.name]

    @property
    def steps(self) -> list[float]:
        """Seconds of a whole step, one entry a repeat."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step of our network and of the peers', one after the other, and again."""
    if options.trace and (Path(options.trace).is_dir() or not Path(options.trace).resolve().parent.is_dir()):
        raise ValueError(f"--trace {options.trace}: give a file in a folder that is there")
    batch = options.batch_size
    words = [*options.overrides, f"trainer.precision={IN_TRAINING[options.precision]}"]
    recipe = Parts(compose("doctor", words))  # what does not fit fails before anything is written
    latent, trainer = recipe.cfg.latent, recipe.cfg.trainer
    if latent.get("stride") is None:
        raise ValueError(f"{latent._target_}: latents are what is trained on here, take latent=sd_vae")
    if recipe.adapter:
        raise ValueError("adapter=: whole networks are trained here, leave it out")
    if trainer.compile:
        raise ValueError("trainer.compile=true: give --compile, which measures a row of its own")
    if options.against and (trainer.float8 != "none" or trainer.activation_checkpointing != "none"):
        raise ValueError("trainer.float8 and trainer.activation_checkpointing are ours alone: leave --against out")
    trainer = trainer.copy()
    trainer.compile, trainer.accelerator = options.compile, "gpu" if GPU else "cpu"
    float8.check(trainer)
    check(recipe.denoiser("meta").network, options.against)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        size = latent.size * latent.stride
        path = latents(Path(folder), 4 * batch, min(16, 4 * batch), size, latent.channels, latent.stride)
        words += ["data=latents", f"data.path={path}", f"latent.name={folder}/vae", "data.fields=[label]"]
        words += [] if GPU else ["data.num_workers=0"]  # so that reading counts
        parts = Parts(compose("doctor", words))
        peaks = _peaks(parts, options.memory)
        build(parts.cfg.data).check(batch)
        ways = {name: way for name, way in WAYS.items() if way.peer in ("", *options.against)}
        names = [name for name, way in ways.items() if options.compile or not way.compiled]
        try:
            rows = [Row(name, processes.enter_context(Apart(_begin, name, words, batch))) for name in names]
            return _compared(options, parts, rows) | {"memory": peaks}
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"--batch-size {batch} does not fit beside the weights of all rows: take a smaller one, or no --against"
            ) from error


def _begin(name: str, words: list[str], batch: int) -> Trained:
    """Of a way, in its process; its weights and first inputs are those of all."""
    parts = Parts(compose("doctor", words))
    network, space = trained(parts.denoiser().network).to(DEVICE), parts.latent()
    time = torch.randint(1000, (batch,), device=DEVICE)

    def inputs(batch: dict[str, Any]) -> Inputs:
        moments, label = (batch[name].to(DEVICE, non_blocking=True) for name in ("latent", "label"))
        return space.draw(moments), time, label

    batches = build(parts.cfg.data).batches(batch, 0)
    read = map(inputs, batches)
    fixed = next(read)
    target = torch.randn(batch, network.out_channels, *fixed[0].shape[2:], device=DEVICE)
    way = WAYS[name]
    if way.peer:
        batches.close()
    given = itertools.repeat(fixed) if way.peer else itertools.chain([fixed], read)
    return way.make(parts, network, inputs=given, target=target)


def _compared(options: argparse.Namespace, parts: Parts, rows: list[Row]) -> dict[str, Any]:
    """Measure all rows, and print them."""
    answers = [row.trained.call("answer") for row in rows]
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], atol=1e-3 if GPU else 1e-4, rtol=1e-2)  # all do the same
    rates, products = list[float](), rows[0].trained.call("products")
    for row in rows:
        row.trained.call("run", WARM)
    for _ in range(options.repeats):
        rates.append(_matmul_rate(products, getattr(torch, options.precision)))
        for row in rows:
            row.measure(options.steps)
    ours = [row for row in rows if not row.way.peer][-1]
    if options.trace:
        print(ours.trained.call("trace", options.trace))
        print(f"{options.trace} has {TRACED} steps of {ours.name}, for chrome://tracing or ui.perfetto.dev\n")
    rate, flops = statistics.median(rates), 6 * multiply_adds(parts) * options.batch_size
    _print(rows, ours, rate, flops, options.batch_size)
    found = {row.name: {**row.seconds, "peak": row.peak_bytes} for row in rows}
    return {"flops": flops, "rate": rate, "datasheet": datasheet(), "seconds": found}


def _ours(parts: Parts, network: Any, *, compile: bool = False, **given: Any) -> Trained:
    """As a recipe trains it."""
    options = copy.deepcopy(parts.cfg.trainer)
    options.compile = compile
    Strategy.arrange(network, options)
    return Trained(network, build(parts.cfg.optimizer), _average(parts), **given, within=_precision(parts))


def _precision(parts: Parts) -> Callable[[], AbstractContextManager[Any]]:
    return partial(autocast, parts.cfg.trainer.precision == "bf16-mixed")


def _average(parts: Parts) -> Callable[[nn.Module], Callable[[], None]]:
    def make(network: nn.Module) -> Callable[[], None]:
        average, count = build(parts.cfg.ema)(parameters_of(network)), itertools.count(1)
        return lambda: average.update(next(count))

    return make


def _diffusers(parts: Parts, network: Any, *, optimizer: Callable[..., torch.optim.Optimizer], **given: Any) -> Trained:
    def call(network: Any, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        output: Tensor = network(x, timestep=time, class_labels=label, return_dict=False)[0]
        return output

    made, within = diffusers_network(network).to(DEVICE), _precision(parts)
    return Trained(made, optimizer, diffusers_average, **given, within=within, call=call)


def _published(_: Parts, network: Any, **given: Any) -> Trained:
    return Trained(published_network(network), _published_optimizer, published_average, **given, within=tf32)


def _published_optimizer(parameters: list[nn.Parameter]) -> AdamW:
    return AdamW(parameters, lr=1e-4, weight_decay=0)


def _fused(parameters: list[nn.Parameter]) -> AdamW:
    return AdamW(parameters, fused=True)


WAYS = {
    "ours, eager": Way(_ours),
    "ours, compiled": Way(partial(_ours, compile=True), compiled=True),
    "published recipe": Way(_published, peer="published"),
    "diffusers, eager": Way(partial(_diffusers, optimizer=AdamW), peer="diffusers"),
    "diffusers, eager, fused AdamW": Way(partial(_diffusers, optimizer=_fused), peer="diffusers", tuned=True),
}


@torch.no_grad()
def _matmul_rate(products: Counter[tuple[int, int, int]], dtype: torch.dtype) -> float:
    """FLOP/s of these matrix products, for their own sake, by the faster of what torch has: on a CPU MKL or oneDNN."""
    flops, seconds = 0, 0.0
    for (rows, width, out), number in products.items():
        a = torch.randn(rows, width, device=DEVICE, dtype=dtype)
        b = torch.randn(out, width, device=DEVICE, dtype=dtype)
        c = torch.empty(rows, out, device=DEVICE, dtype=dtype)
        ways: list[Callable[[], Tensor]] = [partial(torch.mm, a, b.t(), out=c)]
        if not GPU and torch.backends.mkldnn.is_available():
            ways.append(partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], ""))
        flops += 2 * rows * width * out * number
        for way in ways:
            way()  # warm
        seconds += number * min(measured(way, 100 if GPU else 10) for way in ways)
    return flops / seconds


def _print(rows: list[Row], ours: Row, rate: float, flops: int, batch: int) -> None:
    """The table, and ours over the better of the peers, which is the last line."""
    peers = sorted((row for row in rows if row.way.peer), key=lambda row: (row.way.tuned, statistics.median(row.steps)))
    base, sheet = (peers or rows)[0], datasheet()
    print(f"matmul rate {rate / 1e9:,.1f} GFLOP/s, {flops / 1e9:,.1f} GFLOP a step", end="\n\n")
    heads = ["", "step, ms", *PARTS, "images/s", f"over {base.name}", "of the matmul rate", "of the data sheet"]
    print("| " + " | ".join([*heads, "peak, GiB"]) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for row in rows:
        step = statistics.median(row.steps)
        cells = [row.name, spread([1000 * seconds for seconds in row.steps], ".1f")]
        cells += [f"{1000 * statistics.median(row.seconds[part]):.1f}" for part in PARTS]
        cells += [f"{batch / step:,.2f}", ratio(row.steps, base.steps, ".3f"), f"{flops / step / rate:.1%}"]
        cells += [
            f"{flops / step / sheet:.1%}" if sheet else "-",
            f"{row.peak_bytes / GIB:.2f}" if row.peak_bytes else "-",
        ]
        print("| " + " | ".join(cells) + " |")
    for peer in peers[::-1]:
        which = "the better of the peers, " if peer is base else ""
        print(f"{ours.name}, over {which}{peer.name}: {ratio(ours.steps, peer.steps, '.3f')}")


def _peaks(parts: Parts, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The most memory of steps of ours by images and checkpointing, measured and predicted, in bytes; printed, too."""
    rows = []
    if sizes:
        print("| images | activation_checkpointing | peak, GiB | predicted | off |\n|---|---|---|---|---|")
    for batch, checkpointing in itertools.product(sizes, CHECKPOINTING):
        cfg = copy.deepcopy(parts.cfg)
        cfg.trainer.activation_checkpointing = checkpointing
        predicted, peak = memory(recipe := Parts(cfg), batch).total, _peak(recipe, batch)
        found, off = (f"{peak / GIB:.2f}", f"{predicted / peak - 1:+.1%}") if peak else ("does not fit", "")
        print(f"| {batch} | {checkpointing} | {found} | {predicted / GIB:.2f} | {off} |", flush=True)
        rows.append({"images": batch, "checkpointing": checkpointing, "peak": peak, "predicted": predicted})
    print(end="\n" if rows else "")
    if GPU:
        torch.cuda.empty_cache()  # for the processes of the rows
    return rows


def _peak(parts: Parts, batch: int) -> int | None:
    """Bytes of the tensors of two steps, at the most; None: they do not fit."""
    gc.collect()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    before, latent = _allocated(), parts.cfg.latent
    with nullcontext() if GPU else Alive() as alive:
        try:
            x = torch.randn(batch, latent.channels, latent.size, latent.size, device=DEVICE)
            inputs = x, *torch.zeros(2, batch, dtype=torch.long, device=DEVICE)
            network = trained(parts.denoiser("meta").network.to_empty(device=DEVICE))
            target = torch.zeros(batch, network.out_channels, *x.shape[2:], device=DEVICE)
            _ours(parts, network.to(DEVICE), inputs=itertools.repeat(inputs), target=target).run(2)
        except torch.OutOfMemoryError:
            return None
    return torch.cuda.max_memory_allocated() - before if alive is None else alive.most


def _allocated() -> int:
    return torch.cuda.memory_allocated() if GPU else 0
