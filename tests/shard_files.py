"""Shards of the tests: samples whose image, class and caption tell their number, and tars of any members."""

import io
import tarfile

import torch

from dit.data.image import encode_png
from dit.data.writer import write_shards

DIGITS = {"image_size": 8, "channels": 1, "num_classes": 10}


def png(value, size=8):
    return encode_png(torch.full((1, size, size), value, dtype=torch.uint8))


def sample(i):
    return {"png": png(i % 256), "cls": b"%d" % (i % 10), "txt": f" number {i}\n".encode()}


def write(folder, number=43, samples_per_shard=10):
    write_shards(folder, (sample(i) for i in range(number)), samples_per_shard)
    return folder


def tar(path, members):
    """A tar of (name, bytes) or of TarInfo; nothing is checked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path
