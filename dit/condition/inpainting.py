"""A picture with a hole, to be drawn in it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.condition.condition import Condition, Encode, check_pictures


class Inpainting(Condition):
    """`cond = {"image": (B, c + 1, h, w)}`: the picture, grey in the hole, and the hole as ones, beside x_t.

    In training the hole is a rectangle: each of its edges is an edge of the picture with probability 1/2, so that
    halves, corners and whole pictures occur, too.

    Args:
        channels: of what the network sees, c.
        image_size: height and width of a picture in pixels.
    """

    fields = ("image",)
    asks = ("image", "mask")

    def __init__(self, channels: int, image_size: int):
        self.channels = channels
        self.image_size = image_size

    @property
    def sizes(self) -> dict[str, int]:
        """The channels beside x_t."""
        return {"image_channels": self.channels + 1}

    def asked(self, batch: Mapping[str, Any], draw: Any) -> Mapping[str, Any]:
        """The batch, and a mask (B, H, W) for it."""
        size = self.image_size
        pixel = torch.arange(size, device=draw.device)
        inside = []
        for axis in ("rows", "columns"):
            first = (draw.uniform(f"first of {axis}") * 2 - 1).clamp(min=0) * size
            last = (draw.uniform(f"last of {axis}") * 2).clamp(max=1) * size
            last = torch.maximum(last, first + 1)
            inside.append((pixel >= first.floor()[:, None]) & (pixel < last.ceil()[:, None]))  # (B, size)
        return {**batch, "mask": inside[0][:, :, None] & inside[1][:, None, :]}

    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """The fields `image`, uint8 (B, C, H, W), and `mask`, bool (B, H, W), true where to draw.

        Raises:
            ValueError: if one is no pictures, or of another size.
        """
        check_pictures("image", asked["image"], torch.uint8, "(N, C, H, W)")
        check_pictures("mask", asked["mask"], torch.bool, "(N, H, W)")
        image, mask = asked["image"].to(draw.device), asked["mask"].to(draw.device)
        for name, value in (("image", image), ("mask", mask)):
            if tuple(value.shape[-2:]) != (self.image_size,) * 2:
                raise ValueError(
                    f"{name} of {value.shape[-1]} x {value.shape[-2]} pixels, but this model draws "
                    f"{self.image_size} x {self.image_size}"
                )
        grey = (image.float() / 127.5 - 1).masked_fill(mask[:, None], 0.0)
        z = draw.apply("latent of the condition", encode, grey)
        hole = F.adaptive_max_pool2d(mask[:, None].to(z.dtype), z.shape[-2:])
        return {"image": torch.cat([z, hole], dim=1)}
