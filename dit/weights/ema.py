"""Moving averages of weights, each where its weights are: of a shard, the average is a shard."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Profile = Callable[[int], float]  # optimizer step (1, 2, ...) -> the share of the average that it keeps

OTHERS = ("model", "optimizer", "objective")  # what a checkpoint has beside the averages, by these names
MOST_STD = 0.288  # that of the even average of all weights is 12 ** -0.5


def exponential(decay: float = 0.9999, warmup: bool = False) -> Profile:
    """The same share at every step: weights that are n steps old count decay^n.

    Args:
        decay: in [0, 1); 0.9999 remembers about 10,000 steps.
        warmup: begin with the shorter memory (1 + step) / (10 + step) until decay is reached.

    Raises:
        ValueError: if decay is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema.decay={decay} must lie in [0, 1), like 0.9999")
    return lambda step: min(decay, (1 + step) / (10 + step)) if warmup else decay


def power(std: float) -> Profile:
    """(1 - 1 / t)^(gamma + 1): weights of step i count i^gamma after any number of steps (arXiv:2312.02696, section 3).

    The memory grows with the training, and is always the same share of it; the first weights count nothing.

    Args:
        std: the width of that share, relative to the length of training, in (0, 0.288], like 0.05 or 0.10; sigma_rel in
            the paper.

    Raises:
        ValueError: if std is outside.
    """
    gamma = exponent(std)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def held(every_steps: int) -> Profile:
    """The weights as they were after the newest step that is a multiple of every_steps, and before it as they began.

    Raises:
        ValueError: if that is less than 1.
    """
    if every_steps < 1:
        raise ValueError(f"ema: held every_steps={every_steps} must be at least 1")
    return lambda step: float(step % every_steps != 0)


def exponent(std: float) -> float:
    """The gamma of i^gamma with a relative standard deviation std (arXiv:2312.02696, algorithm 2).

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma.

    Raises:
        ValueError: if std is outside (0, 0.288].
    """
    if not 0 < std <= MOST_STD:
        raise ValueError(f"std={std} of a power profile of ema must lie in (0, {MOST_STD}], like 0.10")
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


class EMA:
    """average <- share average + (1 - share) weights, for each profile, in float32, begun as a copy.

    Args:
        parameters: by name: plain tensors, DTensors, whose averages are DTensors of the same mesh and placements, or
            partitions. Only what this process has of them is read and written, and nothing is communicated.
        profiles: by name; the first is the default.
        device: `cpu` keeps the averages there, pinned where the parameters are on a GPU; None: beside the parameters.
        settings: what else stands in conf/ema, to which profiles refer, or which checkpoints read.

    Raises:
        ValueError: if there is no profile, a name will not do, or the device is another.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        profiles: Mapping[str, Profile],
        device: str | None = None,
        **settings: Any,
    ):
        if device not in (None, "cpu"):
            raise ValueError(f"ema.device={device}: choose null, where the parameters are, or cpu")
        if not profiles:
            raise ValueError("ema.profiles is empty: name at least one, like ema=exponential does")
        for name in profiles:
            if not name.isidentifier() or name in OTHERS:
                raise ValueError(f"ema.profiles.{name}: a checkpoint cannot have an average of that name, take another")
        self.parameters = dict(parameters)
        self.profiles = dict(profiles)
        self.averages = {
            profile: {name: _copy(p, device) for name, p in self.parameters.items()} for profile in self.profiles
        }

    @torch.no_grad()
    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Take in the weights after optimizer step `step` (1, 2, ...).

        Args:
            step: finished optimizer steps.
            applied: whether that step was taken, (), bool, or else averages stay as they are; a GPU is not waited for.
        """
        weights = None
        for profile, keeps in self.profiles.items():
            if (share := keeps(step)) == 1:
                continue
            averages = _local(self.averages[profile])
            if share == 0:  # taken or not
                torch._foreach_copy_(averages, _local(self.parameters))
            elif applied is None or not (applied.is_cuda and all(average.is_cuda for average in averages)):
                if applied is not None and not applied:
                    continue
                weights = weights or _fetched(_local(self.parameters), averages)
                torch._foreach_lerp_(averages, weights, 1 - share)
            else:  # lerp wants its weight on the CPU
                changes = torch._foreach_sub(_local(self.parameters), averages)
                torch._foreach_mul_(changes, applied * (1 - share))
                torch._foreach_add_(averages, changes)

    @contextmanager
    @torch.no_grad()
    def applied(self, profile: str | None = None) -> Iterator[None]:
        """For the length of a `with`, the network has the averaged weights of a profile, by default of the first.

        Under FSDP2 nothing may be gathered when the weights change, here and afterwards: it stays as it was.
        """
        weights = [p.clone() for p in _local(self.parameters)]
        torch._foreach_copy_(_local(self.parameters), _local(self.averages[profile or next(iter(self.profiles))]))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(_local(self.parameters), weights)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this process has of them; asked anew each time, as sharding may move it."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors.values()]


def _copy(parameter: Tensor, device: str | None) -> Tensor:
    """A tensor of the same kind, in float32, on a device."""
    copy = parameter.detach().to(device=device or parameter.device, dtype=torch.float32, copy=True)
    if device == "cpu" and parameter.is_cuda:
        if isinstance(copy, DTensor):  # which knows no pin_memory()
            copy._local_tensor = copy._local_tensor.pin_memory()
        else:
            copy = copy.pin_memory()
    return copy


def _fetched(weights: Sequence[Tensor], averages: Sequence[Tensor]) -> list[Tensor]:
    """The weights in float32, where the averages are."""
    if all(w.device == a.device for w, a in zip(weights, averages, strict=True)):
        return [w.float() for w in weights]
    there = [torch.empty_like(a, pin_memory=True) for a in averages]
    for mine, w in zip(there, weights, strict=True):
        mine.copy_(w, non_blocking=True)
    torch.cuda.synchronize()
    return there
