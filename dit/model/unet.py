"""The ADM U-Net (arXiv:2105.05233), its parameters named as in the published weights."""

from collections.abc import Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.model.layers import CrossAttention, TextEmbedder, TimestepEmbedder, beside, check_width, sinusoid


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or of the most below that divide 32 and the channels."""
    return nn.GroupNorm(gcd(32, channels), channels)


class ResidualBlock(nn.Module):
    """Two convolutions, the second one's input scaled and shifted by the embedding; halves or doubles H and W."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        dropout: float,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.resample = nn.AvgPool2d(2) if down else nn.Upsample(scale_factor=2) if up else nn.Identity()
        first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(group_norm(in_channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.Sequential(group_norm(out_channels), nn.SiLU(), nn.Dropout(dropout), second)
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, *_: Tensor) -> Tensor:
        """X (B, C, H, W) under embedding emb (B, D) -> (B, C', H', W')."""
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))                             # (B, C', H', W')
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)    # 2 x (B, C', 1, 1)
        norm, activation, dropout, conv = self.out_layers
        h = conv(dropout(activation(norm(h) * (1 + scale) + shift)))             # (B, C', H', W')
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention of all pixels; the channels of qkv are q, k, v, and within each the heads."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), with N = H W."""
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).contiguous()     # (B, N, 3 C), as fast kernels need it
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))                          # (B, N, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                     # 3 x (B, heads, N, C / heads)
        h = F.scaled_dot_product_attention(q, k, v)                              # (B, heads, N, C / heads)
        return x + self.proj_out(h.transpose(2, 3).flatten(1, 2)).view_as(x)     # (B, C, H, W)


