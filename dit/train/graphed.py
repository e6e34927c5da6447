"""A network's forward as a CUDA graph."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

WARM = 3  # forwards before one is captured: what is compiled, chosen and allocated at first is not of the graph


class Graphed:
    """A forward that is captured once for each set of shapes, and replayed: a GPU does not wait for a CPU to launch it.

    It is for sampling: with gradients, or on a CPU, it is the forward itself. A graph reads the weights where they lie,
    so that changes in place are seen; where they have moved, all is captured anew. On a GPU: not yet run.

    Args:
        network: tensors -> tensor, which may depend on the shapes, but not on the numbers, of what it is given.
    """

    def __init__(self, network: nn.Module):
        self.network, self.forward = network, network.forward
        self._weights: list[int] = []  # where they lay
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Any], Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the forward.

        Raises:
            ValueError: if it cannot be captured.
        """
        told, spec = tree_flatten((args, kwargs))
        tensors = [value for value in told if isinstance(value, Tensor)]
        if torch.is_grad_enabled() or not all(t.is_cuda for t in tensors):
            output: Tensor = self.forward(*args, **kwargs)
            return output
        weights = [p.data_ptr() for p in (*self.network.parameters(), *self.network.buffers())]
        if weights != self._weights:
            self._captured.clear()
            self._weights = weights
        narrow = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (spec, narrow, *((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in told))
        if key not in self._captured:
            with torch.cuda.device(tensors[0].device):
                self._captured[key] = self._capture(told, spec, narrow)
        graph, inputs, output = self._captured[key]
        for mine, value in zip(inputs, told, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(value)
        graph.replay()
        return output.clone()

    def _capture(
        self, told: list[Any], spec: Any, narrow: torch.dtype | None
    ) -> tuple[torch.cuda.CUDAGraph, list[Any], Tensor]:
        """The graph, what it reads, and where it writes; under autocast if to a narrow type."""
        inputs = [value.clone() if isinstance(value, Tensor) else value for value in told]
        args, kwargs = tree_unflatten(inputs, spec)
        # Without its cache: the narrow copies of weights in it die, the graph does not.
        with torch.autocast("cuda", narrow, enabled=narrow is not None, cache_enabled=False):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM):
                    self.forward(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    output = self.forward(*args, **kwargs)
            except RuntimeError as error:
                raise ValueError(f"cuda_graphs=true: this cannot be captured, leave it out ({error})") from error
        return graph, inputs, output
