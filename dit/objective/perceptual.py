"""How different two images look to a network that was trained to recognise things."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Perceptual:
    """d(x, y) = sum over layers of the mean over positions of |f(x) - f(y)|^2, f: features of unit length.

    That is LPIPS (arXiv:1801.03924, equation 1) without its learned weights, by any network that timm has.

    Args:
        name: of a model of timm, such as vgg16.tv_in1k.
        pretrained: with its weights, from the hub; otherwise random ones, always the same.

    Raises:
        ImportError: if timm is missing.
        ValueError: if there is no such model, or its weights are not to be had.
    """

    def __init__(self, name: str, pretrained: bool = True):
        try:
            import timm
        except ImportError as error:
            raise ImportError("objective.perceptual needs timm: pip install 'ditforge[perceptual]'") from error
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: Any = timm.create_model(name, pretrained=pretrained, features_only=True)
        except Exception as error:  # timm and the hub raise many kinds
            raise ValueError(
                f"objective.perceptual.name={name} is no model of timm with features, or its weights are not to be had "
                f"(offline?): {' '.join(str(error).split())[:300]}"
            ) from error
        # Not a part of the objective, whose checkpoints would hold it.
        self.model = model.requires_grad_(False).eval()
        self.mean, self.std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Images in [-1, 1], both (B, C, H, W), C = 1 or 3 -> (B,)."""
        model, mean, std = self.model.to(x.device), self.mean.to(x.device), self.std.to(x.device)
        features = [model((images.expand(-1, 3, -1, -1) / 2 + 0.5 - mean) / std) for images in (x, y)]
        distance = torch.zeros(len(x), device=x.device)
        for f_x, f_y in zip(*features, strict=True):
            difference = F.normalize(f_x.float(), dim=1, eps=1e-8) - F.normalize(f_y.float(), dim=1, eps=1e-8)
            distance = distance + difference.square().sum(dim=1).flatten(1).mean(dim=1)
        return distance
