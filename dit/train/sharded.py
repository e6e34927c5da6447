"""Fully sharded data parallel (FSDP2), with tensor parallelism if asked for."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dit.train import tensor_parallel
from dit.train.strategy import Strategy
from dit.train.world import World


class Sharded(Strategy):
    """Each device keeps a share of every parameter, gradient, average and optimizer state.

    arXiv:1910.02054, 2304.11277. The network's units are gathered one after the other, forward and backward. With
    trainer.shard=node the shares are those of one node's devices, and nodes average their gradients (HSDP). With
    trainer.tensor_parallel_size=T, T devices beside each other see the same images and divide the work in each block.

    In mixed precision the units are gathered in bfloat16; gradients are summed, and everything is kept, in float32.

    With trainer.reshard_after_forward=false what is gathered forward is kept for the backward pass. It is given back
    where the weights behind it change: otherwise that would not be seen. While a unit computes, the next
    trainer.prefetch_units are gathered, backward those before it; with 0 forward only what the host has come to.
    """

    needs_group = True

    def __init__(self, options: DictConfig, world: World, device: torch.device):
        super().__init__(options, world, device)
        tensor = options.tensor_parallel_size
        sharded = world.local_size // tensor if options.shard == "node" else self.data_size
        names = ("replicate", "shard", "tensor")
        self.mesh = init_device_mesh(device.type, (self.data_size // sharded, sharded, tensor), mesh_dim_names=names)
        self._data_mesh = self.mesh["replicate", "shard"] if self.data_size > sharded else self.mesh["shard"]
        self._data = None
        if tensor > 1:  # those of the same place within their blocks
            for first in range(tensor):
                group = dist.new_group(list(range(first, world.size, tensor)))
                self._data = group if world.rank % tensor == first else self._data
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(
                logging.ERROR
            )  # norms, one after another
        self._stacked: dict[str, int] = {}
        self._kept: list[Any] = []  # modules whose weights may stay gathered

    @classmethod
    def check(cls, options: DictConfig, denoiser: Any, objective: nn.Module) -> None:
        """Refuse networks that name no units, and sizes that do not divide them."""
        if not getattr(denoiser.network, "units", ()):
            raise ValueError(
                f"trainer.strategy=fsdp: model {type(denoiser.network).__name__} names no units to shard; choose "
                "trainer=ddp"
            )
        if (size := options.tensor_parallel_size) > 1:
            tensor_parallel.check(denoiser.network, size)

    def divide(self, network: nn.Module) -> None:
        """Divide the units by DTensor plans."""
        if self.options.tensor_parallel_size > 1:
            self._stacked = tensor_parallel.divide(network, self.mesh["tensor"])

    def shard(self, network: nn.Module) -> None:
        """Divide all parameters, unit by unit; what is outside of units forms one of its own."""
        mixed, reshard = self.options.precision == "bf16-mixed", self.options.reshard_after_forward
        within = MixedPrecisionPolicy(torch.bfloat16 if mixed else None, torch.float32, cast_forward_inputs=False)
        units = tensor_parallel.units_of(network)
        for module in units:
            fully_shard(module, mesh=self._data_mesh, mp_policy=within, reshard_after_forward=reshard)
        # Embeddings stay in float32: bfloat16 does not tell times 999 and 1000 apart.
        whole = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(network, mesh=self._data_mesh, mp_policy=whole, reshard_after_forward=reshard)
        ahead = self.options.prefetch_units
        self._kept = [*units, network] if ahead or not reshard else []
        if ahead:
            for i, module in enumerate(units):
                module.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + ahead])
                module.set_modules_to_backward_prefetch(units[max(0, i - ahead) : i][::-1])

    def step(self, network: str, allows: Callable[[str, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """As without shares; what was gathered of the weights before, and not used backward, is given back."""
        stepped = super().step(network, allows)
        self._reshard()
        return stepped

    @contextmanager
    def lent(self, module: Any, profile: str | None = None) -> Iterator[None]:
        """For the length of a `with`, the network has averaged weights, also where it keeps what it has gathered."""
        self._reshard()
        with super().lent(module, profile):
            try:
                yield
            finally:
                self._reshard()

    def _reshard(self) -> None:
        """Give back what is gathered; where each forward does so itself, there is nothing."""
        for module in self._kept:
            module.reshard()

    def draw(self, network: nn.Module, seed: int) -> None:
        """As on a single device; rows of matrices one above the other are then brought to their devices."""
        super().draw(network, seed)
        for name, p in network.named_parameters():
            if name in self._stacked and isinstance(p, DTensor):
                self.put(p, p.full_tensor().detach(), name)

    def neutral(self, name: str, value: Tensor) -> Tensor:
        """The rows of matrices one above the other in their own order, gathered; all else as it is."""
        if (rows := self._order(name, value)) is None:
            return value
        assert isinstance(value, DTensor)
        return value.full_tensor()[rows.argsort()]

    def put(self, tensor: Tensor, whole: Tensor, name: str) -> None:
        """Copy this process's part of a full tensor."""
        if (rows := self._order(name, tensor)) is not None:
            whole = whole[rows]
        super().put(tensor, whole, name)

    def _order(self, name: str, value: Tensor) -> Tensor | None:
        """In which order the rows of such matrices, and of what belongs to them, stand."""
        matrices = next((self._stacked[n] for n in (name, name.rpartition("/")[0]) if n in self._stacked), None)
        if matrices is None or value.ndim == 0:
            return None
        return tensor_parallel.order(len(value), matrices, self.options.tensor_parallel_size)

    def _data_group(self) -> Any:
        return self._data
