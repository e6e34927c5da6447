"""GPUs and what joins them, as their makers' data sheets have them; nothing here was measured."""

from typing import Any, NamedTuple


class Hardware(NamedTuple):
    """A GPU in a node with others, and the network between nodes."""

    name: str
    memory_bytes: float
    bf16: float  # FLOP/s of matrix products, without sparsity
    float32: float  # FLOP/s outside of the tensor cores, as torch computes unless told otherwise
    memory_rate: float  # bytes/s to and from its own memory
    inside: float  # bytes/s that it sends to the GPUs of its node, while it receives as many
    between: float  # bytes/s that it sends to other nodes, while it receives as many


# NVIDIA's data sheets of A100 80 GB SXM, H100 SXM and H200 SXM: "bfloat16 tensor core" without sparsity, "FP32", "GPU
# memory" (in GB of 10^9 bytes: the GPUs have some 6 % more, which stands for what CUDA and NCCL need), "GPU memory
# bandwidth"; half of "NVLink", which counts both directions. Between nodes: one port of InfiniBand a GPU, as DGX A100
# (HDR, 200 Gbit/s) and DGX H100 and H200 (NDR, 400 Gbit/s) have.
HARDWARE = {
    "a100": Hardware("a100", 80e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "h100": Hardware("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware("h200", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
}


def hardware(name: str, **changed: float | None) -> Hardware:
    """A preset, with other figures where they are given.

    Raises:
        ValueError: if there is none of this name, or a figure is not positive.
    """
    if name.lower() not in HARDWARE:
        raise ValueError(f"gpu={name}: choose one of {', '.join(HARDWARE)}, and give the figures that differ")
    given: dict[str, Any] = {key: value for key, value in changed.items() if value is not None}
    for key, value in given.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{key}={value} must be greater than 0")
    return HARDWARE[name.lower()]._replace(**given)
