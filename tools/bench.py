"""Measure speed beside that of another library: python tools/bench.py train model=dit_s_2 --against diffusers.

On a GPU if torch sees one (bf16 autocast, CUDA events), else on the CPU (float32, the process's CPU time). Prints a
table in Markdown and one line of JSON; tools/benchmarks/ keeps both with their command.
"""

import argparse
import datetime
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_checkpoint import checkpoint
from bench_data import data
from bench_ema import ema
from bench_goodput import goodput
from bench_guard import guard
from bench_memory import memory
from bench_overhead import overhead
from bench_sample import sample
from bench_startup import startup
from bench_wait import wait
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dit.command.compose import compose
from dit.train.build import Parts, build
from dit.train.cost import multiply_adds
from dit.train.execution import arrange
from dit.weights.convert import dit_to_diffusers

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PEER = "diffusers, eager"


class Trained:
    """A network and its optimizer, of which single steps are measured.

    Args:
        name: the row of the table.
        network: on the device.
        optimizer: parameters -> optimizer.
        call: (network, x, time, label) -> output.
    """

    def __init__(self, name: str, network: nn.Module, optimizer: Callable[..., Optimizer], call: Callable[..., Tensor]):
        self.name, self.network, self.call = name, network, call
        self.optimizer = optimizer([p for p in network.parameters() if p.requires_grad])
        self.passes: list[float] = []  # seconds of a forward and backward, one entry a repeat
        self.updates: list[float] = []  # seconds of an optimizer step
        self.own_bytes = self.peak_bytes = 0

    def measure(self, inputs: tuple[Tensor, ...], target: Tensor, steps: int) -> None:
        """So many steps: one more entry, the mean over them."""
        passes, updates = Timer(), Timer()
        for _ in range(steps):
            with passes:
                with _autocast():
                    loss = F.mse_loss(self.call(self.network, *inputs).float(), target)
                loss.backward()
            with updates:
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.passes.append(passes.seconds() / steps)
        self.updates.append(updates.seconds() / steps)

    @property
    def steps(self) -> list[float]:
        """Seconds of a whole step, one entry a repeat."""
        return [a + b for a, b in zip(self.passes, self.updates, strict=True)]


