"""From the files of a sample to what a batch holds."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dit.data.caption import caption
from dit.data.image import decode
from dit.data.shards import MAX_FILE_BYTES, BadSample

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class Augmentation(NamedTuple):
    """What is done to an image."""

    place: tuple[float, float] = (0.5, 0.5)  # of the crop, from left and from top in [0, 1]
    flip: bool = False


def label(data: bytes) -> int:
    """A class, in ASCII.

    Raises:
        ValueError: if it is no number.
    """
    if len(data) > 20 or not data.strip().isdigit():
        raise ValueError(f"the class {data[:20]!r} is no number")
    return int(data)


def array(data: bytes, dimensions: int) -> np.ndarray:
    """A .npy file of numbers.

    Raises:
        ValueError: if it has objects, other dimensions, or a header that promises more than there is.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, columns_first, dtype = read(file)
    if dtype.kind not in "fiub" or len(shape) != dimensions:
        raise ValueError(f"an array of shape {shape} and {dtype}, expected numbers in {dimensions} dimensions")
    if len(data) > MAX_FILE_BYTES or int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of shape {shape} and {dtype} in {len(data):,} bytes")
    # np.load would read the header once more, which takes longer than the numbers of a small array.
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if columns_first else "C").copy()


FIELDS: dict[str, tuple[str, Callable[[bytes], Any]]] = {  # by name: the file's extension, and what it holds
    "label": ("cls", label),
    "caption": ("txt", caption),
    "text": ("text.npy", lambda data: array(data, 2)),
    "pooled": ("pooled.npy", lambda data: array(data, 1)),
    "noise": ("noise.npy", lambda data: array(data, 3)),
}
LATENT, FLIPPED = "latent.npy", "latent_flipped.npy"


class Decoder:
    """From the files of a sample to `image`, uint8 (C, H, W), and fields; or to `latent` (K, c, h, w) and fields.

    Args:
        image_size: height and width.
        channels: 1 (grey) or 3 (RGB).
        num_classes: classes are 0..num_classes - 1.
        fields: of FIELDS, what is read beside the image.
        encoded: read what a VAE has made of the image instead of it.

    Raises:
        ValueError: if a number is out of range, or there is no such field.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int, fields: Sequence[str], encoded: bool = False):
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels} must be 1 (grey) or 3 (RGB)")
        for name, value in {"image_size": image_size, "num_classes": num_classes}.items():
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if unknown := [field for field in fields if field not in FIELDS]:
            raise ValueError(f"data.fields={list(fields)}: there is no {unknown[0]}; choose of {', '.join(FIELDS)}")
        if "noise" in fields and not encoded:
            raise ValueError(f"data.fields={list(fields)}: noise belongs to pairs, which data=pairs reads")
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.fields = tuple(fields)
        self.encoded = encoded
        self.latent_shape: tuple[int, ...] | None = None  # (c, h, w), if known

    def of_images(self) -> "Decoder":
        """The same of images that are not encoded, with the fields of images."""
        fields = [field for field in self.fields if field != "noise"]
        return Decoder(self.image_size, self.channels, self.num_classes, fields)

    def files(self, flip: bool = False) -> dict[str, tuple[str, ...]]:
        """What is read, by name: the extensions of which a sample has one."""
        image: dict[str, tuple[str, ...]] = {"image": IMAGE_EXTENSIONS}
        if self.encoded:
            image = {"latent": (FLIPPED if flip else LATENT,)}
        return image | {name: (FIELDS[name][0],) for name in self.fields}

    def __call__(self, key: str, files: Mapping[str, bytes], augmentation: Augmentation) -> dict[str, Any]:
        """A sample.

        Args:
            key: its name.
            files: by the names of `files`.
            augmentation: of the image.

        Raises:
            BadSample: saying why it cannot be used.
        """
        sample: dict[str, Any] = {"key": key}
        name = "image"
        try:
            for name, data in files.items():
                if name == "image":
                    sample[name] = decode(data, self.image_size, self.channels, *augmentation)
                elif name == "latent":
                    sample[name] = array(data, 4)
                    self._check_latent(sample[name])
                else:
                    sample[name] = FIELDS[name][1](data)
                    if name == "noise":
                        self._check_latent(sample[name][None])
        except Exception as error:  # Pillow and numpy raise many kinds
            raise BadSample(f"its {name} cannot be read: {error}") from error
        if not 0 <= sample.get("label", 0) < self.num_classes:
            raise BadSample(f"it has the class {sample['label']}, but data.num_classes={self.num_classes}")
        return sample

    def _check_latent(self, moments: np.ndarray) -> None:
        if self.latent_shape not in (None, moments.shape[1:]):
            raise ValueError(f"its shape is {moments.shape}, not (K, {', '.join(map(str, self.latent_shape or ()))})")
        if not np.isfinite(moments).all():
            raise ValueError("it has numbers that are not finite")


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples as one batch: images, latents, noise and labels as tensors, others as arrays of objects of any size."""
    batch: dict[str, Any] = {}
    for name in samples[0] if samples else ():
        values = [sample[name] for sample in samples]
        if name == "image":
            batch[name] = torch.stack(values)
        elif name in ("latent", "noise"):
            batch[name] = torch.from_numpy(np.stack(values))
        elif name == "label":
            batch[name] = torch.tensor(values)
        else:  # a worker passes tensors on by a file descriptor each, of which there are not enough
            batch[name] = np.empty(len(values), dtype=object)
            for i, value in enumerate(values):
                batch[name][i] = value
    return batch
