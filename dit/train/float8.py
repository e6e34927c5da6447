"""Matrix products in float8 (arXiv:2209.05433), by torchao, which is an optional dependency.

Weights, optimizer, averages and checkpoints stay what they are, under their names: a layer scales and rounds its input,
its weight and the gradient of its output anew at each product, each tensor by one factor (tensorwise, dynamic).
"""

from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from dit.train.tensor_parallel import COLUMNS, ROWS, units_of

LEAST_CAPABILITY = (8, 9)  # of CUDA, whose tensor cores multiply float8: Ada, Hopper and later
# The time of products grows with both widths, that of scaling and rounding with one. By an H100's data sheet (989 and
# 1,979 TFLOP/s; 3.35 TB/s, at 3 to 5 bytes a number) square layers gain from about 900 to 1,500 on. Not yet run.
LEAST_WIDTH = 1024
MULTIPLE = 16  # of widths, as kernels want it


def check(options: DictConfig) -> None:
    """Refuse what cannot be, or would be slower than without.

    Args:
        options: the node `trainer`, settled.

    Raises:
        ValueError: with the reason and the way out.
        ImportError: if torchao is missing.
    """
    if options.float8 == "none":
        return
    asked = f"trainer.float8={options.float8}"
    if options.strategy.startswith("zero") or options.tensor_parallel_size > 1:
        other = f"tensor_parallel_size={options.tensor_parallel_size}"
        other = other if options.tensor_parallel_size > 1 else f"strategy={options.strategy}"
        raise ValueError(f"{asked} does not go with trainer.{other}: choose trainer=ddp or trainer=fsdp")
    if options.float8 == "tensorwise":
        instead = "take trainer.float8=none, or emulate, which shows on any device what becomes of the loss"
        least = ".".join(map(str, LEAST_CAPABILITY))
        if options.accelerator == "cpu":
            raise ValueError(f"{asked} needs a GPU, but trainer.accelerator=cpu: {instead}")
        if torch.cuda.is_available() and (has := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
            has_not = f"{torch.cuda.get_device_name()} has {has[0]}.{has[1]}"
            raise ValueError(f"{asked} needs a GPU of compute capability {least} or more, but {has_not}: {instead}")
        if options.precision == "32-true":
            raise ValueError(f"{asked} is for trainer.precision=bf16-mixed, not 32-true: {instead}")
        if not options.compile:
            raise ValueError(f"{asked} is slower than without, unless compiled: give trainer.compile=true, too")
    if find_spec("torchao") is None:
        raise ImportError(f"{asked} needs torchao: pip install 'ditforge[float8]'")


def convert(network: nn.Module, *, emulate: bool) -> None:
    """Let the large layers of a network's units multiply in float8, in place.

    These are its layers for tokens; those that read the condition have as few rows as there are images.

    Args:
        network: with `units`, on any device, meta included.
        emulate: round as float8 does, but multiply in float32, on any device; layers of any width.

    Raises:
        ValueError: if there is no such layer.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    least = MULTIPLE if emulate else LEAST_WIDTH
    layers = {
        layer
        for unit in units_of(network)
        for name, layer in unit.named_modules()
        if name in (*COLUMNS, *ROWS) and _is_large(layer, least)
    }
    if not layers:
        asked = f"trainer.float8={'emulate' if emulate else 'tensorwise'}"
        raise ValueError(
            f"{asked}: {type(network).__name__} has no trained layer for tokens (an adapter freezes them) with at "
            f"least {least} features in and out, in multiples of {MULTIPLE}: take trainer.float8=none"
        )
    convert_to_float8_training(
        network,
        module_filter_fn=lambda module, _: module in layers,
        config=Float8LinearConfig(emulate=emulate, pad_inner_dim=True),  # the number of tokens may be no multiple
    )


def _is_large(layer: Any, least: int) -> bool:
    return (
        isinstance(layer, nn.Linear)
        and layer.weight.requires_grad
        and all(size % MULTIPLE == 0 and size >= least for size in layer.weight.shape)
    )
