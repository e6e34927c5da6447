"""Plan many GPUs on a laptop: python tools/scaling.py experiment=imagenet256_dit_xl_2 --nodes 1,16 --strategies fsdp.

Predicts memory, communication and time of a training step for each strategy and number of nodes, without data, weights
or a GPU. Nothing is measured here: times follow from data sheets, from --efficiency, the share of the peak that a GPU
reaches, and from --overlap, the share of computing in which communication can hide. Efficiency is assumed, unless
--measured names the output of `python tools/bench.py train` on such a GPU.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from dit.command.compose import compose
from dit.command.doctor import check
from dit.train.build import Parts
from dit.train.devices import settled
from dit.train.hardware import HARDWARE, Hardware, hardware
from dit.train.kind import check_denoiser
from dit.train.layout import Layout
from dit.train.plan import EFFICIENCY, OVERLAP, Plan, Planner

GIB = 2**30
NAMED = {"hsdp": ("fsdp", "node"), "fsdp_tp": ("fsdp", "world")}  # besides those of trainer.strategy


def main() -> None:
    """Print the table in Markdown, or JSON; exit code 2 after a mistake."""
    options = options_of()
    try:
        rows = predicted(options)
    except ValueError as error:
        print(f"scaling: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if options.json:
        print(json.dumps(rows))
    else:
        print(f"{rows[0]['precision']}, {rows[0]['batch']} images a step, GiB and times for each {options.gpu}:\n")
        print(table(rows))
        print(
            f"\nTimes are predicted: {options.efficiency:.0%} of the data sheet's peak, communication hidden by "
            f"{options.overlap:.0%} of computing.\nScaling is over one GPU that did it all. `trainer.lanes` must be a "
            "multiple of ranks times micro-batches."
        )


def predicted(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of nodes and each strategy.

    Raises:
        ValueError: if an option, or the configuration, does not do.
    """
    if options.measured and options.efficiency is not None:
        raise ValueError(f"--measured={options.measured} --efficiency={options.efficiency:g}: give one of them")
    if options.efficiency is None:
        options.efficiency = measured(Path(options.measured)) if options.measured else EFFICIENCY
    for name in ("efficiency", "overlap"):
        if not 0 < (value := getattr(options, name)) <= 1:
            raise ValueError(f"--{name}={value} must lie in (0, 1]")
    gpu = hardware(
        options.gpu,
        memory_bytes=_times(options.memory_gb, 1e9),
        bf16=_times(options.peak_tflops, 1e12),
        inside=_times(options.inside_gb, 1e9),
        between=_times(options.between_gb, 1e9),
    )
    cfg = compose("doctor", options.overrides)
    check(cfg)
    check_denoiser(cfg)
    cfg.trainer.dry_run = True  # a GPU need not be there
    cfg = settled(cfg)
    planner = Planner(Parts(cfg))
    layouts = [
        Layout(
            *(strategy, nodes, options.gpus, shard),
            tensor_parallel=options.tensor_parallel if name == "fsdp_tp" else 1,
            offload=options.offload and strategy.startswith("zero"),
        )
        for nodes in options.nodes
        for name in options.strategies
        for strategy, shard in [NAMED.get(name, (name, "world"))]
    ]
    trainer = cfg.trainer
    return [
        _row(planner(layout, trainer.batch_size, trainer.micro_batch_size), gpu, trainer.precision, options)
        for layout in layouts
    ]


