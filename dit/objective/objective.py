"""The interface of a training objective."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class FewStep(NamedTuple):
    """How a student is drawn, since it can be drawn in no other way."""

    method: str
    sampler: str | None  # of conf/sampler; None: any
    steps: Sequence[int] | None  # the numbers of steps that it can take; None: any
    guidance: float | Sequence[float]  # the scale that it has for good, 1: none; or the first and last it may be told

    def takes(self, num_steps: int) -> bool:
        """Whether it can be drawn in so many steps."""
        return self.steps is None or num_steps in self.steps

    def nearest(self, num_steps: int) -> int:
        """A number of steps that it can take."""
        return num_steps if self.steps is None else min(self.steps, key=lambda n: abs(n - num_steps))


class Objective(nn.Module, ABC):
    """A training objective: in one or several phases a step, the network to update and its loss.

    What is trained is a `Denoiser`, or something else with a `network`.

    Attributes:
        every: the denoiser has a phase in the last of each so many steps, and none in the others.
        paired: whether it learns from pairs, of which it reads `Batch.eps`.
        least_rows: the fewest samples that a lane must have.
    """

    every: int = 1
    paired: bool = False
    least_rows: int = 1

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Those parts of the objective, by name, that have optimizers of their own, such as a discriminator.

        What else the objective learns shares the optimizer of the denoiser, which is the network named `denoiser`.
        """
        return {}

    @property
    def rates(self) -> Mapping[str, float]:
        """The learning rates of those networks over that of the denoiser; 1 of those that are not named."""
        return {}

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profiles of the moving average that it borrows, through `Batch.lent`, before it calls for a gradient."""
        return ()

    def few_step(self, step: int | None = None) -> FewStep | None:
        """How a network is drawn that it has taught for so many steps, None: to the end; None: as any denoiser."""
        return None

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