class Timer:
    """Adds up the time spent within it: of the GPU's stream, or the process's CPU time."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if GPU:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()
        else:
            self.cpu -= time.process_time()

    def __exit__(self, *_: object) -> None:
        if GPU:
            self.events[-1][1].record()
        else:
            self.cpu += time.process_time()

    def seconds(self) -> float:
        """All of it."""
        if not GPU:
            return self.cpu
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.events) / 1000


def main() -> None:
    """Run one sub-command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="one training step: forward, backward, AdamW")
    command.set_defaults(run=train)
    command.add_argument("overrides", nargs="*", help="of a recipe, as for dit doctor: model=dit_s_2")
    command.add_argument("--against", choices=["diffusers"], help="measure its DiTTransformer2DModel, too")
    command.add_argument("--batch-size", type=int, default=4)
    command.add_argument("--steps", type=int, default=10, help="in each repeat")
    command.add_argument("--repeats", type=int, default=5, help="A B C, A B C, ...: medians are over these")
    command.add_argument("--compile", action="store_true", help="measure ours compiled, too")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    command = commands.add_parser("sample", help="from labels to pixels, with guidance, against diffusers' DiTPipeline")
    command.set_defaults(run=sample)
    command.add_argument("overrides", nargs="*", help="of experiment=imagenet256_dit_s_2, like model=dit_b_2")
    command.add_argument("--images", type=int, default=2)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--scale", type=float, default=4.0)
    command.add_argument("--interval", default="[0.1,0.6]", help="the times t at which the last row is guided")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--compile", action="store_true", help="measure ours compiled, too")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    command = commands.add_parser("data", help="samples a second, against webdataset's reader; going on at a step")
    command.set_defaults(run=data)
    command.add_argument("--samples", type=int, default=8000)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    command = commands.add_parser("wait", help="what steps of a fast GPU wait for latents of local shards")
    command.set_defaults(run=wait)
    command.add_argument("--rate", type=float, default=700, help="images a second of the GPU, which a sleep stands for")
    command.add_argument("--batch-size", type=int, default=256)
    command.add_argument("--steps", type=int, default=60)
    command.add_argument("--samples", type=int, default=4096)
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--threads", type=int, default=1, help="of torch in this process")
    for name, run, what in (("ema", ema, "averaging the weights"), ("guard", guard, "watching over the gradients")):
        command = commands.add_parser(name, help=f"what {what} adds to a training step")
        command.set_defaults(run=run)
        command.add_argument("overrides", nargs="*", default=["model=dit_b_2"], help="of a recipe, as for dit doctor")
        command.add_argument("--batch-size", type=int, default=8)
        command.add_argument("--steps", type=int, default=1, help="in each repeat")
        command.add_argument("--repeats", type=int, default=5)
        command.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    command = commands.add_parser("memory", help="bytes of a rank under FSDP2, beside one process's and the predicted")
    command.set_defaults(run=memory)
    command.add_argument("overrides", nargs="*", default=["model=dit_b_2"], help="of a recipe, as for dit doctor")
    command.add_argument("--processes", type=int, default=4)
    command.add_argument("--batch-size", type=int, default=2, help="images of each")
    command.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    command = commands.add_parser("checkpoint", help="for how long a save holds training up, beside it and not")
    command.set_defaults(run=checkpoint)
    command.add_argument("--folder", help="in which a temporary one is made; by default the system's")
    command.add_argument("--steps", type=int, default=200, help="of a small network, that are timed alone")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    command = commands.add_parser("overhead", help="what a run does beside forward, backward and optimizer, of a step")
    command.set_defaults(run=overhead)
    command.add_argument("overrides", nargs="*", help="of experiment=imagenet256_dit_b_2, like model=dit_s_2")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--steps", type=int, default=6)
    command.add_argument("--warm", type=int, default=1, help="steps before these")
    command.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    command = commands.add_parser("startup", help="how long commands take to begin, and training to its first step")
    command.set_defaults(run=startup)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--threads", type=int, default=1, help="of torch in this process")
    command = commands.add_parser("goodput", help="what is left of a run's time when faults befall it")
    command.set_defaults(run=goodput)
    command.add_argument("overrides", nargs="*", help="of the digits' recipe, as for dit train")
    command.add_argument("--minutes", type=float, default=30)
    command.add_argument("--faults", type=int, choices=range(1, 100), default=3, metavar="N", help="at least 1")
    command.add_argument("--threads", type=int, default=1, help="of torch in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run(options)


def train(options: argparse.Namespace) -> None:
    """Measure a training step of our network and of the peer's, one after the other, and again."""
    parts = Parts(compose("doctor", options.overrides))
    torch.manual_seed(0)
    batch = options.batch_size
    initial: Any = parts.denoiser().network
    for p in initial.parameters():
        if p.requires_grad:  # nothing is zero, as after some training
            nn.init.normal_(p, std=0.02)
    x = torch.randn(batch, initial.x_embedder.proj.in_channels, *(parts.cfg.latent.size,) * 2)
    label = torch.randint(parts.condition.sizes["num_classes"], (batch,))
    inputs = tuple(tensor.to(DEVICE) for tensor in (x, torch.randint(1000, (batch,)), label))
    target = torch.randn(batch, initial.out_channels, *x.shape[2:], device=DEVICE)

    rows = [_ours("ours, eager", parts, initial, compile=False)]
    if options.compile:
        rows.append(_ours("ours, compiled", parts, initial, compile=True))
    if options.against:
        rows += [_peer(PEER, initial, AdamW), _peer(f"{PEER}, fused AdamW", initial, _fused)]
        _check_equal(rows[0], rows[-1], inputs)
    shapes = _products(rows[0], inputs)
    rates = []
    for row in rows:
        with _own_bytes(row):
            row.measure(inputs, target, steps=2)
        row.passes, row.updates = [], []  # warm now
    for _ in range(options.repeats):
        rates.append(_matmul_rate(shapes))
        for row in rows:
            before = torch.cuda.memory_allocated() if GPU else 0
            torch.cuda.reset_peak_memory_stats() if GPU else None
            row.measure(inputs, target, options.steps)
            row.peak_bytes = row.own_bytes + (torch.cuda.max_memory_allocated() - before if GPU else 0)
    _report(options, rows, statistics.median(rates), 6 * multiply_adds(parts) * batch)


def _ours(name: str, parts: Parts, initial: Any, *, compile: bool) -> Trained:
    network = parts.denoiser().network
    network.load_state_dict(initial.state_dict())
    arrange(network, compile=compile)
    return Trained(name, network.to(DEVICE), build(parts.cfg.optimizer), lambda network, *inputs: network(*inputs))


def _peer(name: str, ours: Any, optimizer: Callable[..., Optimizer]) -> Trained:
    """The same network, with the same weights, of diffusers."""
    from diffusers import DiTTransformer2DModel

    attention = ours.blocks[0].attn
    network: Any = DiTTransformer2DModel(
        num_attention_heads=attention.num_heads,
        attention_head_dim=attention.proj.in_features // attention.num_heads,
        in_channels=ours.x_embedder.proj.in_channels,
        out_channels=ours.out_channels,
        num_layers=len(ours.blocks),
        sample_size=round(ours.pos_embed.shape[1] ** 0.5) * ours.patch_size,
        patch_size=ours.patch_size,
        num_embeds_ada_norm=ours.y_embedder.embedding_table.num_embeddings - 1,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        norm_eps=1e-6,
    )
    network.load_state_dict(dit_to_diffusers(ours.state_dict()))
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as published

    def call(network: Any, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return network(x, timestep=time, class_labels=label, return_dict=False)[0]

    return Trained(name, network.train().to(DEVICE), optimizer, call)


def _fused(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, fused=True)


@torch.no_grad()
def _check_equal(ours: Trained, peer: Trained, inputs: tuple[Tensor, ...]) -> None:
    """Both compute the same."""
    peer.network.eval()  # it drops labels in training
    ours_out, peer_out = ours.call(ours.network, *inputs), peer.call(peer.network, *inputs)
    peer.network.train()
    torch.testing.assert_close(ours_out, peer_out, atol=1e-2 if GPU else 1e-4, rtol=1e-2)


@torch.no_grad()
def _products(row: Trained, inputs: tuple[Tensor, ...]) -> Counter[tuple[int, int, int]]:
    """The matrix products of the linear layers that see every token: (rows, in, out), and how many there are."""
    found: Counter[tuple[int, int, int]] = Counter()

    def note(layer: nn.Linear, told: tuple[Tensor], _: Tensor) -> None:
        if told[0].ndim == 3:
            found[told[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

    hooks = [m.register_forward_hook(note) for m in row.network.modules() if isinstance(m, nn.Linear)]
    row.call(row.network, *inputs)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def _matmul_rate(products: Counter[tuple[int, int, int]]) -> float:
    """FLOP/s of these matrix products, for their own sake."""
    flops, seconds, times = 0, 0.0, 100 if GPU else 10
    dtype = torch.bfloat16 if GPU else torch.float32
    for (rows, width, out), number in products.items():
        a = torch.randn(rows, width, device=DEVICE, dtype=dtype)
        b = torch.randn(out, width, device=DEVICE, dtype=dtype)
        c = torch.empty(rows, out, device=DEVICE, dtype=dtype)
        torch.mm(a, b.t(), out=c)
        with (timer := Timer()):
            for _ in range(times):
                torch.mm(a, b.t(), out=c)
        flops += 2 * rows * width * out * number
        seconds += timer.seconds() / times * number
    return flops / seconds


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if GPU else nullcontext()


@contextmanager
def _own_bytes(row: Trained) -> Iterator[None]:
    """Note what a row keeps on the GPU between steps: parameters, and the optimizer's state once it has stepped."""
    before = torch.cuda.memory_allocated() if GPU else 0
    yield
    parameters = sum(t.nbytes for t in (*row.network.parameters(), *row.network.buffers()))
    row.own_bytes = parameters + (torch.cuda.memory_allocated() - before if GPU else 0)


def _report(options: argparse.Namespace, rows: list[Trained], rate: float, flops: int) -> None:
    """Print the table in Markdown and the line of JSON."""
    machine = {
        "device": torch.cuda.get_device_name() if GPU else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": "bf16 autocast" if GPU else "float32",
        "date": datetime.date.today().isoformat(),
    }
    print(f"{machine}; matmul rate {rate / 1e9:,.1f} GFLOP/s, {flops / 1e9:,.1f} GFLOP a step", end="\n\n")
    base = next((row for row in rows if row.name == PEER), rows[0])
    columns = f"step, ms (least - most) | forward + backward | optimizer | step over that of {base.name}"
    print(f"| | {columns} | of the matmul rate |", end="")
    print(" peak, GiB |" if GPU else "")
    print("|---" * (7 if GPU else 6) + "|")
    results = {}
    for row in rows:
        step, ms = statistics.median(row.steps), [f"{1000 * t:.1f}" for t in (min(row.steps), max(row.steps))]
        ratio = statistics.median(a / b for a, b in zip(row.steps, base.steps, strict=True))
        cells = [row.name, f"{1000 * step:.1f} ({ms[0]} - {ms[1]})"]
        cells += [f"{1000 * statistics.median(t):.1f}" for t in (row.passes, row.updates)]
        cells += [f"{ratio:.3f}", f"{flops / step / rate:.1%}"] + ([f"{row.peak_bytes / 2**30:.2f}"] if GPU else [])
        print("| " + " | ".join(cells) + " |")
        results[row.name] = {"step": row.steps, "passes": row.passes, "optimizer": row.updates, "peak": row.peak_bytes}
    asked = {name: value for name, value in vars(options).items() if name != "run"}
    print("\n" + json.dumps({"machine": machine, "asked": asked, "flops": flops, "rate": rate, "seconds": results}))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor()


if __name__ == "__main__":
    main()