class CrossAttentionBlock(nn.Module):
    """Attention of all pixels to the tokens of a text."""

    def __init__(self, channels: int, num_heads: int, context_width: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.attn = CrossAttention(channels, num_heads, context_width)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W), (B, D), text (B, L, D), and which of L are there (B, L) -> (B, C, H, W)."""
        h = self.attn(self.norm(x).flatten(2).transpose(1, 2), text, mask)       # (B, N, C)
        return x + h.transpose(1, 2).reshape(x.shape)                            # (B, C, H, W)


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Stage(nn.Sequential):
    """Layers that are all told the same, and take what they need: no `isinstance`, which a wrapped layer would fail."""

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        """X (B, C, H, W), told the embedding (B, D) and, with cross-attention, text and mask -> (B, C', H', W')."""
        for layer in self:
            x = layer(x, *told)
        return x


class UNet(nn.Module):
    """The U-Net of ADM. At initialization its output is exactly zero.

    Args:
        input_size: height and width of the input, H = W.
        in_channels: channels of the input, C.
        model_channels: the unit of width; embeddings have D = 4 model_channels.
        channel_mult: widths of the levels over model_channels; each level after the first has half the height.
        num_res_blocks: residual blocks a level on the way down; there is one more on the way up.
        attention_resolutions: heights of the feature maps that attend to themselves; the lowest, between the ways down
            and up, always does.
        head_channels: channels of an attention head. None: num_heads says how many there are.
        num_heads: attention heads, whatever the width.
        dropout: probability, in residual blocks.
        resblock_updown: resample within residual blocks. False: by convolutions.
        learn_sigma: output 2C channels, the second half for a learned variance.
        num_classes: number of classes; the label num_classes means none. 0: not told any.
        cross_attention: to the tokens of a text, after each self-attention.
        lands: told where it will land, too, as flow maps are: `gap`. At first it does not heed it.
        text_width: width of the text's embeddings. 0: not told any.
        pooled_width: width of a text's one embedding. 0: not told any.
        image_channels: channels of a picture beside the input. 0: not told any.

    Raises:
        ValueError: if sizes do not fit together, or one is out of range.
    """

    units = (ResidualBlock, AttentionBlock, CrossAttentionBlock)  # of checkpointing, compilation and sharding

    def __init__(
        self,
        *,
        input_size: int,
        in_channels: int,
        model_channels: int,
        channel_mult: Sequence[float],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        head_channels: int | None = 64,
        num_heads: int | None = None,
        dropout: float = 0.0,
        resblock_updown: bool = True,
        learn_sigma: bool = False,
        num_classes: int = 0,
        cross_attention: bool = False,
        lands: bool = False,
        text_width: int = 0,
        pooled_width: int = 0,
        image_channels: int = 0,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "in_channels": in_channels, "num_res_blocks": num_res_blocks}
        sizes |= {"model_channels": model_channels}
        told = {"num_classes": num_classes, "text_width": text_width, "pooled_width": pooled_width}
        told |= {"image_channels": image_channels}
        for name, value in (sizes | told).items():
            if value < (least := 1 if name in sizes else 0):
                raise ValueError(f"model.{name}={value} must be at least {least}")
        if model_channels % 2:
            raise ValueError(f"model.model_channels={model_channels} must be even, for the time's cosines and sines")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout} must be at least 0 and below 1")
        if cross_attention != (text_width > 0):
            text = f"text of width {text_width}" if text_width else "no text"
            switch = f"but model.cross_attention={str(cross_attention).lower()}"
            way_out = "the two go together (model.cross_attention=true with condition=text)"
            raise ValueError(f"condition gives {text}, {switch}: {way_out}")
        widths = _widths(model_channels, channel_mult)
        heights = _heights(input_size, len(widths))
        if unknown := set(attention_resolutions) - set(heights):
            name = f"model.attention_resolutions={list(attention_resolutions)}"
            raise ValueError(f"{name}: no feature map has a height of {min(unknown)}, choose from {heights}")
        attending = {width for width, height in zip(widths, heights, strict=True) if height in attention_resolutions}
        heads = _heads(attending | {widths[-1]}, head_channels, num_heads)

        self.model_channels = model_channels
        self.image_channels = image_channels
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.lands = lands
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        embedding = 4 * model_channels

        def residual(channels: int, out_channels: int, **resample: bool) -> ResidualBlock:
            return ResidualBlock(channels, out_channels, embedding, dropout, **resample)

        def attention(channels: int) -> list[nn.Module]:
            cross = [CrossAttentionBlock(channels, heads[channels], embedding)] if cross_attention else []
            return [AttentionBlock(channels, heads[channels]), *cross]

        layers = nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        self.time_embed = nn.Sequential(*layers)
        self.gap_embedder = TimestepEmbedder(embedding) if lands else None
        # Begun empty: drawing normal numbers on the meta device imports torch's compiler, which takes seconds.
        table = torch.empty(num_classes, embedding)
        self.label_emb = nn.Embedding.from_pretrained(table, freeze=False) if num_classes else None
        self.text_emb = TextEmbedder(text_width, embedding) if text_width else None
        self.pooled_emb = nn.Linear(pooled_width, embedding) if pooled_width else None

        channels = widths[0]
        stem = nn.Sequential(nn.Conv2d(in_channels + image_channels, channels, 3, padding=1))
        self.input_blocks = nn.ModuleList([stem])
        skips = [channels]
        for height, width in zip(heights, widths, strict=True):
            for _ in range(num_res_blocks):
                attend = attention(width) if height in attention_resolutions else []
                self.input_blocks.append(Stage(residual(channels, width), *attend))
                channels = width
                skips.append(channels)
            if height != heights[-1]:
                down = residual(channels, channels, down=True) if resblock_updown else Downsample(channels)
                self.input_blocks.append(Stage(down))
                skips.append(channels)
        self.middle_block = Stage(residual(channels, channels), *attention(channels), residual(channels, channels))
        self.output_blocks = nn.ModuleList()
        for height, width in zip(reversed(heights), reversed(widths), strict=True):
            for i in range(num_res_blocks + 1):
                attend = attention(width) if height in attention_resolutions else []
                stage = Stage(residual(channels + skips.pop(), width), *attend)
                channels = width
                if i == num_res_blocks and height != input_size:
                    stage.append(residual(channels, channels, up=True) if resblock_updown else Upsample(channels))
                self.output_blocks.append(stage)
        assert not skips
        out = nn.Conv2d(channels, self.out_channels, 3, padding=1)
        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), out)
        if not out.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialization: torch's own, with a zero at the end of each branch and of the network."""
        zero = ("out_layers.3", "proj_out", "attn.proj", "out.2", "gap_embedder.mlp.2")
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | nn.GroupNorm | nn.Embedding):
                module.reset_parameters()
            elif isinstance(module, TextEmbedder):
                nn.init.normal_(module.nothing, std=0.02)
            if name.endswith(zero):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

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
    ) -> Tensor:
        """X (B, C, H, W), time (B,), and what it was built to be told -> (B, C or 2C, H, W).

        That is label (B,) in 0..num_classes, text (B, L, text_width) and which of L are there (B, L),
        pooled (B, pooled_width), image (B, image_channels, H, W); gap (B,), in [0, 1], of the time from here to where
        it will land, None: it lands here.

        Raises:
            ValueError: if text, pooled or image are of another size than that.
        """
        emb = sinusoid(time, self.model_channels).to(next(self.time_embed.parameters()).dtype)
        emb = self.time_embed(emb)                                               # (B, D)
        if self.gap_embedder is not None:
            emb = emb + self.gap_embedder(torch.zeros_like(time) if gap is None else gap)
        if self.label_emb is not None:
            assert label is not None
            row = self.label_emb(label.clamp(max=self.num_classes - 1))          # (B, D)
            emb = emb + torch.where(label[:, None] < self.num_classes, row, 0)   # (B, D)
        if self.pooled_emb is not None:
            pooled = check_width("pooled", pooled, self.pooled_emb.in_features)
            emb = emb + self.pooled_emb(pooled)                                  # (B, D)
        told = [emb]
        if self.text_emb is not None:
            told += self.text_emb(text, text_mask)                               # (B, 1 + L, D), (B, 1 + L)
        if self.image_channels:
            x = beside(x, image, self.image_channels)                            # (B, C + image, H, W)

        stem, *down = self.input_blocks
        skips = [x := stem(x)]
        for stage in down:
            skips.append(x := stage(x, *told))
        x = self.middle_block(x, *told)                                          # the lowest
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), *told)
        return self.out(x)                                                       # (B, C or 2C, H, W)


