"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that need no download."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dit.data.image import encode_png
from dit.data.writer import write_shards


def pack(path: Path, held_out: Path, samples_per_shard: int = 160) -> None:
    """Pack 1,257 digits for training into one folder of shards and the 540 others into another."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (1797, 1, 8, 8)
    splits = train_test_split(np.arange(len(pixels)), test_size=540, random_state=0)
    for folder, numbers in zip((path, held_out), splits, strict=True):
        if not folder.exists():
            write_shards(folder, _samples(pixels[numbers], digits.target[numbers]), samples_per_shard)


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _samples(pixels: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, bytes]]:
    for image, label in zip(pixels, labels, strict=True):
        caption = f"{'an' if label == 8 else 'a'} {NAMES[label]}"
        yield {"png": encode_png(torch.from_numpy(image)), "cls": b"%d" % label, "txt": caption.encode()}
