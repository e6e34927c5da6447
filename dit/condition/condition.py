"""The interface of a condition."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Pictures in [-1, 1], (B, C, H, W), and a generator -> what the network sees, (B, c, h, w): a latent space's encoder.
Encode = Callable[[Tensor, torch.Generator], Tensor]


class Condition(ABC):
    """From what is asked for to the keyword arguments `cond` of the network, each with leading dimension B.

    `fields` are those of the data's samples that are read in training; `asks` what one may ask for when sampling.
    `draw` has keyed random numbers for a batch, `dit.noise.draw.Draw`.
    """

    fields: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    dropout: float = 0.0  # probability that a training sample is told nothing, for classifier-free guidance

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """What a network is built with to be told this, such as {"num_classes": 10}."""

    def check(self, sample: Mapping[str, Any] | None) -> None:
        """See, before a device is touched, whether what is needed for training is there.

        Args:
            sample: a batch of one of the data; None if there are none yet.

        Raises:
            ValueError: if not.
            ImportError: if an optional dependency is missing.
        """
        return None

    def asked(self, batch: Mapping[str, Any], draw: Any) -> Mapping[str, Any]:
        """What a user would ask for to get the images of a batch."""
        return batch

    @abstractmethod
    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """`cond` of what is asked for, on the device of `draw`.

        Raises:
            ValueError: if it cannot be asked for.
        """

    def part(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """`cond` of what is asked for, as far as it is."""
        return self(asked, draw, encode) if set(self.asks) <= asked.keys() else {}

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`cond` of the same shapes in which this says nothing: the other half of guidance; refused unless overridden.

        Raises:
            ValueError: if there is no such thing; asked of an empty `cond`, too, so that it is known beforehand.
        """
        name = type(self).__name__.lower()
        raise ValueError(f"condition={name} cannot be left out, so that it cannot guide: take guidance.scale=1")

    def augment(self, cond: Mapping[str, Tensor], draw: Any) -> dict[str, Tensor]:
        """`cond` as it is in training: some rows told nothing, pictures noised; unless overridden, as it is."""
        return dict(cond)


def check_pictures(name: str, value: Any, dtype: torch.dtype, shape: str) -> None:
    """See that what is asked for are pictures.

    Args:
        name: of what is asked for.
        value: what it is.
        dtype: of pictures.
        shape: theirs, in words, like (N, C, H, W).

    Raises:
        ValueError: if they are none.
    """
    if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != shape.count(",") + 1:
        had = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:100]
        raise ValueError(f"{name}={had}: give pictures as a tensor, {dtype} {shape}")


def check_dropout(dropout: float) -> float:
    """A probability.

    Raises:
        ValueError: if it is none.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"condition.dropout={dropout} is a probability: it must lie in [0, 1]")
    return dropout


def check_learned(dropout: float) -> None:
    """Whether the network ever learns what it means to be told nothing, and something.

    Raises:
        ValueError: if not.
    """
    if dropout == 0:
        raise ValueError(
            "condition.dropout=0: what the network says when it is told nothing is not learned, so that it cannot "
            "guide; take guidance.scale=1, or train with condition.dropout=0.1"
        )
    if dropout == 1:
        raise ValueError(
            "condition.dropout=1: the network is never told anything, so that there is nothing to guide by; take "
            "guidance.scale=1, or train with condition.dropout=0.1"
        )
