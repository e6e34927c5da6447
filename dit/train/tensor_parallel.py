"""Tensor parallelism of the DiT's blocks: each device has some of the heads and some of the MLP's width.

Queries, keys, values and the first MLP layers are divided by columns, the layers behind them by rows, so that a block
talks twice forward and twice backward (arXiv:1909.08053, section 3). Everything else is the same on all devices, of
which each computes it: where kernels of a GPU are not deterministic, such copies may come to differ in their last bits.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

# Layers by their names in a block; of those divided by columns, how many matrices stand one above the other; of norms,
# the dimension of the heads in what they are given.
COLUMNS = {"attn.qkv": 3, "mlp.fc1": 1, "mlp.w12": 2, "cross_attn.q_linear": 1, "cross_attn.kv_linear": 2}
ROWS = ("attn.proj", "mlp.fc2", "mlp.w3", "cross_attn.proj")
HEADS = {"attn.q_norm": 1, "attn.k_norm": 1}


def check(network: nn.Module, size: int) -> None:
    """See whether a network can be divided among so many devices.

    Raises:
        ValueError: if not, with the way out.
    """
    units = units_of(network)
    known = {name for unit in units for name, _ in unit.named_modules()}
    if not known & set(COLUMNS):
        raise ValueError(
            f"trainer.tensor_parallel_size={size}: model {type(network).__name__} has no blocks that can be divided; "
            "choose trainer=fsdp"
        )
    for unit in units:
        for name, module in unit.named_modules():
            if name in (*COLUMNS, *ROWS) and not isinstance(module, nn.Linear):
                raise ValueError(
                    f"trainer.tensor_parallel_size={size} divides the layer {name}, but not with its adapter: choose "
                    "trainer=fsdp, or adapter=none"
                )
            if name in COLUMNS:
                heads = getattr(unit.get_submodule(name.partition(".")[0]), "num_heads", None)
                parts = heads or module.out_features // COLUMNS[name]
                if parts % size:
                    what = f"model.num_heads={heads}" if heads else f"the width {parts} of {name} (model.mlp_ratio)"
                    raise ValueError(f"trainer.tensor_parallel_size={size} does not divide {what}")


def divide(network: nn.Module, mesh: DeviceMesh) -> dict[str, int]:
    """Divide a network's units in place.

    Args:
        network: on the meta device, with `units`.
        mesh: of one dimension.

    Returns:
        The parameters whose rows are those of several matrices one above the other, and how many: each device has its
        rows of each, so that the rows of all devices one after the other are in another order.
    """
    stacked: dict[str, int] = {}
    names = {module: name for name, module in network.named_modules()}
    for unit in units_of(network):
        plan: dict[str, ParallelStyle] = {}
        for name, module in unit.named_modules():
            if name in COLUMNS:
                plan[name] = ColwiseParallel()
                if COLUMNS[name] > 1:
                    stacked |= {f"{names[unit]}.{name}.{p}": COLUMNS[name] for p, _ in module.named_parameters()}
            elif name in ROWS:
                plan[name] = RowwiseParallel()
            elif name in HEADS and any(True for _ in module.parameters()):
                plan[name] = SequenceParallel(sequence_dim=HEADS[name], use_local_output=True)
            if isinstance(heads := getattr(module, "num_heads", None), int):
                module.num_heads = heads // mesh.size()
        parallelize_module(unit, mesh, plan)
    return stacked


def order(rows: int, matrices: int, size: int) -> torch.Tensor:
    """Which row of the matrices one above the other stands where, when each of `size` devices has its rows of each."""
    return torch.arange(rows).view(matrices, size, -1).transpose(0, 1).flatten()


def units_of(network: nn.Module) -> list[Any]:
    """The modules that a network names its units."""
    units: Any = getattr(network, "units", ())
    return [module for module in network.modules() if isinstance(module, units)]
