"""What extractors see in the data by which models are judged."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit.metric import statistics
from dit.metric.moments import Moments
from dit.metric.seen import Seen
from dit.train.look import Group, Look
from dit.train.world import World

ROWS = 10_000  # images of which the features themselves are kept; published figures have as many
SIZE = 256  # images at a time


def of_training_images(group: Group, data: Any, world: World, rank: int, size: int, cache: Path) -> Seen:
    """What is seen in the training images, by all processes; looked at once, and then read from the cache."""
    shape = {"image_size": data.decoder.image_size, "channels": data.decoder.channels}
    about = {"images": data.fingerprint_of_images("train"), **shape, **group.look.about}
    about |= {"moments": sorted(group.moments), "rows": sorted(group.reference_rows), "most": ROWS}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    file = cache / f"reference-{name}.safetensors"
    if world.once(lambda: file.exists() and _intact(file, group)):
        return _loaded(file, group)
    seen, total = group.begin(of_reference=True), data.count("train")
    for number, samples in data.parts("train", SIZE, rank, size):
        images = samples["image"]
        seen.add(number, group.look(images), chosen(number * SIZE, len(images), total, ROWS))
    if world.size > 1:
        seen.share(world, size)
    if world.is_first:
        with suppress(OSError):  # runs of others, that may only be read, are looked at anew
            cache.mkdir(parents=True, exist_ok=True)
            _store(file, seen, group)
    return seen


def of_statistics(group: Group, had: statistics.Statistics, where: str) -> Seen:
    """What a file says was seen, and what is seen in its images; `where` names it.

    Raises:
        ValueError: if its statistics are of other features, or lack some.
    """
    seen, looks = group.begin(of_reference=True), group.look
    for layer in group.moments & had.moments.keys():
        if (theirs := len(had.moments[layer].mean)) != (ours := looks.widths[layer]):
            raise ValueError(
                f"{where} has statistics of {theirs} features, but the extractor {looks.about['name']} sees "
                f"{ours}: choose the one it is of"
            )
    if had.images is not None and (group.reference_rows or group.moments - had.moments.keys()):
        for number, part in enumerate(torch.from_numpy(had.images).permute(0, 3, 1, 2).split(SIZE)):
            seen.add(number, looks(part))
    elif missing := group.moments - had.moments.keys():
        raise ValueError(
            f"{where} has no statistics of {missing.pop()} features, nor images (arr_0): give one that has, or leave "
            "reference=null, for the run's training images"
        )
    seen.moments |= {layer: had.moments[layer] for layer in group.moments & had.moments.keys()}
    return seen


def chosen(first: int, number: int, total: int | None, most: int) -> Tensor:
    """Which of some consecutive images are among `most` of all, evenly spaced; where nobody knows how many, the first.

    Args:
        first: the number of the first of them.
        number: how many they are.
        total: of all images.
        most: how many are wanted.

    Returns:
        (number,), bool.
    """
    i = torch.arange(first, first + number)
    if total is None or total <= most:
        return i < most
    return (i * most) // total != ((i + 1) * most) // total


def make_reference(path: Path, data: Any, split: str, look: Look, world: World, *, num_images: int) -> int:
    """Write what an extractor sees in a split, by all processes, in ADM's form.

    Args:
        path: of the `.npz`.
        data: a `Source`.
        split: `train` or `held_out`.
        look: the extractor.
        world: the processes.
        num_images: so many of the images, evenly spaced, are written, too.

    Returns:
        The number of images.
    """
    seen, images = Seen([layer for layer in statistics.LAYERS if layer in look.extractor.layers], ()), {}
    total = data.count(split)
    for number, samples in data.parts(split, SIZE, world.rank, world.size):
        seen.add(number, look(samples["image"]))
        some = samples["image"][chosen(number * SIZE, len(samples["image"]), total, num_images)]
        images[number] = some.permute(0, 2, 3, 1).contiguous().numpy()
    if world.size > 1:
        seen.share(world, world.size)
        images = {number: part for parts in world.gathered(images) for number, part in parts.items()}
    found = seen.moments["pool"].number
    if world.is_first:
        first = np.concatenate([images[number] for number in sorted(images)])
        about = {"extractor": look.about, "image_size": data.decoder.image_size, "number": found}
        about |= {"split": split, "data": data.fingerprint_of_images(split)}
        statistics.write(path, seen.moments, first if len(first) else None, about)
    return found


def _store(file: Path, seen: Seen, group: Group) -> None:
    tensors = {f"rows.{layer}": seen.rows(layer).contiguous() for layer in group.reference_rows}
    for layer, found in seen.moments.items():
        tensors |= {f"mean.{layer}": found.mean, f"scatter.{layer}": found.scatter}
    numbers = {layer: str(found.number) for layer, found in seen.moments.items()}
    partial = file.with_suffix(f".{os.getpid()}.tmp")  # another run may look at the same images
    save_file(tensors, partial, numbers)
    partial.replace(file)


def _intact(file: Path, group: Group) -> bool:
    try:
        return bool(_loaded(file, group).moments.keys() >= group.moments)
    except (OSError, SafetensorError, KeyError, ValueError):
        return False


def _loaded(file: Path, group: Group) -> Seen:
    seen = group.begin(of_reference=True)
    with safe_open(file, "pt") as stored:
        numbers = stored.metadata() or {}
        moments = {
            layer: Moments(
                int(numbers[layer]), stored.get_tensor(f"mean.{layer}"), stored.get_tensor(f"scatter.{layer}")
            )
            for layer in group.moments
        }
        seen.restore(moments, {layer: stored.get_tensor(f"rows.{layer}") for layer in group.reference_rows})
    return seen
