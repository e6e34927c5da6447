"""Inception v3 as published figures have it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, hub

from dit.metric.extractor import Extractor, check_file, coloured

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SPATIAL = 7  # channels of `spatial`


class Inception(Extractor):
    """The network of 2015-12-05 with which FID is defined, ported by torch-fidelity with TensorFlow's resizing.

    `pool` (N, 2048) and `logits` (N, 1008), without their bias, as ADM's evaluation and torch-fidelity take them;
    `spatial` (N, 17 * 17 * 7) the first channels of mixed_6/conv by place, those of sFID.

    Args:
        path: the file of weights, which torch-fidelity publishes; None: torch's cache of downloads, where
            torch-fidelity leaves it.

    Raises:
        ValueError: if there are no weights, or they hold what could run code.
        ImportError: if torch-fidelity is missing, an optional dependency.
    """

    name = "inception-2015-12-05"
    resize = "bilinear to 299, as TensorFlow 1"
    layers = ("pool", "spatial", "logits")

    def __init__(self, path: str | None = None):
        super().__init__()
        if find_spec("torch_fidelity") is None:
            raise ImportError("extractor=inception needs torch-fidelity: pip install 'ditforge[metrics]'")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        there = Path(hub.get_dir()) / "checkpoints" / FILE if path is None else path
        file = check_file(there, "extractor.path", f"download {URL} there, or choose another extractor=")
        self.network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], str(file))
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._note)
        self._spatial = torch.empty(0)
        self.requires_grad_(False)

    def _note(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Uint8 (N, C, H, W) -> features."""
        pool, logits = self.network(coloured(images))
        return {"pool": pool, "spatial": self._spatial, "logits": logits}
