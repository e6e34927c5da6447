"""What `dit.load` gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.sampler.pipeline import Pipeline
from dit.train import saved, trained
from dit.train.kind import check_denoiser
from dit.train.loaded import load, parts_at


class Model:
    """An export, or a run, that draws as it was configured, unless told otherwise.

    Args:
        path: its folder.

    Raises:
        ValueError: if there is none, or it is an autoencoder.
        DamagedError: if a file of it is missing, or not what was written.
        CheckpointError: if it is a run whose checkpoints are all damaged.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self.config = saved.config(self.folder)
        check_denoiser(self.config)
        self._at = trained.newest(self.folder)
        self._loaded = load(self.folder, self._at, {}, saved.exported(self.folder).get("weights", "ema"))

    def to(self, device: str | torch.device) -> "Model":
        """Move it to a device."""
        device = torch.device(device)
        self._loaded.denoiser.to(device)
        self._loaded.latent.to(device)
        return self

    def sample(self, num_images: int | None = None, **options: Any) -> Tensor:
        """Draw pictures, uint8 (N, C, H, W), on the CPU.

        Args:
            num_images: N; None: as many as there are values in what is asked for, or one.
            **options: what is asked for, like label=[0, 1, 2] or caption=["a seven"], a value for each image or one for
                all, and:
                seed: of the noise, which is that of the picture's number and the seed, 0.
                num_steps: of the sampler; None: as it was configured.
                guidance: the scale; None: the same.
                batch_size: at a time, 256.
                noise: standard normal, (N, C, H, W), to begin with; None: that of the seed.

        Raises:
            ValueError: if it cannot be drawn so.
        """
        pipeline, number, told = self._asked(num_images, **options)
        return pipeline(told.pop("asked"), number, **told)

    def latents(self, num_images: int | None = None, **options: Any) -> Tensor:
        """What the pictures are decoded from, (N, c, h, w); as `sample`."""
        pipeline, number, told = self._asked(num_images, **options)
        drawn: Iterator[Tensor] = pipeline.latents(told.pop("asked"), number, **told)
        return torch.cat(list(drawn))

    def _asked(
        self,
        num_images: int | None,
        *,
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 256,
        noise: Tensor | None = None,
        **asked: Any,
    ) -> tuple[Pipeline, int, dict[str, Any]]:
        """What draws, how many, and how."""
        loaded, parts = self._loaded, self._loaded.parts
        if num_steps is not None or guidance is not None:
            parts = self._otherwise(num_steps, guidance)
        if missing := set(parts.condition.asks) - asked.keys():
            raise ValueError(f"{missing.pop()} is what this is told: give it, a value for each image or one for all")
        if unknown := asked.keys() - {*parts.condition.asks, "noise_level"}:
            told = " and ".join(parts.condition.asks) or "nothing"
            raise ValueError(f"{unknown.pop()}: this is told {told}, leave it out")
        lengths = {len(v) for v in asked.values() if _several(v)}
        if num_images is not None:
            lengths |= {num_images}
        if len(lengths) > 1:
            raise ValueError(f"different numbers of images are asked for: {', '.join(map(str, sorted(lengths)))}")
        number = lengths.pop() if lengths else 1
        level = {name: asked.pop(name) for name in ["noise_level"] if name in asked}  # one for all
        fields = {name: value if _several(value) else [value] * number for name, value in asked.items()} | level
        device = next(loaded.denoiser.parameters()).device
        noise = None if noise is None else noise.to(device)
        options = {"asked": fields, "seed": seed, "batch_size": batch_size, "noise": noise}
        return parts.pipeline(loaded.denoiser, loaded.latent), number, options

    def _otherwise(self, num_steps: int | None, guidance: float | None) -> Any:
        """The parts with another number of steps, or another scale."""
        sampler, guided = self.config.sampler.copy(), self.config.guidance.copy()
        if num_steps is not None:
            sampler.num_steps = num_steps
        if guidance is not None:
            guided.scale = guidance
        return parts_at(self.folder, self._at, {"sampler": sampler, "guidance": guided})[0]


def _several(value: Any) -> bool:
    """Whether it has a value for each image."""
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > 0)
