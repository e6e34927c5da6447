"""Measure speed and memory: python tools/bench.py train model=dit_s_2 --against diffusers published.

Each sub-command prints the machine, a table in Markdown, and last one line of JSON: the machine, what was asked, and
the raw figures. tools/benchmarks/ keeps them with their command. --against measures what other libraries have for the
same, too, in turns: A B C, A B C, ...; ratios are medians of these turns, with the least and the most. On a GPU if
torch sees one, else by the process's CPU time. Overrides come before options.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_attention import attention
from bench_checkpoint import checkpoint
from bench_communication import communication
from bench_curves import curves
from bench_data import data
from bench_ema import ema
from bench_goodput import goodput
from bench_guard import guard
from bench_machine import GPU, machine
from bench_memory import memory
from bench_overhead import overhead
from bench_peers import PEERS
from bench_sample import sample
from bench_startup import startup
from bench_train import train
from bench_wait import wait

from dit.train.loaded import PRECISIONS

MIXED = (attention, communication, ema, guard)  # compute in bfloat16 where there is a GPU


def main() -> None:
    """Run one sub-command; exit code 2 after a mistake, 1 if what is measured fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, (what, arguments) in COMMANDS.items():
        told: Any = {"help": what, "description": sys.modules[run.__module__].__doc__}
        command = commands.add_parser(run.__name__, **told, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        for name, settings in (arguments | {"--threads": number(1, "of torch in this process")}).items():
            command.add_argument(name, **settings)
    asked = vars(parser.parse_args())
    run = asked.pop("run")
    torch.set_num_threads(asked["threads"])
    about = machine(asked.get("precision") == "bfloat16" or (GPU and run in MIXED))
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    try:
        figures = run(argparse.Namespace(**asked))
    except (ValueError, ImportError) as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print("\n" + json.dumps({"machine": about, "asked": asked, **_rounded(figures)}))
    if figures.get("failed"):
        raise SystemExit(f"bench: too far: {'; '.join(figures['failed'])}")


def _rounded(figures: Any) -> Any:
    """With four digits of whatever is no whole number."""
    if isinstance(figures, dict):
        return {name: _rounded(value) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [_rounded(value) for value in figures]
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


def number(default: float, what: str) -> dict[str, Any]:
    """An argument that is a number above 0."""
    kind = type(default)

    def read(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
        return value

    read.__name__ = kind.__name__  # which argparse names, where it is no number
    return {"type": read, "default": default, "help": what}


def words(what: str, *default: str) -> dict[str, Any]:
    """The overrides of a configuration."""
    return {"nargs": "*", "default": list(default), "help": what}


def against(*peers: str) -> dict[str, Any]:
    """What is measured beside ours."""
    return {"nargs": "+", "choices": peers, "default": [], "help": "measure it, too"}


def precision(default: str, help: str) -> dict[str, dict[str, Any]]:
    """The option of it."""
    return {"--precision": {"choices": PRECISIONS, "default": default, "help": help}}


OF_A_RECIPE = "of a recipe, as for dit doctor: model=dit_s_2"
REPEATS = {"--repeats": number(5, "that take turns")}
STEPPED = {"--steps": number(1, "in each repeat"), **REPEATS}
COMPILE = {"--compile": {"action": "store_true", "help": "measure ours compiled, too"}}
IN_A_STEP = {
    "overrides": words(OF_A_RECIPE, "model=dit_b_2"),
    "--batch-size": number(8, "images of a step"),
    **STEPPED,
}

Command = Callable[[argparse.Namespace], dict[str, Any]]
COMMANDS: dict[Command, tuple[str, dict[str, dict[str, Any]]]] = {
    train: (
        "a training step: data, forward, backward, optimizer, EMA",
        {
            "overrides": words(OF_A_RECIPE),
            "--against": against(*PEERS),
            "--batch-size": number(4, "images of a step"),
            **precision("bfloat16" if GPU else "float32", "of ours and of diffusers', by autocast"),
            "--memory": number(1, "peaks for so many images, too") | {"nargs": "+", "default": [], "metavar": "N"},
            **COMPILE,
            "--trace": {
                "metavar": "FILE",
                "help": "write a trace of ours by torch.profiler, and print what takes most",
            },
            "--steps": number(10, "in each repeat"),
            **REPEATS,
        },
    ),
    attention: (
        "whether heads of 72 channels are faster padded, by backend",
        {
            "--batch-size": number(4, "images"),
            "--heads": number(16, "of DiT-XL"),
            "--tokens": number(256, "of an image"),
            **STEPPED,
        },
    ),
    sample: (
        "from labels to pixels, with guidance",
        {
            "overrides": words("of experiment=imagenet256_dit_s_2, like model=dit_b_2"),
            "--against": against("diffusers"),
            "--images": number(2, "drawn at once"),
            "--steps": number(20, "of the sampler"),
            "--scale": number(4.0, "of the guidance"),
            **precision("float32", "of networks: ours by autocast, the pipeline as it comes, and all of it so"),
            "--interval": {
                "default": "[0.08,0.47]",
                "help": "the times t at which the last row is guided; by default where sigma / alpha of the linear "
                "schedule is in (0.28, 2.9], the interval that arXiv:2404.07724 gives EDM2",
            },
            "--samplers": {"nargs": "+", "default": [], "help": "a table of ours, too, by sampler, steps and guidance"},
            "--table-steps": number(20, "of the table") | {"nargs": "+", "default": [10, 20]},
            **COMPILE,
            **REPEATS,
        },
    ),
    data: (
        "samples a second; going on at a step",
        {"--against": against("webdataset"), "--samples": number(8000, "in the shards"), **REPEATS},
    ),
    wait: (
        "what steps of a fast GPU wait for latents of local shards",
        {
            "--rate": number(700.0, "images a second of the GPU, which a sleep stands for"),
            "--batch-size": number(256, "images of a step"),
            "--steps": number(60, "that are timed"),
            "--samples": number(4096, "in the shards"),
            "--workers": number(2, "that read"),
        },
    ),
    ema: ("what averaging the weights adds to a training step", {"--against": against(*PEERS), **IN_A_STEP}),
    guard: ("what watching over the gradients adds to a training step", IN_A_STEP),
    memory: (
        "bytes of a rank under FSDP2, beside one process's and the predicted",
        {
            "overrides": words(OF_A_RECIPE, "model=dit_b_2"),
            "--processes": number(4, "of FSDP2"),
            "--batch-size": number(2, "images of each"),
        },
    ),
    communication: (
        "what processes send each other in a step, by strategy, and for how long",
        {
            "overrides": words(OF_A_RECIPE, "model=dit_b_2"),
            "--processes": number(2, "of this machine, each with a GPU if there are any"),
            "--batch-size": number(2, "images of each"),
            **REPEATS,
        },
    ),
    checkpoint: (
        "for how long a save holds training up, beside it and not",
        {
            "--folder": {"help": "in which a temporary one is made; None: the system's"},
            "--steps": number(200, "of a small network, that are timed alone"),
            **REPEATS,
        },
    ),
    overhead: (
        "what a run does beside forward, backward and optimizer, of a step",
        {
            "overrides": words("of experiment=imagenet256_dit_b_2, like model=dit_s_2"),
            "--batch-size": number(8, "images of a step"),
            "--steps": number(6, "that are timed"),
            "--warm": number(1, "steps before these"),
        },
    ),
    curves: (
        "losses of training, before and after each optimization; exit code 1 if one is too far",
        {
            "overrides": words("of dit train, which replace this", "experiment=digits"),
            "--steps": number(300, "of each training"),
        },
    ),
    startup: ("how long commands take to begin, and training to its first step", REPEATS),
    goodput: (
        "what is left of a run's time when faults befall it",
        {
            "overrides": words("of the digits' recipe, as for dit train"),
            "--minutes": number(30.0, "from the first start to the end"),
            "--faults": number(3, "at even times"),
        },
    ),
}


if __name__ == "__main__":
    main()
