"""Features of any network of timm's, such as DINOv2."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.metric.extractor import Extractor, check_file, coloured


class Backbone(Extractor):
    """The pooled features of a network of timm's, by its name; with DINOv2 those of FD-DINOv2 (arXiv:2306.04675).

    Args:
        model: its name there.
        size: height and width to which images are resized; None: those of its training.
        path: a file of its weights; None: those of the hub, from the cache or downloaded.
        pretrained: false leaves weights random, of the seed 0, for tests.

    Raises:
        ValueError: if there is no such network, or no weights.
        ImportError: if timm is missing, an optional dependency.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, size: int | None = None, path: str | None = None, pretrained: bool = True):
        super().__init__()
        if find_spec("timm") is None:
            raise ImportError(f"extractor.model={model} needs timm: pip install 'ditforge[metrics]'")
        import timm

        options: dict[str, Any] = {} if size is None else {"img_size": size}
        if path is not None:
            file = check_file(path, "extractor.path", "give the file of the network's weights, or null for the hub's")
            options["pretrained_cfg_overlay"] = {"file": str(file)}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.network = timm.create_model(model, pretrained=pretrained, num_classes=0, **options)
        except Exception as error:  # timm and the hub raise many kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"extractor.model={model} cannot be had from timm ({reason})") from error
        config = timm.data.resolve_data_config({}, model=self.network)
        self.size: tuple[int, int] = (size, size) if size else config["input_size"][-2:]
        self.name = f"timm/{model}" + ("" if pretrained else "-random")
        self.resize = f"bicubic to {self.size[0]}, antialiased"
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Uint8 (N, C, H, W) -> features."""
        x = coloured(images).float() / 255
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return {"pool": self.network((x - self.mean) / self.std)}
