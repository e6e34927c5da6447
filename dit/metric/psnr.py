"""How near drawn images are to the ones that were to be restored."""

import torch
from torch import Tensor

from dit.metric.subject import Samples, Subject, rows


@torch.no_grad()
def psnr(
    subject: Subject, train: Samples, held_out: Samples, *, num_images: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean square error), of held-out images as a model restores them.

    The error is averaged over images before the logarithm.

    Args:
        subject: a model that restores images: one that is told a picture of them, such as super-resolution, or an
            autoencoder.
        train: unused.
        held_out: the images.
        num_images: the first so many.
        seed: unused: samples have that of the evaluation.

    Returns:
        `psnr` of the drawn images, and of networks that see pixels `psnr_told`, of the picture that they are told, as
        far as it is one of their size: for super-resolution the bicubic enlargement. Both in dB.

    Raises:
        ValueError: if the model restores nothing.
    """
    check(subject)
    samples = rows(held_out, slice(num_images))
    images = samples["image"]
    figures = {"psnr": decibels(subject.draw(samples), images)}
    told = subject.told(samples).get("image")
    if told is not None and subject.shape == tuple(images.shape[1:]):
        before = ((told[:, : images.shape[1]].cpu() + 1) * 127.5).round()
        figures["psnr_told"] = decibels(before, images)
    return figures


def check(subject: Subject) -> None:
    """See that a model restores images.

    Raises:
        ValueError: if not.
    """
    if not subject.restores:
        raise ValueError(
            "metric=psnr judges autoencoders, and networks that restore the images they are told: choose metric=none, "
            "or another condition, like condition=superresolution"
        )


psnr.check = check  # type: ignore[attr-defined]


def decibels(images: Tensor, reference: Tensor) -> float:
    """10 log10(255^2 / mean square error), both (N, C, H, W) in 0..255, in dB."""
    error = (images.double() - reference.double()).square().mean()
    return (10 * (255**2 / error).log10()).item()
