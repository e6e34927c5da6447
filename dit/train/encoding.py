"""From shards of images to shards of what a VAE, and a text encoder, make of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.condition.encoder import TextEncoder
from dit.data import index
from dit.data.caption import caption
from dit.data.image import decode
from dit.data.sample import FLIPPED, IMAGE_EXTENSIONS, LATENT
from dit.data.scan import Damage, lines
from dit.data.shards import BadSample, Shards
from dit.data.store import DataError
from dit.data.writer import write_shard
from dit.latent.latent import Latent
from dit.train.made import DTYPES, claim, clean, committed, name_of, npy, whole
from dit.weights.identity import sha256


class Encoding:
    """How shards are encoded: what their manifest will say, and the work on one of them.

    A shard of images becomes one of the same samples. In place of the image there is `.latent.npy`, (K, c, h, w), the
    moments of the posterior; with `flip` `.latent_flipped.npy`, too, those of the mirrored image; with a text encoder
    `.text.npy`, (at most L, W), of the tokens that are there, and `.pooled.npy`, (W,). Other files are kept.

    Args:
        shards: of the images.
        latent: the latent space, on the device that encodes.
        out: the folder of the encoded shards.
        image_size: height and width to which images are cropped.
        channels: of the images.
        text: reads captions; None: they are kept as they are.
        flip: encode the mirrored image, too.
        keep_images: keep the image beside.
        dtype: of what is written: float32, or float16, half as large and rounded.
        batch_size: images that are encoded at once.
        num_threads: that decode images.
        max_bad: the share of samples that may be bad, and are left out.

    Raises:
        ValueError: if there is no VAE, or out holds shards that were encoded otherwise.
    """

    def __init__(
        self,
        shards: Shards,
        latent: Latent,
        out: Path,
        *,
        image_size: int,
        channels: int,
        text: TextEncoder | None = None,
        flip: bool = False,
        keep_images: bool = False,
        dtype: str = "float32",
        batch_size: int = 64,
        num_threads: int = 1,
        max_bad: float = 0.001,
    ):
        self.shards, self.latent, self.out, self.text = shards, latent, out, text
        self.image_size, self.channels, self.flip, self.keep_images = image_size, channels, flip, keep_images
        self.dtype, self.batch_size, self.num_threads, self.max_bad = dtype, batch_size, num_threads, max_bad
        self.num_samples, self.num_shards, self.by = shards.total, len(shards.all), latent.name
        if not latent.name:
            raise ValueError("latent=pixels encodes nothing: choose a VAE, like latent=sd_vae")
        self.device = next(latent.parameters()).device
        self.about: dict[str, Any] = {
            "latent": {**space(latent, image_size, dtype), "flipped": flip},
            "source": "+".join(found.fingerprint for found in shards.indices),
        }
        if text is not None:
            self.about["text"] = {
                "name": text.name,
                "sha256": sha256(text.model),
                "width": text.width,
                "max_length": text.max_length,
            }
        claim(out, {**self.about, "keep_images": keep_images, "batch_size": batch_size}, shards.stores)
        self._lost = self._count_lost()

    def one(self, number: int) -> None:
        """Encode the shard of a number, unless it is there.

        Raises:
            DataError: if too many samples of all are bad.
        """
        self._check_lost()
        if self._done(number):
            return
        clean(self.out, number)
        bad: list[Damage] = []
        samples = self._samples(number, bad)
        if (first := next(samples, None)) is not None:
            write_shard(self.out / name_of(number), chain([first], samples))
        index.replace(self._left_out(number), lines(bad))  # last: it says that the shard is done
        self._lost += len(bad)
        self._check_lost()

    def _check_lost(self) -> None:
        if self._lost > self.max_bad * self.shards.total:
            files = [path for path in sorted(self.out.glob("*.left_out.jsonl")) if path.stat().st_size]
            first = json.loads(files[0].read_text().splitlines()[0])
            raise DataError(
                f"{self._lost:,} of {self.shards.total:,} samples cannot be encoded, more than data.max_bad="
                f"{self.max_bad} allows; the first is {first['sample']} of {first['shard']}: {first['reason']}; "
                f"all: {self.out}/*.left_out.jsonl. Mend them by dit pack, or raise it to go on without them"
            )

    def commit(self) -> index.Index | None:
        """Write the manifest if all shards are there; None if some are not yet.

        Raises:
            DataError: if too many samples of all are bad.
        """
        if not all(map(self._done, range(len(self.shards.all)))):
            return None
        self._lost = self._count_lost()
        self._check_lost()
        return committed(self.out, {**self.about, **({"left_out": self._lost} if self._lost else {})})

    def _left_out(self, number: int) -> Path:
        return self.out / f"{number:06d}.left_out.jsonl"

    def _count_lost(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.out.glob("*.left_out.jsonl"))

    def _done(self, number: int) -> bool:
        if not self._left_out(number).exists():
            return False
        lost = self._left_out(number).read_bytes().count(b"\n")
        kept = self.shards.all[number].samples - lost
        return not kept or whole(self.out, number, kept)

    def _samples(self, number: int, bad: list[Damage]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """The encoded samples of a shard; those that cannot be read are noted."""
        with ThreadPoolExecutor(self.num_threads) as pool:
            total = self.shards.all[number].samples
            for first in range(0, total, self.batch_size):
                some = range(first, min(first + self.batch_size, total))
                read = list(map(self._read, repeat(number), some))
                good = []
                for (key, files), image in zip(read, pool.map(self._image, read), strict=True):
                    if isinstance(image, Tensor):
                        good.append((key, files, image))
                    else:
                        bad.append(Damage(self.shards.all[number].name, key, image))
                if good:
                    yield from self._encoded(*map(list, zip(*good, strict=True)))

    def _read(self, number: int, sample: int) -> tuple[str, dict[str, bytes]]:
        """The key and the files of a sample; none, if one is too large."""
        try:
            return self.shards.key(number, sample), self.shards.whole(number, sample)
        except BadSample:
            return self.shards.key(number, sample), {}

    def _image(self, read: tuple[str, dict[str, bytes]]) -> Tensor | str:
        """The image of a sample, or why there is none."""
        _, files = read
        try:
            if not files:
                return "it has a file that is too large"
            data = next(files[extension] for extension in IMAGE_EXTENSIONS if extension in files)
            if self.text is not None:
                caption(files["txt"])
            return decode(data, self.image_size, self.channels)
        except StopIteration:
            return "it has no image"
        except KeyError:
            return "it has no caption"
        except Exception as error:  # Pillow raises many kinds
            return str(error)

    def _encoded(
        self, keys: list[str], files: list[dict[str, bytes]], images: list[Tensor]
    ) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        pixels = torch.stack(images).to(self.device).float() / 127.5 - 1
        made = {LATENT: self._moments(pixels)} | ({FLIPPED: self._moments(pixels.flip(-1))} if self.flip else {})
        if self.text is not None:
            captions = [caption(each["txt"]) for each in files]
            text, mask, pooled = (part.cpu() for part in self.text(captions, self.device))
            there = torch.tensor([bool(each) for each in captions])
            made["text.npy"] = [row[m & t].numpy() for row, m, t in zip(text, mask, there, strict=True)]
            made["pooled.npy"] = list((pooled * there[:, None]).numpy())
        dropped = () if self.keep_images else IMAGE_EXTENSIONS
        for i, key in enumerate(keys):
            kept = {extension: data for extension, data in files[i].items() if extension not in dropped}
            yield key, kept | {extension: npy(arrays[i], self.dtype) for extension, arrays in made.items()}

    def _moments(self, images: Tensor) -> list[np.ndarray]:
        return list(self.latent.moments(images).cpu().numpy())


def space(latent: Latent, image_size: int, dtype: str) -> dict[str, Any]:
    """What a manifest says of the latent space of its shards.

    Raises:
        ValueError: if there is no such dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    return {**identity(latent), "shape": list(latent.shape), "image_size": image_size, "dtype": dtype}


def identity(latent: Latent) -> dict[str, str]:
    """The name of a latent space and the SHA-256 of its weights; pixels have none."""
    return {"name": latent.name, "sha256": sha256(latent)} if latent.name else {"name": "pixels", "sha256": ""}


def check_encoded(
    about: Mapping[str, Any], own: Mapping[str, str], shape: Sequence[int], image_size: int, path: str
) -> None:
    """See whether encoded shards are of this latent space.

    Args:
        about: what their manifest says.
        own: the identity of a run's latent space.
        shape: of that space, (c, h, w).
        image_size: of the images, as a run has it.
        path: the folder, for the message.

    Raises:
        ValueError: if they are not.
    """
    encoded = about["latent"]
    if encoded["sha256"] != own["sha256"]:
        raise ValueError(
            f"data.path={path} was encoded by {encoded['name']}, whose weights are others than those of latent.name="
            f"{own['name']} (sha256 {encoded['sha256'][:8]} and {own['sha256'][:8]}): take the same VAE, or encode anew"
        )
    for key, value in {"image_size": image_size, "shape": list(shape)}.items():
        if encoded[key] != value:
            raise ValueError(f"data.path={path} was encoded with {key}={encoded[key]}, but the run has {value}")
