"""How a network is executed on its device: options beside the model, which knows nothing of them.

A network names the modules that are treated as one, its `units`; what is done to them is done in place, so that names
of parameters stay as they are. The order is: activation checkpointing, compile, CUDA graphs.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dit.train.graphed import Graphed

CHECKPOINTING = ("none", "full", "selective")
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # of our networks, that autocast takes in bfloat16


def arrange(
    network: nn.Module,
    *,
    checkpointing: str = "none",
    compile: bool = False,
    channels_last: bool = False,
    cuda_graphs: bool = False,
    frozen: bool = False,
    narrow: bool = False,
) -> None:
    """Set in place how a network is executed; what it computes stays the same, but for the rounding of `narrow`.

    Args:
        network: with `units`, a tuple of classes of modules.
        checkpointing: compute activations again in the backward pass instead of keeping them
            (arXiv:1604.06174): `full` keeps the input of each unit; `selective` keeps matrix products and attention,
            too, and computes the rest again.
        compile: each unit by torch.compile; or, where there is no GPU and weights are frozen, the network as one: it
            takes longer to compile, and spares what Python does at each unit.
        channels_last: store images with channels last, as convolutions of GPUs want them.
        cuda_graphs: on a GPU, without gradients, forwards are replayed as CUDA graphs.
        frozen: weights stay as they are; compiled code of AMD CPUs keeps a copy of them in an order of its own, and
            does not see what is written to them through `.data` or by numpy.
        narrow: weights of products are bfloat16 from now on, to which autocast, under which alone it then runs, would
            round them each time.

    Raises:
        ValueError: if there is no such choice, the network has no units, or nothing here compiles.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"trainer.activation_checkpointing={checkpointing}: choose one of {', '.join(CHECKPOINTING)}")
    units: Any = getattr(network, "units", ())
    if not units and (compile or checkpointing != "none"):
        option = "compile=true" if compile else f"activation_checkpointing={checkpointing}"
        raise ValueError(
            f"trainer.{option}: model {type(network).__name__} names no units to compile or to checkpoint; leave it out"
        )
    options = None
    if not torch.cuda.is_available():
        _keep_memory()
        if compile:
            _check_compiler()
            if _amd():
                from dit.train import products  # the compiler takes seconds to import

                options = products.options(frozen)
    if narrow:
        for module in network.modules():
            if isinstance(module, PRODUCTS):
                module.to(torch.bfloat16)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    of_units = [module for module in network.modules() if isinstance(module, units)]
    if checkpointing != "none":
        how: dict[str, Any] = {"use_reentrant": False}
        if checkpointing == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        for module in of_units:
            module.forward = _checkpointed(module.forward, how)
    if compile:
        as_one = frozen and not torch.cuda.is_available()
        for module in [network] if as_one else of_units:
            module.compile(dynamic=False, options=options)
        # Units of one class share their code, and each shape of theirs counts, as each of a network.
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    if cuda_graphs:
        network.forward = Graphed(network)


def _check_compiler() -> None:
    """Refuse where code for the CPU cannot be compiled."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("trainer.compile=true needs a C++ compiler: install g++, or name one by CXX=") from error


@cache
def _keep_memory() -> None:
    """Have glibc keep what tensors leave: else much of it goes back at each step, and is taken anew, page by page.

    Up to 2 GiB are kept at the end of the heap; tensors above 32 MiB go their own ways, as always. Measured:
    tools/benchmarks/train.md.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at the most that it takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, likewise


@cache
def _amd() -> bool:
    """Whether this is a CPU of AMD's, and torch has oneDNN."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and info.exists() and "AuthenticAMD" in info.read_text()


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:  # a function, as the compiler does not look into a partial
        return checkpoint(forward, *args, **options)

    return run


def _keep_products(context: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute."""
    return CheckpointPolicy.MUST_SAVE if operation in _dear() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _dear() -> set[Any]:
    """Asked of every operation of every forward."""
    aten = torch.ops.aten
    names = [
        "mm",
        "addmm",
        "_scaled_mm",
        "bmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ]
    return {getattr(aten, name).default for name in names if hasattr(aten, name)}