def _widths(model_channels: int, channel_mult: Sequence[float]) -> list[int]:
    if not channel_mult:
        raise ValueError("model.channel_mult=[] has no level: give one number a level, like [1,2,2]")
    for mult in channel_mult:
        if mult <= 0 or mult * model_channels % 1:
            name = f"model.channel_mult={list(channel_mult)}"
            raise ValueError(f"{name}: {mult} times model.model_channels={model_channels} must be whole and positive")
    return [int(mult * model_channels) for mult in channel_mult]


def _heights(input_size: int, levels: int) -> list[int]:
    if input_size % 2 ** (levels - 1):
        most = (input_size & -input_size).bit_length()  # halvings that stay whole, and one
        size = f"model.input_size={input_size} is not divisible by {2 ** (levels - 1)}"
        raise ValueError(f"{size}, as {levels} levels need it: give model.channel_mult at most {most}")
    return [input_size >> level for level in range(levels)]


def _heads(widths: set[int], head_channels: int | None, num_heads: int | None) -> dict[int, int]:
    """How many heads there are at each width."""
    if (head_channels is None) == (num_heads is None):
        name = f"model.head_channels={head_channels} and model.num_heads={num_heads}".replace("None", "null")
        raise ValueError(f"{name}: give one of the two, and null for the other")
    name, value = ("head_channels", head_channels) if num_heads is None else ("num_heads", num_heads)
    assert value is not None
    common = gcd(*widths)
    if value < 1 or common % value:
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        where = f"the widths that attend, {sorted(widths)}"
        raise ValueError(f"model.{name}={value} does not divide {where}: choose one of {divisors}")
    return {width: num_heads or width // value for width in widths}
