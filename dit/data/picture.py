"""Image files and their crops, without torch."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 2**26  # of a file
MAX_PIXELS = 2**26  # that are decoded
MAX_ASPECT = 50  # long side over short side: the crop first brings the short side to size
MAX_SCANS = 100  # of a progressive JPEG, each of which is a pass over all pixels
MAX_PIXELS_PER_BYTE = 2000  # of images above a megapixel; a white page has a few hundred


@contextmanager
def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """An image file, whose header alone was read.

    Raises:
        ValueError: if it is of none of these formats, holds several pictures, or would be too large when decoded.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"an image file of {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are limits of our own
        try:
            file = Image.open(io.BytesIO(data), formats=formats)
        except Exception as error:  # Pillow raises many kinds
            kinds = ", ".join(formats)
            raise ValueError(f"no image that can be read ({type(error).__name__}); {kinds} are") from error
    with file:
        width, height = file.size
        pixels, kind = width * height, f"an image of {width:,} x {height:,} pixels"
        if pixels > MAX_PIXELS:
            raise ValueError(f"{kind}; at most {MAX_PIXELS:,} are decoded")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{kind}; one side may be at most {MAX_ASPECT} times the other")
        if pixels > max(10**6, MAX_PIXELS_PER_BYTE * len(data)):
            raise ValueError(f"{kind} in {len(data):,} bytes, which is suspiciously little")
        if file.mode[0] in "IF":
            raise ValueError(f"{kind} of more than 8 bits a channel (mode {file.mode})")
        if data.count(b"\xff\xda") > MAX_SCANS and file.format in ("JPEG", "MPO"):
            raise ValueError(f"{kind} in more than {MAX_SCANS} scans")
        if getattr(file, "is_animated", False) and file.format != "MPO":  # a phone's JPEG with a preview behind it
            raise ValueError(f"{kind} that move")
        yield file


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
