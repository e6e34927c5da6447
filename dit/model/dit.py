"""The diffusion transformer with adaLN-Zero (arXiv:2212.09748), its parameters named as in the published weights."""

from functools import partial

import torch
from torch import Tensor, nn

from dit.model.layers import (
    Attention,
    BottleneckPatchEmbed,
    CrossAttention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    RMSNorm,
    Rotation,
    SwiGLU,
    TextEmbedder,
    TimestepEmbedder,
    beside,
    check_width,
    modulate,
    rotary_positions,
    sincos_positions,
)


class Block(nn.Module):
    """A transformer block whose two branches are shifted, scaled and gated by the condition."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool,
        swiglu: bool,
        rms_norm: bool,
        shared_adaln: bool,
        cross_attention: bool,
    ):
        super().__init__()
        self.norm1 = _norm(hidden_size, rms_norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads) if cross_attention else None
        self.norm2 = _norm(hidden_size, rms_norm)
        self.mlp = (SwiGLU if swiglu else Mlp)(hidden_size, mlp_ratio)
        if shared_adaln:
            self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.shared_adaln = shared_adaln

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotation: Rotation | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens x (B, N, D) under condition c (B, D), or with shared adaLN (B, 6 D) -> (B, N, D)."""
        six = c + self.scale_shift_table.flatten() if self.shared_adaln else self.adaLN_modulation(c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six.chunk(6, dim=1)                   # 6 x (B, D)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), rotation)   # (B, N, D)
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, text, text_mask)
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """From tokens to the pixels of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, *, rms_norm: bool, shared_adaln: bool):
        super().__init__()
        self.norm_final = _norm(hidden_size, rms_norm)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        if shared_adaln:
            self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.shared_adaln = shared_adaln

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, p p C)."""
        two = c.repeat(1, 2) + self.scale_shift_table.flatten() if self.shared_adaln else self.adaLN_modulation(c)
        shift, scale = two.chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The DiT, with the switches of its successors. At initialization its output is exactly zero.

    Args:
        input_size: height and width of the input, H = W.
        in_channels: channels of the input, C.
        patch_size: height and width of a patch, p; the tokens are N = (H / p)^2.
        hidden_size: the width of a token, D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: the MLP's width over D.
        learn_sigma: output 2C channels, the second half for a learned variance.
        qk_norm: queries and keys of unit root mean square (arXiv:2302.05442).
        rope: rotary positions in two dimensions (arXiv:2104.09864, 2403.13298), beside the fixed table.
        swiglu: gated MLPs (arXiv:2002.05202).
        rms_norm: RMSNorm with a learned scale (arXiv:1910.07467) instead of LayerNorm without.
        shared_adaln: one modulation for all blocks, and a table for each: adaLN-single (arXiv:2310.00426).
        cross_attention: to the tokens of a text, in every block (arXiv:2310.00426).
        bottleneck: patches are embedded through so many dimensions; 0: directly (arXiv:2511.13720).
        class_tokens: so many tokens of the class stand before the image's (arXiv:2511.13720); 0: none.
        class_tokens_from: from this block on.
        lands: told where it will land, too, as flow maps are: `gap`. At first it does not heed it.
        guided: told the scale of the guidance that it has learned, too: `scale`. At first it does not heed it.
        closed_frequencies: of the time, the last is 1 / 10,000 itself, as in DDPM's code and in diffusers.
        num_classes: number of classes; the label num_classes means none. 0: not told any.
        text_width: width of the text's embeddings; 0: not told any.
        pooled_width: width of a text's one embedding; 0: not told any.
        image_channels: channels of a picture beside the input; 0: not told any.

    Raises:
        ValueError: if sizes do not fit together.
    """

    rotation: Tensor
    units = (Block,)  # of activation checkpointing, compilation and sharding

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
        learn_sigma: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        rms_norm: bool = False,
        shared_adaln: bool = False,
        cross_attention: bool = False,
        bottleneck: int = 0,
        class_tokens: int = 0,
        class_tokens_from: int = 0,
        lands: bool = False,
        guided: bool = False,
        closed_frequencies: bool = False,
        num_classes: int = 0,
        text_width: int = 0,
        pooled_width: int = 0,
        image_channels: int = 0,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "in_channels": in_channels, "patch_size": patch_size, "depth": depth}
        sizes |= {"hidden_size": hidden_size, "num_heads": num_heads}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"model.{name}={value} must be at least 1")
        sizes = {"num_classes": num_classes, "bottleneck": bottleneck, "class_tokens": class_tokens}
        for name, value in (sizes | {"class_tokens_from": class_tokens_from}).items():
            if value < 0:
                raise ValueError(f"model.{name}={value} must not be negative")
        _check_divides("patch_size", patch_size, "input_size", input_size, " (latent.size, of data.image_size)")
        _check_divides("num_heads", num_heads, "hidden_size", hidden_size)
        if not 0 < mlp_ratio < 1000:
            raise ValueError(f"model.mlp_ratio={mlp_ratio} must be positive, like 4")
        if hidden_size % 4:
            raise ValueError(f"model.hidden_size={hidden_size} must be a multiple of 4, for the table of positions")
        if rope and hidden_size // num_heads % 4:
            raise ValueError(
                f"model.rope=true needs heads of a multiple of 4 channels, but model.hidden_size={hidden_size} over "
                f"model.num_heads={num_heads} is {hidden_size // num_heads}"
            )
        if cross_attention != (text_width > 0):
            raise ValueError(
                f"model.cross_attention={str(cross_attention).lower()}, but the condition gives "
                f"{f'text of width {text_width}' if text_width else 'no text'}: the two go together "
                f"(model.cross_attention=true with condition=text)"
            )
        if class_tokens and not num_classes:
            raise ValueError(f"model.class_tokens={class_tokens}, but no class is told: take condition=label")
        if class_tokens_from >= depth:
            raise ValueError(f"model.class_tokens_from={class_tokens_from} must be less than model.depth={depth}")
        self.patch_size = patch_size
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.class_tokens = class_tokens
        self.class_tokens_from = class_tokens_from
        self.image_channels = image_channels
        self.lands = lands
        self.guided = guided
        side, told = input_size // patch_size, in_channels + image_channels

        embed = partial(BottleneckPatchEmbed, bottleneck=bottleneck) if bottleneck else PatchEmbed
        self.x_embedder = embed(told, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, closed=closed_frequencies)
        self.gap_embedder = TimestepEmbedder(hidden_size) if lands else None
        self.scale_embedder = TimestepEmbedder(hidden_size) if guided else None
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.text_embedder = TextEmbedder(text_width, hidden_size) if text_width else None
        self.pooled_embedder = nn.Linear(pooled_width, hidden_size) if pooled_width else None
        self.pos_embed = nn.Parameter(torch.empty(1, side**2, hidden_size), requires_grad=False)
        self.in_context_posemb = nn.Parameter(torch.empty(1, class_tokens, hidden_size)) if class_tokens else None
        if rope:
            self.register_buffer("rotation", torch.empty(2, class_tokens + side**2, hidden_size // num_heads), False)
        self.rope = rope
        layers = (nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if shared_adaln else ()
        self.t_block = nn.Sequential(*layers)  # the identity where each block has its own
        kinds = {"rms_norm": rms_norm, "shared_adaln": shared_adaln}
        options = {"qk_norm": qk_norm, "swiglu": swiglu, "cross_attention": cross_attention, **kinds}
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, **kinds)
        if not self.pos_embed.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialization: Xavier for linear layers, N(0, 0.02) for embeddings, zero gates and output."""
        embedders = ("gap_embedder.mlp.2", "scale_embedder.mlp.2")
        zero = ("adaLN_modulation.1", "final_layer.linear", "cross_attn.proj", "t_block.1", *embedders)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight = module.weight.flatten(1)  # a patch is one long input
                if name.endswith(zero):
                    nn.init.zeros_(weight)
                elif name.startswith(("t_embedder", "gap_embedder", "scale_embedder")):
                    nn.init.normal_(weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, TextEmbedder):
                nn.init.normal_(module.nothing, std=0.02)
            elif isinstance(module, Block | FinalLayer) and module.shared_adaln:
                nn.init.zeros_(module.scale_shift_table)
        with torch.no_grad():
            _, tokens, width = self.pos_embed.shape
            self.pos_embed.copy_(sincos_positions(width, round(tokens**0.5)))
            if self.in_context_posemb is not None:
                nn.init.normal_(self.in_context_posemb, std=0.02)
            if self.rope:
                head_size = self.rotation.shape[-1]
                self.rotation.copy_(rotary_positions(head_size, round(tokens**0.5), self.class_tokens))

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        image: Tensor | None = None,
        gap: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The network's output.

        Args:
            x: (B, C, H, W).
            time: (B,).
            label: (B,), in 0..num_classes.
            text: (B, L, W).
            text_mask: (B, L), which tokens are there; a row without any says nothing.
            pooled: (B, W).
            image: (B, image_channels, H, W).
            gap: (B,), in [0, 1], of the time from here to where it will land; None: it lands here.
            scale: (B,), of guidance; None: 1, which is none.

        Returns:
            (B, C or 2C, H, W).

        Raises:
            ValueError: if text, pooled or image are of another size than it was built for.
        """
        if self.image_channels:
            x = beside(x, image, self.image_channels)                      # (B, C + image_channels, H, W)
        x = self.x_embedder(x) + self.pos_embed                            # (B, N, D)
        c = self.t_embedder(time)                                          # (B, D)
        if self.gap_embedder is not None:
            c = c + self.gap_embedder(torch.zeros_like(time) if gap is None else gap)
        if self.scale_embedder is not None:
            c = c + self.scale_embedder(torch.ones_like(time) if scale is None else scale)
        if self.y_embedder is not None:
            y = self.y_embedder(label)                                     # (B, D)
            c = c + y
        if self.pooled_embedder is not None:
            pooled = check_width("pooled", pooled, self.pooled_embedder.in_features)
            c = c + self.pooled_embedder(pooled)
        if self.text_embedder is not None:
            text, text_mask = self.text_embedder(text, text_mask)          # (B, 1 + L, D), (B, 1 + L)
        told = self.t_block(c)                                             # (B, D), shared adaLN: (B, 6 D)
        num_extra = 0
        for i, block in enumerate(self.blocks):
            if self.class_tokens and i == self.class_tokens_from:
                x = torch.cat([y[:, None] + self.in_context_posemb, x], dim=1)
                num_extra = self.class_tokens
            x = block(x, told, self._rotation(num_extra), text, text_mask)  # (B, extra + N, D)
        return self.unpatchify(self.final_layer(x[:, num_extra:], c))      # (B, C or 2C, H, W)

    def _rotation(self, num_extra: int) -> Rotation | None:
        """Of the tokens there are."""
        if not self.rope:
            return None
        cos, sin = self.rotation[:, self.class_tokens - num_extra :]
        return cos, sin

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p p C) -> (B, C, H, W)."""
        batch, tokens, _ = x.shape
        side, p = round(tokens**0.5), self.patch_size
        x = x.view(batch, side, side, p, p, self.out_channels)  # (B, h, w, p, q, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, side * p, side * p)


def _norm(hidden_size: int, rms_norm: bool) -> nn.Module:
    if rms_norm:
        return RMSNorm(hidden_size)
    return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


def _check_divides(name: str, value: int, of: str, total: int, whence: str = "") -> None:
    if total % value:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        raise ValueError(f"model.{name}={value} does not divide {of}={total}{whence}: choose one of {divisors}")
