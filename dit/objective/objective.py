"""The interface of a training objective."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from dit.noise.draw import Draw


class Batch(NamedTuple):
    """What an objective is given at one step."""

    x0: Tensor  # (B, C, H, W)
    cond: dict[str, Tensor]  # the network's keyword arguments, each (B, ...)
    draw: Draw  # the step's random numbers
    # A profile of the moving average -> for the length of a `with`, the network has its weights; None: its own.
    lent: Callable[[str | None], AbstractContextManager[Any]] = nullcontext
    eps: Tensor | None = None  # of pairs: the noise that leads to x0, (B, C, H, W)


class Objective(nn.Module, ABC):
    """A training objective: in one or several phases a step, the network to update and its loss.

    What is trained is a `Denoiser`, or something else with a `network`.

    Attributes:
        paired: whether it learns from pairs, of which it reads `Batch.eps`.
    """

    paired: bool = False

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Those parts of the objective, by name, that have optimizers of their own, such as a discriminator.

        What else the objective learns shares the optimizer of the denoiser, which is the network named `denoiser`.
        """
        return {}

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profiles of the moving average that it borrows, through `Batch.lent`, before it calls for a gradient."""
        return ()

    def check(self, denoiser: Any) -> None:
        """Refuse, before anything is trained, a denoiser that cannot be trained so.

        Args:
            denoiser: on the meta device.

        Raises:
            ValueError: with the way out.
        """

    @abstractmethod
    def phases(self, denoiser: Any, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (network, loss), loss (): the trainer takes an optimizer step on that network after each.

        Gradients that a loss leaves on other networks are dropped. A phase may rely on the step of the phase before it.
        Each loss is a mean over the batch, so that the mean over micro-batches is the loss of the whole.
        """
