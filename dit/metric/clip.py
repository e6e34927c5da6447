"""CLIP's embeddings of images."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.metric.extractor import Extractor, coloured


class Clip(Extractor):
    """The projected embedding of a CLIP of transformers', as CMMD reads it (arXiv:2401.09603).

    Args:
        name: of the hub, or a folder.
        revision: of the hub.

    Raises:
        ValueError: if there is none of the name.
        ImportError: if transformers is missing, an optional dependency.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, revision: str | None = None):
        super().__init__()
        if find_spec("transformers") is None:
            raise ImportError(f"extractor.name={name} needs transformers: pip install 'ditforge[text]'")
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        try:
            options: dict[str, Any] = {} if revision is None else {"revision": revision}
            self.network: Any = CLIPVisionModelWithProjection.from_pretrained(name, **options)
            processor: Any = CLIPImageProcessor.from_pretrained(name, **options)
        except Exception as error:  # the hub raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"extractor.name={name} is no CLIP that can be had ({reason})") from error
        self.name = f"clip/{name}"
        config: Any = self.network.config
        self.size: int = config.image_size
        self.resize = f"bicubic to {self.size}, antialiased"
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Uint8 (N, C, H, W) -> features."""
        x = F.interpolate(coloured(images).float() / 255, (self.size, self.size), mode="bicubic", antialias=True)
        return {"pool": self.network((x.clamp(0, 1) - self.mean) / self.std).image_embeds}
