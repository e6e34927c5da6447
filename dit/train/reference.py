"""Statistics of data, by which models are judged."""

from pathlib import Path
from typing import Any

import numpy as np

from dit.metric import statistics
from dit.metric.seen import Seen
from dit.train.judging import Look
from dit.train.world import World


def make_reference(path: Path, data: Any, split: str, look: Look, world: World, *, num_images: int, size: int) -> int:
    """Write what an extractor sees in a split, by all processes, in ADM's form.

    Args:
        path: of the `.npz`.
        data: a `Source`.
        split: `train` or `held_out`.
        look: the extractor.
        world: the processes.
        num_images: the first so many are written, too.
        size: images at a time.

    Returns:
        The number of images.
    """
    seen, images = Seen([layer for layer in statistics.LAYERS if layer in look.extractor.layers], ()), {}
    for number, samples in data.parts(split, size, world.rank, world.size):
        seen.add(number, look(samples["image"]))
        if number * size < num_images:
            images[number] = samples["image"].permute(0, 2, 3, 1).contiguous().numpy()
    if world.size > 1:
        seen.share(world.sum, world.gathered)
        images = {number: part for parts in world.gathered(images) for number, part in parts.items()}
    total = seen.moments["pool"].number
    if world.is_first:
        first = np.concatenate([images[number] for number in sorted(images)])[:num_images] if images else None
        about = {"extractor": look.about, "image_size": data.decoder.image_size, "number": total}
        statistics.write(path, seen.moments, first, about | {"split": split, "data": data.fingerprint()})
    return total
