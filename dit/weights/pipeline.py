"""An export of `dit` (pip install ditforge) as a pipeline of diffusers: it draws as its run did.

`dit export format=diffusers` writes this file beside weights for which diffusers has no parts of its own.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import numpy_to_pil


class DitPipeline(DiffusionPipeline):
    """The network, sampler, times and guidance that the folder's config.json tells; loaded when first called."""

    def __init__(self) -> None:
        super().__init__()
        self._model: Any = None
        self._device = "cpu"

    @property
    def model(self) -> Any:
        """What `dit.load` makes of the folder, from which this was loaded."""
        if self._model is None:
            import dit

            name = str(getattr(self, "name_or_path", ""))
            if not Path(name).is_dir():
                from huggingface_hub import snapshot_download

                name = snapshot_download(name)
            self._model = dit.load(name).to(self._device)
        return self._model

    def to(self, device: Any) -> "DitPipeline":
        """Move it to a device; its numbers stay float32."""
        self._device = device
        if self._model is not None:
            self._model.to(device)
        return self

    def __call__(
        self,
        class_labels: list[int] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **asked: Any,
    ) -> Any:
        """Draw.

        Args:
            class_labels: one for each image, where it is told classes.
            num_inference_steps: None: as the run had it.
            guidance_scale: the same; 1 is none.
            seed: of the noise, whatever the number of images.
            latents: noise to begin with, (N, C, H, W), instead.
            output_type: pil, pt (uint8, (N, C, H, W)), or latent.
            return_dict: give an ImagePipelineOutput, not a tuple.
            **asked: what else it is told, a list for each: caption, ...
        """
        if class_labels is not None:
            asked["label"] = class_labels
        options = {"num_steps": num_inference_steps, "guidance": guidance_scale, "seed": seed, "noise": latents}
        if output_type == "latent":
            images: Any = self.model.latents(**options, **asked)
        else:
            images = self.model.sample(**options, **asked)
        if output_type == "pil":
            images = numpy_to_pil(images.permute(0, 2, 3, 1).numpy() / 255)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
