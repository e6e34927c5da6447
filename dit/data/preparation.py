"""The files of a sample as they are packed: its image untouched, or in another form; and what makes it unusable."""

import io
import json
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from dit.data import picture
from dit.data.caption import caption

EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # of what may stay as it is
READ = (*picture.FORMATS, "GIF", "BMP", "TIFF")  # the others can be written anew


class Form(NamedTuple):
    """How images are to be; those that are so already, and all if nothing is asked for, keep their bytes."""

    size: int | None = None
    format: str | None = None
    quality: int = 95

    def check(self) -> None:
        """See whether images can be so.

        Raises:
            ValueError: if not.
        """
        if self.size is not None and not (isinstance(self.size, int) and 1 <= self.size <= 2**13):
            raise ValueError(f"size={self.size}: give pixels from 1 to {2**13}, or null to keep images as they are")
        if self.format not in (None, "png", "jpg", "webp"):
            raise ValueError(f"format={self.format}: choose png, jpg, webp, or null to keep images as they are")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be from 1 to 100")


class Unusable(ValueError):
    """Why a sample cannot be packed: the reason and the details."""


def prepared(image: bytes, others: Mapping[str, bytes], source: str, form: Form) -> dict[str, bytes]:
    """The files of a sample, by their extension, as they are packed.

    Args:
        image: the file of its image.
        others: by their extension.
        source: where it comes from.
        form: how its image is to be.

    Raises:
        Unusable: if it cannot be packed.
    """
    if long := [extension for extension in others if len(extension.encode()) > 100]:
        raise Unusable("damaged", f"a file with the extension {long[0][:40]}...")
    if "txt" in others:
        _check_caption(others["txt"])
    if "cls" in others and not others["cls"].strip().isdigit():
        raise Unusable("no class", ascii(others["cls"][:80]))
    try:
        told = dict(json.loads(others.get("json", b"{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable("damaged", f"its .json: {error}") from error
    extension, data, (width, height) = _image(image, form)
    told = {"source": source, **told, "width": width, "height": height}  # its first source, if it was packed before
    return {extension: data, **others, "json": json.dumps(told).encode()}


def _check_caption(data: bytes) -> None:
    if not data.strip():
        raise Unusable("no caption", "it is empty")
    try:
        caption(data)
    except ValueError as error:
        raise Unusable("bad caption", str(error)) from error


def _image(data: bytes, form: Form) -> tuple[str, bytes, tuple[int, int]]:
    """The extension and bytes of an image in its form, and the size it had; every pixel must be readable."""
    try:
        with warnings.catch_warnings(), picture.opened(data, READ) as image:
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:  # Pillow raises many kinds for what is damaged
        raise Unusable("unreadable", str(error) if data else "it is empty") from error
    size, extension = image.size, EXTENSIONS.get(image.format or "")
    fits = form.size is None or size == (form.size, form.size)
    if fits and extension and form.format in (None, extension):
        return extension, data, size
    if form.size is form.format is None:
        raise Unusable("unsupported", f"{image.format}: write it anew with format=png")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if form.size:
        image = picture.centre_crop(image, form.size)
    file, extension = io.BytesIO(), form.format or "png"
    image.save(file, {"jpg": "JPEG"}.get(extension, extension), quality=form.quality)
    return extension, file.getvalue(), size
