"""What a recipe costs, counted without computing anything: operations, and the memory of a training step."""

import gc
import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from dit.train import tensor_parallel
from dit.train.build import Parts, build
from dit.train.execution import arrange
from dit.train.strategy import trained
from dit.train.tensor_parallel import check, units_of

# How tensor parallelism splits the linear layers of a unit, by their names in it: 0 the rows of the weight, which are
# outputs, 1 its columns, which are inputs. The sum over the ranks of what the latter give is the layer's output.
SPLIT = dict.fromkeys(tensor_parallel.COLUMNS, 0) | dict.fromkeys(tensor_parallel.ROWS, 1)


class States(NamedTuple):
    """What a rank keeps from step to step, in bytes; and its gradients."""

    parameters: int
    gradients: int
    optimizer: int  # its state
    ema: int


class Passes(NamedTuple):
    """What a forward and a backward pass need besides, in bytes."""

    copies: int  # of the parameters in bfloat16, kept for the backward pass
    activations: int  # kept for the backward pass, of all images
    passing: int  # the most that comes and goes besides: recomputed activations, gradients of activations


class Memory(NamedTuple):
    """Of a training step, in bytes, where its parts are alive at the same time."""

    parameters: int
    gradients: int
    optimizer: int  # its state
    ema: int
    copies: int  # of the parameters in bfloat16, kept for the backward pass
    activations: int  # kept for the backward pass, of all images
    passing: int  # the most that comes and goes besides: recomputed activations, gradients of activations
    gathered: int = 0  # the most that there is at a time of other ranks' parameters, and of gradients on their way

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self)


def multiply_adds(parts: Parts) -> int:
    """Of the network's matrix products and convolutions, for one image forward; the FLOPs are twice as many."""
    network = parts.denoiser("meta").network
    inputs, cond = inputs_of(parts, 1, "meta")
    with FlopCounterMode(display=False) as counter:
        network(*inputs, **cond)
    return counter.get_total_flops() // 2


def memory(parts: Parts, batch_size: int) -> Memory:
    """Of a training step on one device with so many images at a time: its `states` and its `passes`."""
    return Memory(*states(parts), *passes(parts, batch_size))


def states(parts: Parts, shards: int = 1, *, flat: bool = False, tensor_parallel: int = 1) -> States:
    """Of the first of the ranks among which parameters are sharded; no rank has more.

    The optimizer and the average are the configured ones, made of tensors that have the sizes of the rank's, but no
    contents. The optimizer has taken a step.

    Args:
        parts: of the recipe.
        shards: the number of ranks that share each parameter.
        flat: a parameter is shared as a row of numbers, as DeepSpeed does, and not along its first dimension, as FSDP2.
        tensor_parallel: the number of ranks that share the layers of `SPLIT` before that.

    Raises:
        ValueError: if the network cannot be split so.
    """
    network = split(parts, tensor_parallel)
    held = {id(p): shard(p.shape, shards, flat) for p in network.parameters()}
    with FakeTensorMode(), Alive() as alive:
        network._apply(lambda t: torch.empty(held.get(id(t), t.shape), dtype=t.dtype, device="cpu"))
        parameters = alive.bytes
        average = build(parts.cfg.ema)(trained(network))
        ema = alive.bytes - parameters
        learned = list(trained(network).values())
        for p in learned:
            p.grad = torch.empty_like(p)
        gradients = alive.bytes - ema - parameters
        stepped = build(parts.cfg.optimizer)(learned)
        stepped.step()
        state = alive.bytes - gradients - ema - parameters
        del average, stepped
    return States(parameters, gradients, state, ema)


