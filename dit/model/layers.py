"""Parts that transformers share, with the parameter names of the published DiT."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """A scalar time as cosines and sines of geometric frequencies, then an MLP (cosines first, as published)."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256):
        super().__init__()
        self.num_frequencies = num_frequencies
        layers = nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(sinusoid(t, self.num_frequencies).to(t.dtype))


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """[cos(t w_i), sin(t w_i)], w_i = max_period^(-i / (dim / 2)), in float32: (B,) -> (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LabelEmbedder(nn.Module):
    """A table with a row for each class and one more, the last, for no class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        # Begun empty: drawing normal numbers on the meta device imports torch's compiler, which takes seconds.
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(num_classes + 1, hidden_size), freeze=False)

    def forward(self, label: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.embedding_table(label)


class Attention(nn.Module):
    """Multi-head self-attention, its queries, keys and values from one fused matrix."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)       # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # 3 x (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)                        # (B, heads, N, D / heads)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))  # (B, N, D)


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """X (1 + scale) + shift, the same for all tokens: x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_positions(hidden_size: int, side: int) -> Tensor:
    """The fixed table of two-dimensional positions, (1, side^2, D), computed in float64.

    As published: the first half of the channels tells the column, the second the row, each as sines, then cosines.
    """
    frequencies = 10_000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies                  # (side, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                                    # (side, D / 2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)                # 2 x (side^2, D / 2)
    return torch.cat([columns, rows], dim=1)[None].float()                                   # (1, side^2, D)
