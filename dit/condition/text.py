"""A caption."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.condition.condition import Condition, Encode, check_dropout, check_learned
from dit.condition.encoder import TextEncoder


class Text(Condition):
    """`cond = {"text": (B, L, W), "text_mask": (B, L)}`, and `"pooled": (B, W)` if wanted; an empty mask says nothing.

    In training the embeddings come from the shards, or are made of captions by the encoder, which is loaded only then
    and where prompts are given. An empty caption says nothing.

    Args:
        name: of a CLIP or T5 encoder, a hub name or a folder.
        width: of its embeddings, W.
        max_length: tokens, L.
        pooled: tell one vector for the whole caption, too.
        precomputed: read embeddings instead of captions: `.text.npy`, of the tokens that are there, (at most L, W),
            and `.pooled.npy`, (W,). An array without tokens, (0, W), says nothing.
        dropout: probability that a training sample is told nothing, for classifier-free guidance (arXiv:2207.12598).

    Raises:
        ValueError: if a value is out of range.
    """

    asks = ("caption",)

    def __init__(
        self,
        name: str,
        width: int,
        max_length: int,
        pooled: bool = False,
        precomputed: bool = False,
        dropout: float = 0.1,
    ):
        for key, value in {"width": width, "max_length": max_length}.items():
            if value < 1:
                raise ValueError(f"condition.{key}={value} must be at least 1")
        self.name = name
        self.width = width
        self.max_length = max_length
        self.pooled = pooled
        self.precomputed = precomputed
        self.dropout = check_dropout(dropout)
        self.fields = ("text", *(["pooled"] if pooled else [])) if precomputed else ("caption",)

    @property
    def sizes(self) -> dict[str, int]:
        """The widths of what is told."""
        return {"text_width": self.width} | ({"pooled_width": self.width} if self.pooled else {})

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder, loaded when first needed."""
        return TextEncoder(self.name, self.width, self.max_length)

    def check(self, sample: Mapping[str, Any] | None) -> None:
        """Whether the encoder is there, if training needs it, and embeddings have this width."""
        if not self.precomputed:
            self.encoder(["a"])
        elif sample is not None:
            self._read(sample)

    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """The fields `text` and `pooled`, B arrays (L or fewer, W) and (W,), or the field `caption`, B strings.

        Raises:
            ValueError: if a caption is no text, or embeddings have another width or too many tokens.
        """
        if self.precomputed and "text" in asked:
            text, mask, pooled = self._read(asked)
        else:
            if wrong := [caption for caption in asked["caption"] if not isinstance(caption, str)]:
                raise ValueError(f"caption={wrong[0]!r}: give a text, like caption='a seven'")
            different = list(dict.fromkeys(asked["caption"]))
            rows = torch.tensor([different.index(caption) for caption in asked["caption"]]).to(draw.device)
            there = torch.tensor([bool(caption.strip()) for caption in different]).to(draw.device)[:, None]
            text, mask, pooled = self.encoder(different, draw.device)
            text, mask, pooled = text[rows], (mask & there)[rows], (pooled * there)[rows]
        cond = {"text": text, "text_mask": mask} | ({"pooled": pooled} if self.pooled else {})
        moved = {key: value.to(draw.device, non_blocking=True) for key, value in cond.items() if value is not None}
        return {key: value if key == "text_mask" else value.float() for key, value in moved.items()}

    def _read(self, asked: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings of several lengths, with zeros behind: (B, L, W), (B, L), (B, W)."""
        pooled = torch.stack([torch.as_tensor(row) for row in asked["pooled"]]) if self.pooled else None
        if pooled is not None and pooled.shape[-1] != self.width:
            raise ValueError(f"pooled embeddings of width {pooled.shape[-1]}, but condition.width={self.width}")
        tensors = [torch.as_tensor(row) for row in asked["text"]]
        for row in tensors:
            if row.ndim != 2 or row.shape[1] != self.width or len(row) > self.max_length:
                raise ValueError(
                    f"text embeddings of shape {tuple(row.shape)}, but condition.width={self.width} and "
                    f"condition.max_length={self.max_length}: give (at most {self.max_length}, {self.width})"
                )
        text = torch.stack([F.pad(row, (0, 0, 0, self.max_length - len(row))) for row in tensors])
        lengths = torch.tensor([len(row) for row in tensors])
        return text, torch.arange(self.max_length) < lengths[:, None], pooled

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """No caption for anyone.

        Raises:
            ValueError: if the network never learns what that means.
        """
        check_learned(self.dropout)
        own = ("text_mask", "pooled")
        return {name: torch.zeros_like(value) if name in own else value for name, value in cond.items()}

    def augment(self, cond: Mapping[str, Tensor], draw: Any) -> dict[str, Tensor]:
        """No caption for a share `dropout` of the rows."""
        kept = draw.uniform("drop text")[:, None] >= self.dropout
        said = {name: cond[name] * kept for name in ("text_mask", "pooled") if name in cond}
        return {**cond, **said}
