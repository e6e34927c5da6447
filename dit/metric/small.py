"""A small network with random weights of a seed, for small images and for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.metric.extractor import Extractor, coloured


class Small(Extractor):
    """Two convolutions and a projection, with random weights: features by which distributions differ, but not classes.

    Random features see that pictures differ, not what is in them: figures are for this project's small images alone.

    Args:
        num_features: D of `pool`.
        seed: of the weights.

    Raises:
        ValueError: if there are no features.
    """

    resize = "none"
    layers = ("pool", "spatial", "logits")

    def __init__(self, num_features: int = 64, seed: int = 0):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"extractor.num_features={num_features} must be at least 1")
        self.name = f"small-{num_features}-{seed}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, 32, 3, padding=1)
            self.second = nn.Conv2d(32, 64, 3, padding=1)
            self.pool = nn.Linear(64 * 16, num_features)
            self.head = nn.Linear(num_features, 10)
            for layer in (self.first, self.second, self.pool, self.head):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Uint8 (N, C, H, W) -> features."""
        x = F.relu(self.second(F.relu(self.first(coloured(images).float() / 127.5 - 1))))
        pool = F.relu(self.pool(F.adaptive_avg_pool2d(x, 4).flatten(1)))
        spatial = F.adaptive_avg_pool2d(x[:, :7], 4).permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": self.head(pool)}
