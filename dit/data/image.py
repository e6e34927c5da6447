"""Image files to tensors and tensors to pictures."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 2**26  # of a file
MAX_PIXELS = 2**26  # that are decoded
MAX_ASPECT = 50  # long side over short side: the crop first brings the short side to size
MAX_PIXELS_PER_BYTE = 2000  # of images above a megapixel; a white page has a few hundred


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image file, whose header alone was read.

    Raises:
        ValueError: if it is none of PNG, JPEG and WebP, holds several pictures, or would be too large when decoded.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"an image file of {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there are limits of our own
        try:
            file = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"no image that can be read ({type(error).__name__}); PNG, JPEG and WebP are") from error
    with file:
        width, height = file.size
        pixels, kind = width * height, f"an image of {width:,} x {height:,} pixels"
        if pixels > MAX_PIXELS:
            raise ValueError(f"{kind}; at most {MAX_PIXELS:,} are decoded")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{kind}; one side may be at most {MAX_ASPECT} times the other")
        if pixels > max(10**6, MAX_PIXELS_PER_BYTE * len(data)):
            raise ValueError(f"{kind} in {len(data):,} bytes, which is suspiciously little")
        if getattr(file, "is_animated", False):
            raise ValueError(f"{kind} that move")
        yield file


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


def centre_crop(image: Image.Image, size: int, place: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A square of an image at the wanted size, as ADM prepares ImageNet (arXiv:2105.05233): the one in the centre.

    Halved by averaging while the short side is at least twice the size, then bicubic; an image of the right size is
    left untouched.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = int((image.width - size) * place[0]), int((image.height - size) * place[1])
    return image.crop((left, top, left + size, top + size))


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
