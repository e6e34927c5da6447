"""Parts that networks share, with the parameter names of the published DiT and its successors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines, 2 x (N, D / heads)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # all that follows keeps the layout of these


class BottleneckPatchEmbed(nn.Module):
    """The same through fewer dimensions, for patches that are wider than what they show (JiT, arXiv:2511.13720)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int, bottleneck: int):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """A scalar time as cosines and sines of geometric frequencies, then an MLP (cosines first, as published)."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256, closed: bool = False):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.closed = closed
        layers = nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        told = sinusoid(t, self.num_frequencies, closed=self.closed)
        return self.mlp(told.to(next(self.mlp.parameters()).dtype))


def check_width(name: str, told: Tensor | None, width: int) -> Tensor:
    """What the network is told (..., width).

    Raises:
        ValueError: if it is not told, or of another width.
    """
    if told is None or told.shape[-1] != width:
        found = "nothing" if told is None else f"a width of {told.shape[-1]}"
        raise ValueError(f"{name}: {found}, but the network was built to be told a width of {width}")
    return told


def beside(x: Tensor, image: Tensor | None, channels: int) -> Tensor:
    """X (B, C, H, W) and a picture of so many channels beside it, (B, C + channels, H, W).

    Raises:
        ValueError: if there is none, or of another size.
    """
    if image is None or image.shape[1:] != (channels, *x.shape[2:]):
        found = "no picture" if image is None else f"a picture of {tuple(image.shape[1:])}"
        expected = (channels, *x.shape[2:])
        raise ValueError(f"{found} beside x of {tuple(x.shape[1:])}, but the network was built to be told {expected}")
    return torch.cat([x, image], dim=1)


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000, closed: bool = False) -> Tensor:
    """[cos(t w_i), sin(t w_i)], w_i = max_period^(-i / (dim / 2)), in float32 or better: (B,) -> (B, dim).

    Closed, exponents are over dim / 2 - 1: the last frequency is 1 / max_period itself.
    """
    half, exact = dim // 2, torch.promote_types(t.dtype, torch.float32)
    frequencies = torch.exp(-math.log(max_period) / (half - closed) * torch.arange(half, dtype=exact, device=t.device))
    angles = t[:, None].to(exact) * frequencies
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


class TextEmbedder(nn.Module):
    """Tokens of text at the network's width, after one that is attended to where nothing is said, and only there."""

    def __init__(self, text_width: int, hidden_size: int):
        super().__init__()
        self.text_width = text_width
        layers = nn.Linear(text_width, hidden_size), nn.GELU(approximate="tanh"), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)
        self.nothing = nn.Parameter(torch.empty(1, 1, hidden_size))

    def forward(self, text: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, W) and which of them are there (B, L) -> (B, 1 + L, D), (B, 1 + L)."""
        text = check_width("text", text, self.text_width)
        assert mask is not None
        tokens = torch.cat([self.nothing.expand(len(text), -1, -1), self.mlp(text)], dim=1)
        return tokens, torch.cat([~mask.any(dim=1, keepdim=True), mask], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention, its queries, keys and values from one fused matrix.

    With qk_norm, queries and keys are divided by their root mean square (arXiv:2302.05442), which keeps the logits of
    long runs in half precision from growing.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)       # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # 3 x (B, heads, N, D / heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v)                        # (B, heads, N, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))                     # (B, N, D)


class CrossAttention(nn.Module):
    """Multi-head attention of an image's tokens to those of a text."""

    def __init__(self, hidden_size: int, num_heads: int, context_width: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(context_width or hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D), (B, L, W), and which of L are there (B, L) -> (B, N, D)."""
        batch, tokens, _ = x.shape
        q = self.q_linear(x).view(batch, tokens, self.num_heads, -1)             # (B, N, heads, D / heads)
        kv = self.kv_linear(text).view(batch, text.shape[1], 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)                                         # 2 x (B, heads, L, D / heads)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None, None])
        return self.proj(x.transpose(1, 2).flatten(2))                           # (B, N, D)


class RMSNorm(nn.RMSNorm):
    """X / sqrt(mean x^2) times a learned scale (arXiv:1910.07467), in float32."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """w3 (silu(w1 x) * w2 x), two thirds as wide, so that it has the parameters of the MLP (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        inner = int(2 / 3 * int(hidden_size * mlp_ratio))
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


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


def rotary_positions(head_size: int, side: int, num_extra: int = 0) -> Tensor:
    """Cosines and sines that rotate neighbouring pairs of a head's channels by their position (arXiv:2104.09864).

    The first half of the channels tells the row, the second the column, as in EVA-02 and LightningDiT.

    Args:
        head_size: channels of a head, a multiple of 4.
        side: tokens along each side.
        num_extra: tokens before those of the image, that have no position.

    Returns:
        (2, num_extra + side^2, head_size), float32.
    """
    frequencies = 10_000 ** -(torch.arange(head_size // 4, dtype=torch.float64) / (head_size // 4))
    axis = torch.arange(side, dtype=torch.float64)[:, None] * frequencies                    # (side, head / 4)
    axis = axis.repeat_interleave(2, dim=1)                                                  # (side, head / 2)
    angles = torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)   # (side^2, head)
    angles = torch.cat([angles.new_zeros(num_extra, head_size), angles])
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Neighbouring pairs (a, b) of the channels of x (..., N, D / heads) as (a cos - b sin, b cos + a sin)."""
    cos, sin = rotation
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin).to(x.dtype)
