"""Steps that would harm a run are left out, on the device and in all processes alike; reports come a step later."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

USUAL_STEPS = 100  # of which the usual gradient norm is a moving average, and before which there are no spikes
COUNTS = ("skipped", "in_a_row", "first_bad", "rollbacks", "rolled_to")
ADVICE = (  # of who has no way out but another run
    "skipped.jsonl names the samples; a run with a lower optimizer.lr, trainer.max_grad_norm=1 or "
    "trainer.precision=32-true may fare better"
)
LEAST_DEVIATION = 0.25  # of the logarithm of the norm, for runs whose norm hardly moves


class NumericError(RuntimeError):
    """A run whose numbers are broken, and that cannot be mended by leaving steps out."""

    exit_code = 5


class Bad(NamedTuple):
    """A step that was left out, as this process saw it."""

    step: int
    norm: float  # of the gradient of its first phase, the denoiser's if it had one
    loss: float
    keys: Sequence[str]  # of its samples


class Guard:
    """Says of each gradient whether it may be used, and counts those that may not.

    A gradient is not used if its norm is not finite, or is a spike: its logarithm lies so many standard deviations
    above its moving average, that of the last 100 steps or so. The norm is the same in all processes, so that all
    decide alike without a message. Weights, optimizer and averages then stay as they were.

    Args:
        max_in_a_row: after so many steps without one that may be used the run is rolled back to a checkpoint from
            before them, and goes on with the data that follow.
        max_rollbacks: as often, without a good checkpoint in between; then the run ends with exit code 5.
        spike_deviations: None lets spikes pass.

    Attributes:
        skipped: number of steps left out since the run began.
        in_a_row: number of them up to now.
        rollbacks: since the last good checkpoint.
        first_bad: the first step of those in a row.
        rolled_to: the step of the checkpoint that the run was last rolled back to, since the last good one.
        good: whether the last step was not left out.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(self, *, max_in_a_row: int = 3, max_rollbacks: int = 3, spike_deviations: float | None = 8.0):
        if max_in_a_row < 1:
            raise ValueError(f"guard.max_in_a_row={max_in_a_row} must be at least 1")
        if max_rollbacks < 0:
            raise ValueError(f"guard.max_rollbacks={max_rollbacks} must be at least 0")
        if spike_deviations is not None and not spike_deviations > 0:
            raise ValueError(f"guard.spike_deviations={spike_deviations} must be greater than 0, or null")
        self.max_in_a_row = max_in_a_row
        self.max_rollbacks = max_rollbacks
        self.spike_deviations = spike_deviations
        self.skipped = self.in_a_row = self.rollbacks = 0
        self.first_bad: int | None = None
        self.rolled_to: int | None = None
        self.good = True
        # By network: steps seen, mean and variance of the logarithm of the norm, (3,).
        self._usual: dict[str, Tensor] = {}
        self._noted: list[tuple[int, Tensor, Any, Sequence[str]]] = []  # what the device has not yet said

    def allows(self, network: str, norm: Tensor) -> Tensor:
        """Whether a step may be taken, (), bool, on the device of the norm.

        Args:
            network: whose gradient it is; each has its own usual norm.
            norm: of the gradient before clipping, ().
        """
        norm = norm.detach().float()
        count, mean, variance = self._usual.get(network, torch.zeros(3)).to(norm.device).unbind()
        above = norm.clamp_min(1e-30).log() - mean
        most = math.inf if self.spike_deviations is None else self.spike_deviations
        limit = most * variance.sqrt().clamp_min(LEAST_DEVIATION)
        limit = torch.where(count < USUAL_STEPS, math.inf, limit)
        finite = norm.isfinite()
        seen = torch.where(finite, torch.minimum(above, limit), 0.0)  # a new level becomes usual, if slowly
        share = finite / (count + 1).clamp_max(USUAL_STEPS)
        self._usual[network] = torch.stack(
            [count + finite, mean + share * seen, (1 - share) * (variance + share * seen**2)]
        )
        return finite & (above <= limit)

    def note(self, step: int, applied: Tensor, norm: Tensor, loss: Tensor, keys: Sequence[str]) -> None:
        """Take down how a step went, without waiting for its device.

        Args:
            step: just finished.
            applied: whether all its gradients were used, ().
            norm: of the gradient of its first phase, ().
            loss: of this process, ().
            keys: of the samples that this process saw.
        """
        told = torch.stack([x.detach().float() for x in (applied, norm.to(applied.device), loss.to(applied.device))])
        ready = None
        if told.is_cuda:
            told = torch.empty(3, pin_memory=True).copy_(told, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._noted.append((step, told, ready, keys))

    def bad(self, *, to_the_last: bool = False) -> Iterator[Bad]:
        """The steps that were left out, as they become known: of a GPU, when it has done the step after.

        Args:
            to_the_last: wait for the device.
        """
        while self._noted and (to_the_last or len(self._noted) > 1 or self._noted[0][2] is None):
            step, told, ready, keys = self._noted.pop(0)
            if ready is not None:
                ready.synchronize()
            applied, norm, loss = told.tolist()
            self.good = bool(applied)
            if self.good:
                self.in_a_row, self.first_bad = 0, None
                continue
            self.skipped += 1
            self.in_a_row += 1
            self.first_bad = self.first_bad or step
            yield Bad(step, norm, loss, keys)

    @property
    def broken(self) -> bool:
        """Whether leaving steps out is no help any more."""
        return self.in_a_row > self.max_in_a_row

    def roll_back(self) -> int:
        """Count a roll back; the step from before which the weights must be, each time an earlier one.

        Raises:
            NumericError: if there were too many.
        """
        self.rollbacks += 1
        if self.rollbacks > self.max_rollbacks:
            raise NumericError(
                f"{self.in_a_row} steps in a row, from {self.first_bad} on, gave no gradient that may be used, after "
                f"{self.max_rollbacks} times rolled back: {ADVICE}"
            )
        assert self.first_bad is not None
        before = self.first_bad if self.rolled_to is None else self.rolled_to
        self.in_a_row, self.first_bad = 0, None
        return before

    def forgive(self) -> None:
        """Forget roll backs, as a checkpoint is made of a good step."""
        self.rollbacks, self.rolled_to = 0, None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        usual = {network: values.tolist() for network, values in self._usual.items()}
        return {name: getattr(self, name) for name in COUNTS} | {"usual": usual}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.load_usual(state)

    def load_usual(self, state: Mapping[str, Any]) -> None:
        """Take up what was usual then, as the weights are rolled back to it."""
        self._usual = {network: torch.tensor(values) for network, values in state["usual"].items()}
