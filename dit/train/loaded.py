"""A run or an export, ready to draw."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from dit.latent.latent import Latent
from dit.noise.denoiser import Denoiser
from dit.sampler.pipeline import Pipeline
from dit.train import saved, trained
from dit.train.build import parts_of
from dit.train.drawn import check_drawn
from dit.train.execution import arrange

PRECISIONS = ("float32", "bfloat16")


class Loaded(NamedTuple):
    """A run or an export, ready to be sampled."""

    folder: Path  # of it
    path: Path  # of the checkpoint, or the export again
    parts: Any  # Parts, or those of an autoencoder
    denoiser: Any  # Denoiser, or what stands for it
    latent: Latent
    device: torch.device
    step: int  # of its weights
    scale: float  # of the guidance that is in what it draws
    precision: str = "float32"  # of what it computes

    def otherwise(self, chosen: Mapping[str, Any]) -> "Loaded":
        """The same weights, drawn as their run's configuration says, but for what is chosen.

        Raises:
            ValueError: as `load`.
        """
        parts, scale = _parts_at(self.folder, self.path, chosen)
        return self._replace(parts=parts, scale=scale)

    def arranged(self, *, compile: bool = False, cuda_graphs: bool = False, precision: str = "float32") -> "Loaded":
        """The same, executed so from now on, once: the network is changed in place, so that this one is of no more use.

        Args:
            compile: the network by torch.compile, when it is first called, and anew for each size of a batch.
            cuda_graphs: on a GPU forwards are replayed, captured anew for each size of a batch.
            precision: `float32`, or `bfloat16`: products by autocast, all else in float32.

        Raises:
            ValueError: if the network has no units to compile.
        """
        narrow = precision == "bfloat16" and isinstance(self.denoiser, Denoiser)  # an autoencoder has more than a call
        try:
            arrange(self.denoiser.network, compile=compile, cuda_graphs=cuda_graphs, frozen=True, narrow=narrow)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("trainer.")) from error  # there the key is another's
        return self._replace(precision=precision)

    def pipeline(self) -> Pipeline:
        """From what is asked for to pictures."""
        pipeline: Pipeline = self.parts.pipeline(self.denoiser, self.latent, within=self.narrowed)
        return pipeline

    def narrowed(self) -> AbstractContextManager[Any]:
        """In what precision it is to be computed, where the denoiser now is."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(next(self.denoiser.parameters()).device.type, torch.bfloat16)


def load(
    folder: Path,
    path: Path,
    chosen: Mapping[str, Any],
    weights: str,
    device: torch.device | str = "cpu",
) -> Loaded:
    """A checkpoint, drawn as its run's configuration says, but for what is chosen.

    Args:
        folder: of a run or an export.
        path: the checkpoint, or the export again.
        chosen: nodes of the configuration in the place of its own.
        weights: the name of an average, or `model` for the raw weights.
        device: where to.

    Raises:
        ValueError: if something does not fit together, or a student would be drawn in another way than it has learned.
    """
    parts, scale = _parts_at(folder, path, chosen)
    denoiser = trained.load(parts, path, weights).to(device)
    at = trained.state_of(path).step
    return Loaded(folder, path, parts, denoiser, parts.latent().to(device), torch.device(device), at, scale)


def _parts_at(folder: Path, path: Path, chosen: Mapping[str, Any]) -> tuple[Any, float]:
    """The parts of a run or an export with what is chosen, and the scale of the guidance in what they draw.

    Args:
        folder: of a run or an export.
        path: the checkpoint.
        chosen: nodes of the configuration in the place of its own.

    Raises:
        ValueError: as `load`.
    """
    had: Any = saved.config(folder)
    asked: Any = OmegaConf.create({**had, **chosen})
    few_step = trained.state_of(path).few_step
    if few_step:
        num_steps = asked.sampler.num_steps
        other = None if few_step.takes(num_steps) else trained.student_of(folder, num_steps)
        check_drawn(few_step, asked, had, "" if other is None else f", or step={other} for {num_steps}")
    scale = (asked.guidance or {}).get("scale", 1.0)
    if few_step and isinstance(few_step.guidance, float | int) and few_step.guidance != 1:
        scale = few_step.guidance
    return parts_of(asked), scale
