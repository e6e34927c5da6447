"""A picture of low resolution, to be drawn at a higher one."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.condition.condition import Condition, Encode, check_pictures


class SuperResolution(Condition):
    """`cond = {"image": (B, c + 1, h, w)}`: the picture enlarged, and how much noise it has, beside x_t.

    In training the enlarged picture y becomes sqrt(1 - l^2) y + l noise, the level l uniform up to max_noise, so that
    pictures whose errors were never seen can be enlarged, too (arXiv:2106.15282, section 4.2); l is told as a channel.

    Args:
        channels: of what the network sees, c.
        image_size: height and width of a picture in pixels.
        factor: by how much the low resolution is lower.
        max_noise: the highest level in training, in [0, 1).

    Raises:
        ValueError: if factor does not divide image_size, or max_noise is out of range.
    """

    fields = ("image",)
    asks = ("low_resolution",)

    def __init__(self, channels: int, image_size: int, factor: int = 4, max_noise: float = 0.0):
        if factor < 2 or image_size % factor:
            divisors = [d for d in range(2, image_size + 1) if image_size % d == 0]
            raise ValueError(
                f"condition.factor={factor} must divide data.image_size={image_size}: choose one of {divisors}"
            )
        if not 0 <= max_noise < 1:
            raise ValueError(f"condition.max_noise={max_noise} must lie in [0, 1): 0 is none")
        self.channels = channels
        self.image_size = image_size
        self.factor = factor
        self.max_noise = max_noise

    @property
    def sizes(self) -> dict[str, int]:
        """The channels beside x_t."""
        return {"image_channels": self.channels + 1}

    def asked(self, batch: Mapping[str, Any], draw: Any) -> Mapping[str, Any]:
        """The batch, and its images averaged over squares of factor x factor pixels, uint8."""
        low = F.avg_pool2d(batch["image"].float(), self.factor).round().to(torch.uint8)
        return {**batch, "low_resolution": low}

    def __call__(self, asked: Mapping[str, Any], draw: Any, encode: Encode) -> dict[str, Tensor]:
        """The field `low_resolution`, uint8 (B, C, h, w), enlarged; noised if `noise_level` (a number) asks for it.

        Raises:
            ValueError: if it is no pictures, or of another size, or noise_level is more than max_noise.
        """
        low = asked["low_resolution"]
        check_pictures("low_resolution", low, torch.uint8, "(N, C, h, w)")
        side = self.image_size // self.factor
        if tuple(low.shape[-2:]) != (side, side):
            raise ValueError(
                f"a picture of {low.shape[-1]} x {low.shape[-2]} pixels, but this model enlarges {side} x {side} to "
                f"{self.image_size} x {self.image_size}"
            )
        scaled = low.to(draw.device).float() / 127.5 - 1
        large = F.interpolate(scaled, size=(self.image_size,) * 2, mode="bicubic").clamp(-1, 1)
        z = draw.apply("latent of the condition", encode, large)
        level = float(asked.get("noise_level") or 0.0)
        if level > self.max_noise:
            raise ValueError(
                f"noise_level={level} is more than it was trained with, condition.max_noise={self.max_noise}"
            )
        if level == 0:
            return {"image": torch.cat([z, torch.zeros_like(z[:, :1])], dim=1)}
        return {"image": self._noised(z, torch.full((len(z),), level, device=z.device), draw)}

    def augment(self, cond: Mapping[str, Tensor], draw: Any) -> dict[str, Tensor]:
        """The picture, noised."""
        if self.max_noise == 0:
            return dict(cond)
        level = draw.uniform("noise level") * self.max_noise
        return {**cond, "image": self._noised(cond["image"][:, :-1], level, draw)}

    def _noised(self, z: Tensor, level: Tensor, draw: Any) -> Tensor:
        """Z (B, c, h, w) at noise levels (B,), which follow as a channel."""
        level = level.reshape(-1, 1, 1, 1)
        z = (1 - level**2).sqrt() * z + level * draw.normal("condition noise", z.shape[1:])
        return torch.cat([z, level.expand(-1, 1, *z.shape[2:])], dim=1)
