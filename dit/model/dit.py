"""The diffusion transformer with adaLN-Zero (arXiv:2212.09748), its parameters named as in the published weights."""

import torch
from torch import Tensor, nn

from dit.model.layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    sincos_positions,
)


class Block(nn.Module):
    """A transformer block whose two branches are shifted, scaled and gated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) under condition c (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """From tokens to the pixels of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, p p C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The class-conditional DiT. At initialization its output is exactly zero.

    Args:
        input_size: height and width of the input, H = W.
        in_channels: channels of the input, C.
        patch_size: height and width of a patch, p; the tokens are N = (H / p)^2.
        hidden_size: the width of a token, D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: the MLP's width over D.
        num_classes: number of classes; the label num_classes means none. 0: an unconditional network.
        learn_sigma: output 2C channels, the second half for a learned variance.

    Raises:
        ValueError: if patch_size does not divide input_size, num_heads does not divide hidden_size, or a size is not
            positive.
    """

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int,
        learn_sigma: bool = False,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "in_channels": in_channels, "patch_size": patch_size, "depth": depth}
        sizes |= {"hidden_size": hidden_size, "num_heads": num_heads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"model.{name}={value} must be at least 1")
        if num_classes < 0:
            raise ValueError(f"model.num_classes={num_classes} must not be negative")
        _check_divides("patch_size", patch_size, "input_size", input_size)
        _check_divides("num_heads", num_heads, "hidden_size", hidden_size)
        if not 0 < mlp_ratio < 1000:
            raise ValueError(f"model.mlp_ratio={mlp_ratio} must be positive, like 4")
        if hidden_size % 4:
            raise ValueError(f"model.hidden_size={hidden_size} must be a multiple of 4, for the table of positions")
        self.patch_size = patch_size
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        side = input_size // patch_size

        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.pos_embed = nn.Parameter(torch.empty(1, side**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        if not self.pos_embed.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialization: Xavier for linear layers, N(0, 0.02) for embeddings, zero gates and output."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight = module.weight.flatten(1)  # a patch is one long input
                if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                    nn.init.zeros_(weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            _, tokens, width = self.pos_embed.shape
            self.pos_embed.copy_(sincos_positions(width, round(tokens**0.5)))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """X (B, C, H, W), time (B,), label (B,) in 0..num_classes -> (B, C or 2C, H, W)."""
        x = self.x_embedder(x) + self.pos_embed                # (B, N, D)
        c = self.t_embedder(time)                              # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(label)                     # (B, D)
        for block in self.blocks:
            x = block(x, c)                                    # (B, N, D)
        return self.unpatchify(self.final_layer(x, c))         # (B, C or 2C, H, W)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, H, W)."""
        batch, tokens, _ = x.shape
        side, p = round(tokens**0.5), self.patch_size
        x = x.view(batch, side, side, p, p, self.out_channels)  # (B, h, w, p, q, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, side * p, side * p)


def _check_divides(name: str, value: int, of: str, total: int) -> None:
    if total % value:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        raise ValueError(f"model.{name}={value} does not divide {of}={total}: choose one of {divisors}")
