import io
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import DIGITS, png, tar, write

from dit.data.digits import pack
from dit.data.image import decode, grid
from dit.data.picture import centre_crop
from dit.data.stream import Stream
from dit.data.webdataset import DataError, WebDataset


def test_digits_are_real_and_packed_once(digits_dir):
    train, held_out = digits_dir / "digits" / "train", digits_dir / "digits" / "held_out"
    data = Stream(str(train), **DIGITS, held_out=str(held_out), pack=pack)
    images, labels, others = data.read("train")["image"], data.read("train")["label"], data.read("held_out")["image"]
    assert (len(images), len(others)) == (1257, 540)
    assert labels.bincount().min() > 100 and len(labels.bincount()) == 10
    distances = torch.cdist(others.flatten(1).float(), images.flatten(1).float())
    assert (distances.min(1).values == 0).sum() == 0
    times = [path.stat().st_mtime_ns for path in sorted(train.iterdir())]
    data.prepare()
    assert times == [path.stat().st_mtime_ns for path in sorted(train.iterdir())]


def test_digits_of_an_older_version_are_indexed_again(tmp_path):
    pack(tmp_path / "train", tmp_path / "held_out")
    before = Stream(str(tmp_path / "train"), **DIGITS).fingerprint()
    for path in [*tmp_path.rglob("*.npz"), *tmp_path.rglob("*.json")]:
        path.unlink()
    assert Stream(str(tmp_path / "train"), **DIGITS).fingerprint() == before


# The webdataset package's own reader.


@pytest.fixture
def shards(tmp_path):
    """Five shards of ten, the last of three."""
    return write(tmp_path / "train")


def stream(folder, **options):
    return WebDataset(str(folder), **DIGITS, shuffle_buffer=7, **options)


def keys(folder, number, batch_size=4, seed=0, first_step=0, **options):
    batches = stream(folder, **options).batches(batch_size, seed, first_step)
    read = [list(batch["key"]) for batch in itertools.islice(batches, number)]
    batches.close()
    return read


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_shards_without_an_index_are_streamed(shards, num_workers):
    for path in [*shards.glob("*.npz"), *shards.glob("*.json")]:
        path.unlink()
    names = Counter(itertools.chain(*keys(shards, 43, num_workers=num_workers)))
    assert set(names) == {f"{i:08d}" for i in range(43)} and max(names.values()) < 10
    assert not list(shards.glob("*.json"))
    again = keys(shards, 10, num_workers=num_workers)
    assert again == keys(shards, 10, num_workers=num_workers) != keys(shards, 10, seed=1, num_workers=num_workers)
    batch = next(stream(shards, num_workers=num_workers, fields=["label", "caption"]).batches(5, seed=0))
    assert batch["image"].shape == (5, 1, 8, 8)
    for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True):
        assert image.unique().tolist() == [int(key)] and label == int(key) % 10


def test_devices_stream_shards_of_their_own(shards):
    read = [
        {key for batch in itertools.islice(stream(shards).batches(8, 0, lanes=2, rank=rank, world_size=2), 3)
         for key in batch["key"]}
        for rank in range(2)
    ]  # fmt: skip
    assert not read[0] & read[1] and len(read[0]) == 12
    with pytest.raises(ValueError, match=r"5 shards are fewer than the 6 readers of 2 devices"):
        next(stream(shards, num_workers=3).batches(8, 0, lanes=2, world_size=2))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"no image", "a.cls": b"1"}, "sample a of .*: its image cannot be read"),
        ({"a.png": png(1)}, r"has no label \(\.cls\)"),
        ({"a.cls": b"1"}, "has no image"),
        ({"a.png": png(1), "a.cls": b"10"}, "it has the class 10, but data.num_classes=10"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path, members, message):
    tar(tmp_path / "0.tar", members.items())
    with pytest.raises(DataError, match=message):
        next(stream(tmp_path).batches(1, seed=0))


def test_shards_without_samples_end_a_run(tmp_path):
    tar(tmp_path / "0.tar", [])
    with pytest.raises(DataError, match=r"there is no sample in .*0\.tar"):
        next(stream(tmp_path).batches(1, seed=0))


def test_folders_without_shards_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        stream(tmp_path / "nowhere").check()
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        stream(tmp_path).check()


def test_images_are_cropped_as_adm_does():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 40, 3), dtype=np.uint8))
    assert centre_crop(image, 16).size == (16, 16)
    assert centre_crop(image.resize((16, 16)), 16).tobytes() == image.resize((16, 16)).tobytes()
    file = io.BytesIO()
    image.save(file, "PNG")
    assert decode(file.getvalue(), 16, 3).shape == (3, 16, 16)
    assert decode(file.getvalue(), 16, 1).shape == (1, 16, 16)


def test_the_grid_keeps_every_image():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    picture = grid(images, columns=4)
    assert picture.shape == (3, 2 * 48 + 2, 4 * 48 + 3 * 2)
    assert set(picture.unique().tolist()) == {*range(7), 255}
