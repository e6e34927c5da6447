"""What a recipe costs, counted without computing anything: operations, and the memory of a training step."""

import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from dit.train.build import Parts, build
from dit.train.strategy import arrange


class Memory(NamedTuple):
    """Of a training step, in bytes, where its parts are alive at the same time."""

    parameters: int
    gradients: int
    optimizer: int  # its state
    ema: int
    copies: int  # of the parameters in bfloat16, kept for the backward pass
    activations: int  # kept for the backward pass, of all images
    passing: int  # the most that comes and goes besides: recomputed activations, gradients of activations

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self)


def multiply_adds(parts: Parts) -> int:
    """Of the network's matrix products and convolutions, for one image forward; the FLOPs are twice as many."""
    network = parts.denoiser("meta").network
    inputs, cond = _inputs(parts, 1, "meta")
    with FlopCounterMode(display=False) as counter:
        network(*inputs, **cond)
    return counter.get_total_flops() // 2


def memory(parts: Parts, batch_size: int) -> Memory:
    """Of a training step with so many images at a time, measured with tensors that have sizes but no contents.

    They stand for those of a CPU, whose fused attention keeps what that of a GPU keeps. With
    trainer.precision=bf16-mixed autocast is the CPU's, but normalizations are in float32, as on a GPU.
    trainer.activation_checkpointing is honoured; trainer.compile is not, which would keep less.
    """
    options = parts.cfg.trainer
    network = parts.denoiser("meta").network
    with FakeTensorMode(), _Alive() as alive:
        network._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device="cpu"))
        arrange(network, checkpointing=options.activation_checkpointing)
        parameters = alive.bytes
        average = build(parts.cfg.ema)(dict(network.named_parameters()))
        ema = alive.bytes - parameters
        trained = [p for p in network.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.empty_like(p)
        gradients = alive.bytes - ema - parameters
        stepped = build(parts.cfg.optimizer)(trained)
        stepped.step()
        state = alive.bytes - gradients - ema - parameters
        once, passing = _pass(alive, network, parts, batch_size)
        twice, _ = _pass(alive, network, parts, 2 * batch_size)
        del average, stepped
    activations = twice - once
    return Memory(parameters, gradients, state, ema, once - activations, activations, passing)


def _pass(alive: "_Alive", network: nn.Module, parts: Parts, batch_size: int) -> tuple[int, int]:
    """Forward and backward: the bytes kept in between, and the most that there are besides."""
    mixed = parts.cfg.trainer.precision == "bf16-mixed"
    autocast: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    gc.collect()
    before = alive.most = alive.bytes
    inputs, cond = _inputs(parts, batch_size, "cpu")
    with _Norms() if mixed else nullcontext():
        with autocast:
            loss = network(*inputs, **cond).float().square().mean()
        gc.collect()
        kept = alive.bytes - before
        loss.backward()
    return kept, alive.most - before - kept


def _inputs(parts: Parts, batch_size: int, device: str) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
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


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made within and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
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
