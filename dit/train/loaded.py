"""A run or an export, ready to draw."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from dit.latent.latent import Latent
from dit.train import saved, trained
from dit.train.build import parts_of
from dit.train.drawn import check_drawn


class Loaded(NamedTuple):
    """A run or an export, ready to be sampled."""

    parts: Any  # Parts, or those of an autoencoder
    denoiser: Any  # Denoiser, or what stands for it
    latent: Latent
    device: torch.device
    step: int  # of its weights
    scale: float  # of the guidance that is in what it draws


def load(
    folder: Path, path: Path, chosen: Mapping[str, Any], weights: str, device: torch.device | str = "cpu"
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
    parts, scale = parts_at(folder, path, chosen)
    denoiser = trained.load(parts, path, weights).to(device)
    at = trained.state_of(path).step
    return Loaded(parts, denoiser, parts.latent().to(device), torch.device(device), at, scale)


def parts_at(folder: Path, path: Path, chosen: Mapping[str, Any]) -> tuple[Any, float]:
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
