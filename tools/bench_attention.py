"""`python tools/bench.py attention`: whether heads of 72 channels, as DiT-XL has them, are faster padded.

Forward and backward of scaled_dot_product_attention on views of one fused matrix, as the model has them; padding and
cutting off are part of it.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_machine import DEVICE, GPU, measured, ratio
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTHS = ((72, 72), (72, 80), (72, 96), (72, 128), (64, 64))  # of a head, and padded
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; the widths take turns."""
    ways: dict[str, dict[str, Callable[[], None]]] = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            try:
                found = {f"{width} in {padded}": _made(options, width, padded) for width, padded in WIDTHS}
            except RuntimeError as error:
                print(f"{name}: not here ({str(error).splitlines()[0]})")
            else:
                ways[name] = found
    print("\n| backend | channels of a head | ms | over 72, not padded (least - most) |\n|---|---|---|---|")
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, found in ways.items():
        taken: dict[str, list[float]] = {width: [] for width in found}
        with sdpa_kernel(BACKENDS[name]):
            for _ in range(options.repeats):
                for width, work in found.items():
                    taken[width].append(measured(work, options.steps))
        for width, values in taken.items():
            over = ratio(values, taken["72 in 72"], ".3f")
            print(f"| {name} | {width} | {1000 * statistics.median(values):.3f} | {over} |", flush=True)
        seconds[name] = taken
    return {"seconds": seconds}


def _made(options: argparse.Namespace, width: int, padded: int) -> Callable[[], None]:
    """Forward and backward; it is run once, and answers as without padding."""
    shape = options.batch_size, options.tokens, 3, options.heads, width
    dtype = torch.bfloat16 if GPU else torch.float32
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_()

    def forward(padding: int = padded - width) -> Tensor:
        q, k, v = (F.pad(x, (0, padding)) if padding else x for x in qkv.permute(2, 0, 3, 1, 4))
        return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]  # (B, heads, N, width)

    torch.testing.assert_close(answer := forward(), forward(0))
    grad = torch.ones_like(answer)

    def work() -> None:
        qkv.grad = None
        forward().backward(grad)

    work()
    return work
