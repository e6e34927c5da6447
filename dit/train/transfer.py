"""Batches on their way to a GPU while it computes the step before."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Transfer:
    """A batch whose tensors are copied to a GPU, from pinned memory, on a stream of their own.

    Args:
        batch: tensors, which are copied, and arrays, which stay.
        device: the GPU.
        stream: of the copies.
    """

    def __init__(self, batch: dict[str, Any], device: torch.device, stream: torch.cuda.Stream):
        self._device = device
        with torch.cuda.stream(stream):
            self._batch = {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
        self._copied = stream.record_event()

    def batch(self) -> dict[str, Any]:
        """The batch, for what is launched from now on: the GPU waits for the copies, the host for nothing."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._copied)
        for value in self._batch.values():
            if isinstance(value, Tensor):
                value.record_stream(stream)  # or a later copy might take its memory while the step still reads it
        return self._batch


def transfers(batches: Iterator[dict[str, Any]], device: torch.device) -> Iterator[Any]:
    """A transfer of each batch, begun when it is asked for; on a CPU the batches themselves.

    Lightning asks for a batch before it does the step on the one before, so that the copies of one are under way while
    that step computes. No more batches are fetched ahead than without. Not yet run on a GPU.
    """
    if device.type != "cuda":
        return batches
    stream = torch.cuda.Stream(device)
    return (Transfer(batch, device, stream) for batch in batches)
