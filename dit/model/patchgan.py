"""A discriminator that judges patches."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """Convolutions whose every output sees a patch of the image and says whether it is real (arXiv:1611.07004).

    With GroupNorm instead of BatchNorm, so that an image is judged alike in any batch. The first numbers are the same
    whatever the seed.

    Args:
        in_channels: of the images.
        channels: of the first layer; each further one has twice as many, at most 8 times.
        num_layers: strided layers; 3, as published, sees patches of 70 x 70 pixels.

    Raises:
        ValueError: if channels are no multiple of 8, or there is no layer.
    """

    def __init__(self, in_channels: int, channels: int = 64, num_layers: int = 3):
        super().__init__()
        if channels % 8 or num_layers < 1:
            raise ValueError(
                f"objective.discriminator: channels={channels} must be a multiple of 8, num_layers={num_layers} "
                "at least 1"
            )
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (width, wider) in enumerate(pairwise(widths)):
            stride = 2 if i < num_layers - 1 else 1
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False)]
            layers += [nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, h, w), positive where it looks real."""
        return self.layers(images)                               # (B, 1, h, w)