def shard(shape: Sequence[int], shards: int, flat: bool = False) -> tuple[int, ...]:
    """The first rank's part of a parameter: the chunks of torch.chunk are as large as it, or smaller, or empty."""
    if shards == 1:
        return tuple(shape)
    if flat:
        return (-(-math.prod(shape) // shards),)
    return (-(-shape[0] // shards), *shape[1:])


def split(parts: Parts, size: int) -> Any:
    """The network on the meta device; with tensor parallelism of a size what the first rank has of it.

    Raises:
        ValueError: if it cannot be split so.
    """
    network: Any = parts.learner("meta").network
    if size == 1:
        return network
    check(network, size)
    for unit in units_of(network):
        for name, layer in unit.named_modules():
            if (heads := getattr(layer, "num_heads", None)) is not None:
                layer.num_heads = heads // size
            if (dim := SPLIT.get(name)) is None:
                continue
            sizes = list(layer.weight.shape)
            sizes[dim] //= size
            layer.weight = nn.Parameter(layer.weight.new_empty(sizes))
            if dim == 0 and layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.new_empty(sizes[:1]))
    return network


def passes(parts: Parts, batch_size: int, tensor_parallel: int = 1) -> Passes:
    """Of so many images at a time, measured with tensors that have sizes but no contents.

    They stand for those of a CPU, whose fused attention keeps what that of a GPU keeps. With
    trainer.precision=bf16-mixed autocast is the CPU's, but normalizations are in float32, as on a GPU.
    trainer.activation_checkpointing is honoured; trainer.compile is not, which would keep less.

    Raises:
        ValueError: if the network cannot be split among so many ranks of tensor parallelism.
    """
    network = split(parts, tensor_parallel)
    with FakeTensorMode(), Alive() as alive:
        network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        arrange(network, checkpointing=parts.cfg.trainer.activation_checkpointing)
        for p in network.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p)  # so that no pass makes them
        with _Narrow() if tensor_parallel > 1 else nullcontext():
            once, passing = _pass(alive, network, parts, batch_size)
            twice, _ = _pass(alive, network, parts, 2 * batch_size)
    activations = twice - once
    return Passes(once - activations, activations, passing)


def _pass(alive: "Alive", network: nn.Module, parts: Parts, batch_size: int) -> tuple[int, int]:
    """Forward and backward: the bytes kept in between, and the most that there are besides."""
    mixed = parts.cfg.trainer.precision == "bf16-mixed"
    autocast: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    gc.collect()
    before = alive.most = alive.bytes
    inputs, cond = inputs_of(parts, batch_size, "cpu")
    with _Norms() if mixed else nullcontext():
        with autocast:
            loss = network(*inputs, **cond).float().square().mean()
        gc.collect()
        kept = alive.bytes - before
        loss.backward()
    return kept, alive.most - before - kept


def inputs_of(parts: Parts, batch_size: int, device: str) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """What the network is given, of the right sizes: x and time, and `cond`."""
    empty = partial(torch.empty, device=device)
    latent, told = parts.cfg.latent, parts.condition.sizes
    x = empty(batch_size, latent.channels, latent.size, latent.size)
    cond = {}
    if told.get("num_classes"):
        cond["label"] = empty(batch_size, dtype=torch.long)
    if told.get("text_width"):
        several = getattr(parts.condition, "conditions", {"text": parts.condition})
        [length] = [c.max_length for c in several.values() if "text_width" in c.sizes]
        cond["text"] = empty(batch_size, length, told["text_width"])
        cond["text_mask"] = empty(batch_size, length, dtype=torch.bool)
    if told.get("pooled_width"):
        cond["pooled"] = empty(batch_size, told["pooled_width"])
    if told.get("image_channels"):
        cond["image"] = empty(batch_size, told["image_channels"], latent.size, latent.size)
    return (x, empty(batch_size)), cond


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made within and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # the other has the global size
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self.bytes += storage.nbytes()
                self.most = max(self.most, self.bytes)
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        return result

    def _freed(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


class _Norms(TorchFunctionMode):
    """Normalizations in float32, as autocast has them on a GPU but not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class _Narrow(TorchFunctionMode):
    """Attention of some of the heads, whose outputs are narrower than a token, which it would reshape them to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.reshape and math.prod(args[1:]) > args[0].numel():
            args = (*args[:-1], -1)
        return func(*args, **(kwargs or {}))
