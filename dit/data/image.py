"""Image files to tensors and tensors to pictures."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dit.data.picture import centre_crop, opened


def decode(
    data: bytes, size: int, channels: int, place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """The pixels of an image file, cropped to a square: uint8 (channels, size, size).

    Args:
        data: of the file.
        size: height and width.
        channels: 1 (grey) or 3 (RGB).
        place: where the square is cut, in [0, 1] from left and from top.
        flip: mirror left and right.

    Raises:
        ValueError: if the file cannot be decoded.
    """
    with opened(data) as file:
        image = centre_crop(file.convert({1: "L", 3: "RGB"}[channels]), size, place)
    pixels = np.array(image).reshape(size, size, channels)
    return torch.from_numpy(np.ascontiguousarray((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)))


def decode_mask(data: bytes, size: int) -> Tensor:
    """Where an image file, cropped like any other, is white: bool (size, size)."""
    return decode(data, size, 1)[0] >= 128


def outpainted(data: bytes, size: int, channels: int, margins: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An image file fitted between margins (left, top, right, bottom) that are to be drawn, in pixels.

    Returns:
        uint8 (channels, size, size), grey in the margins, and bool (size, size), true there.
    """
    left, top, right, bottom = margins
    width, height = size - left - right, size - top - bottom
    with opened(data) as file:
        inner = ImageOps.fit(file.convert({1: "L", 3: "RGB"}[channels]), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.full((channels, size, size), 128, dtype=torch.uint8)
    mask = torch.ones(size, size, dtype=torch.bool)
    inside = torch.from_numpy(np.array(inner).reshape(height, width, channels).transpose(2, 0, 1).copy())
    pixels[:, top : top + height, left : left + width] = inside
    mask[top : top + height, left : left + width] = False
    return pixels, mask


def encode_png(pixels: Tensor) -> bytes:
    """A PNG file of uint8 pixels (C, H, W), C = 1 or 3."""
    array = pixels.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "PNG")
    return file.getvalue()


def grid(images: Tensor, columns: int, min_side: int = 48) -> Tensor:
    """Images side by side with a thin gap, small ones enlarged: uint8 (N, C, H, W) -> (C, height, width)."""
    zoom = max(1, math.ceil(min_side / images.shape[-1]))
    images = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    number, channels, height, width = images.shape
    rows = math.ceil(number / columns)
    gap = max(1, width // 24)
    canvas = images.new_full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas
