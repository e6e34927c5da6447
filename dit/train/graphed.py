"""A network's forward as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

WARM = 3  # forwards before one is captured: what is compiled, chosen and allocated at first is not of the graph


class Graphed:
    """A forward that is captured once for each set of shapes, and replayed: a GPU does not wait for a CPU to launch it.

    It is for sampling. With gradients, or on a CPU, it is the forward itself. A graph reads the weights where they lie:
    changes in place are seen, others are not. On a GPU: not yet run.

    Args:
        forward: (tensors) -> tensor, which may depend on the shapes, but not on the numbers, of what it is given.
    """

    def __init__(self, forward: Callable[..., Tensor]):
        self.forward = forward
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Any], Tensor]] = {}
        self._pool: Any = None  # of memory, which all graphs share: one is replayed at a time

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the forward."""
        told, spec = tree_flatten((args, kwargs))
        tensors = [value for value in told if isinstance(value, Tensor)]
        if torch.is_grad_enabled() or not all(t.is_cuda for t in tensors):
            return self.forward(*args, **kwargs)
        narrow = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (spec, narrow, *((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in told))
        if key not in self._captured:
            self._captured[key] = self._capture(told, spec)
        graph, inputs, output = self._captured[key]
        for mine, value in zip(inputs, told, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(value)
        graph.replay()
        return output.clone()

    def _capture(self, told: list[Any], spec: Any) -> tuple[torch.cuda.CUDAGraph, list[Any], Tensor]:
        """The graph, what it reads, and where it writes."""
        inputs = [value.clone() if isinstance(value, Tensor) else value for value in told]
        args, kwargs = tree_unflatten(inputs, spec)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        mixed = {"enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")}
        with torch.autocast("cuda", **mixed, cache_enabled=False):  # narrow copies of weights die, the graph does not
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM):
                    self.forward(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = self.forward(*args, **kwargs)
        return graph, inputs, output
