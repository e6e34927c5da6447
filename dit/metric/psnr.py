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
        subject: a model that is told a picture, such as super-resolution.
        train: unused.
        held_out: the images.
        num_images: the first so many.
        seed: unused: samples have that of the evaluation.

    Returns:
        `psnr` of the drawn images, and `psnr_told`, of the picture that the network is told, as far as it is one of
        their size: for super-resolution the bicubic enlargement. Both in dB.

    Raises:
        ValueError: if the network is told no picture, or does not see pixels.
    """
    samples = rows(held_out, slice(num_images))
    images = samples["image"]
    told = subject.told(samples).get("image")
    if told is None or subject.shape != tuple(images.shape[1:]):
        raise ValueError("metric=psnr is for networks that are told a picture, in pixels")
    before = ((told[:, : images.shape[1]].cpu() + 1) * 127.5).round()
    return {"psnr": decibels(subject.draw(samples), images), "psnr_told": decibels(before, images)}


psnr.told = ("image_channels",)  # type: ignore[attr-defined]


def decibels(images: Tensor, reference: Tensor) -> float:
    """10 log10(255^2 / mean square error), both (N, C, H, W) in 0..255, in dB."""
    error = (images.double() - reference.double()).square().mean()
    return (10 * (255**2 / error).log10()).item()
