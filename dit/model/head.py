"""A discriminator's head on the features of another network."""

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Two layers at each token or position, to a logit. The first numbers are the same whatever the seed.

    Args:
        width: of the features, D.

    Raises:
        ValueError: if that is less than 1, or they are of another width.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        if width < 1:
            raise ValueError(f"objective.head.width={width} must be at least 1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
            )

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, D), or (B, D, h, w) with N = h w, -> (B, N), positive where it looks real."""
        if features.ndim == 4:
            features = features.flatten(2).mT                              # (B, N, D)
        if features.shape[-1] != self.width:
            raise ValueError(
                f"objective.head.width={self.width}, but the features are {features.shape[-1]} wide: give that"
            )
        return self.layers(features)[..., 0]                               # (B, N)
