"""What tells the weights of one network from those of another."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def sha256(network: nn.Module | Mapping[str, Tensor]) -> str:
    """The SHA-256 of a network, or of its state dict: of names, types, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    state = network.state_dict() if isinstance(network, nn.Module) else network
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
