"""What tells the weights of one network from those of another."""

import hashlib

import torch
from torch import nn


def sha256(network: nn.Module) -> str:
    """The SHA-256 of the state dict of a network: of names, types, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