def _row(plan: Plan, gpu: Hardware, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    seconds = plan.seconds(gpu, precision, options.efficiency, options.overlap)
    alone = plan.layout.world * seconds["compute"] + seconds["update"]
    return {
        **plan.layout._asdict(),
        "name": plan.layout.name,
        "world": plan.layout.world,
        "precision": precision,
        "batch": plan.batch,
        "images": plan.images,
        "num_micro_batches": plan.num_micro_batches,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "host_bytes": plan.host_bytes,
        "fits": plan.memory.total <= gpu.memory_bytes,
        "traffic": [t._asdict() for t in plan.traffic],
        "flops": plan.flops,
        "seconds": seconds,
        "images_per_second": plan.batch / seconds["step"],
        "scaling": alone / (plan.layout.world * seconds["step"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    parts = ["parameters", "gradients", "optimizer", "ema", "copies", "activations", "passing", "gathered", "total"]
    heads = ["GPUs", "strategy", "images", *parts, "fits", "sent in node", "between", "step, ms", "images/s", "scaling"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"{row['nodes']} x {row['gpus']}", row["name"] + (" offload" if row["offload"] else "")]
        cells.append(f"{row['num_micro_batches']} x {row['images']}")
        cells += [f"{row['memory'][part] / GIB:.2f}" for part in parts]
        cells.append("yes" if row["fits"] else "NO")
        cells += [f"{sum(t[where] for t in row['traffic']) / GIB:.2f}" for where in ("inside", "between")]
        cells += [f"{1000 * row['seconds']['step']:,.1f}", f"{row['images_per_second']:,.0f}", f"{row['scaling']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(path: Path) -> float:
    """The share of the data sheet's peak of forward and backward of ours, in what `tools/bench.py train` printed.

    Raises:
        ValueError: if that is not in the file, or was measured on a CPU, or in float32: it is of the peak of bfloat16.
    """
    try:
        found = json.loads(path.read_text().splitlines()[-1])
        narrow = found["asked"].get("precision", "bfloat16") == "bfloat16"
        recomputed = any("activation_checkpointing" in word for word in found["asked"]["overrides"])
        rows = [times for name, times in found["seconds"].items() if name.startswith("ours")]
        passes = [a + b for a, b in zip(rows[-1]["forward"], rows[-1]["backward"], strict=True)]
        share = float(found["flops"] / statistics.median(passes) / found["datasheet"])
    except OSError as error:
        raise ValueError(f"--measured={path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"--measured={path}: its last line is not that of tools/bench.py train on a GPU of a known data sheet"
        ) from error
    if not narrow:
        raise ValueError(f"--measured={path}: in float32, but it is a share of bfloat16's peak: --precision bfloat16")
    if recomputed:
        raise ValueError(f"--measured={path}: with activation_checkpointing, whose passes are counted here: without it")
    return share


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 1,2,4") from None


def options_of() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of a recipe, as for dit doctor: model=dit_xl_2")
    parser.add_argument("--nodes", type=_numbers, default=[1, 2, 4, 16], help="1,2,4,16")
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument(
        "--strategies",
        type=lambda text: text.split(","),
        default=["ddp", "fsdp", "hsdp", "zero2"],
        help="of single, ddp, fsdp, hsdp (shard within nodes, replicate across), fsdp_tp, zero1, zero2, zero3",
    )
    parser.add_argument("--tensor-parallel", type=int, default=2, help="GPUs that share a layer, with fsdp_tp")
    parser.add_argument("--offload", action="store_true", help="ZeRO's optimizer to the CPU")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(HARDWARE)}")
    parser.add_argument("--memory-gb", type=float, help="of a GPU, instead of the data sheet's")
    parser.add_argument("--peak-tflops", type=float, help="in bfloat16, likewise")
    parser.add_argument("--inside-gb", type=float, help="a second that a GPU sends within its node, likewise")
    parser.add_argument("--between-gb", type=float, help="a second that a GPU sends to other nodes, likewise")
    parser.add_argument("--efficiency", type=float, help=f"share of the peak that is reached; {EFFICIENCY:g}")
    parser.add_argument("--measured", help="a file that `tools/bench.py train` printed, for the efficiency it found")
    parser.add_argument("--overlap", type=float, default=OVERLAP, help="share of computing that hides communication")
    parser.add_argument("--json", action="store_true")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
