"""An exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- decay average + (1 - decay) weights, in float32, begun as a copy, over all named parameters.

    Args:
        network: whose parameters are averaged.
        decay: the share of the average that each step keeps, in [0, 1): 0.9999 remembers about 10,000 steps.
        warmup: begin with the shorter memory (1 + step) / (10 + step) until decay is reached.

    Raises:
        ValueError: if decay is outside [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} must lie in [0, 1), like 0.9999")
        self.decay = decay
        self.warmup = warmup
        self.parameters = dict(network.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """For the length of a `with`, the network has the averaged weights."""
        weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(weights)

    def _copy(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the parameters' names."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from saved averages."""
        assert state.keys() == self.average.keys()
        for name, value in state.items():
            self.average[name].copy_(value)
