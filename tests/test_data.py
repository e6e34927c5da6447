import io
import itertools
import json
import resource
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dit.data import index
from dit.data.digits import pack
from dit.data.image import centre_crop, decode, encode_png, grid
from dit.data.pack import write_shards
from dit.data.webdataset import DataError, WebDataset

DIGITS = {"image_size": 8, "channels": 1, "num_classes": 10}


def png(value, size=8):
    return encode_png(torch.full((1, size, size), value, dtype=torch.uint8))


def files(i, label):
    return {"png": png(i), "cls": b"%d" % label, "txt": f" number {i}\n".encode()}


@pytest.fixture
def shards(tmp_path):
    """Five shards of ten, the last of three."""
    folder = tmp_path / "train"
    write_shards(folder, (files(i, i % 10) for i in range(43)), 10)
    return folder


def stream(folder, **options):
    return WebDataset(str(folder), **DIGITS, shuffle_buffer=7, **options)


def keys(folder, number, batch_size=4, seed=0, first_step=0, **options):
    batches = stream(folder, **options).batches(batch_size, seed, first_step)
    return [list(batch["key"]) for batch in itertools.islice(batches, number)]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_every_epoch_has_each_sample_once_in_a_new_order(shards, num_workers):
    names = list(itertools.chain(*keys(shards, 43, num_workers=num_workers)))  # four epochs
    epochs = [names[i : i + 43] for i in range(0, 4 * 43, 43)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"{i:08d}" for i in range(43))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_goes_on_from_any_step(shards, num_workers):
    whole = keys(shards, 30, num_workers=num_workers)
    for first in (1, 5, 10, 11, 21):
        assert keys(shards, 30 - first, first_step=first, num_workers=num_workers) == whole[first:]
    assert keys(shards, 30, seed=1, num_workers=num_workers) != whole


def test_a_batch_holds_images_and_classes(shards):
    batch = next(stream(shards).batches(5, seed=0))
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (5, 1, 8, 8)
    for key, image, label in zip(batch["key"], batch["image"], batch["label"], strict=True):
        assert image.unique().tolist() == [int(key)] and label == int(key) % 10


def test_flips_are_keyed_and_fresh_every_epoch(shards):
    image = torch.arange(8, dtype=torch.uint8).expand(1, 8, 8)
    folder = shards.parent / "ramps"
    write_shards(folder, ({"png": encode_png(image), "cls": b"0"} for _ in range(40)), 10)

    def flips(seed):
        """Which samples are mirrored, an epoch a row."""
        batches = itertools.islice(stream(folder, flip=True).batches(40, seed), 6)
        rows = []
        for batch in batches:
            row = dict(zip(batch["key"], (batch["image"][:, 0, 0, 0] == 7).tolist(), strict=True))
            rows.append([row[key] for key in sorted(row)])
        return torch.tensor(rows)

    first = flips(0)
    assert torch.equal(first, flips(0))
    assert 0.35 < first.float().mean() < 0.65
    agreement = [(a == b).float().mean().item() for a, b in itertools.combinations([*first, *flips(1)], 2)]
    assert min(agreement) > 0.1 and max(agreement) < 0.9 and abs(sum(agreement) / len(agreement) - 0.5) < 0.1


def test_digits_are_real_and_packed_once(digits_dir, tmp_path):
    train, held_out = digits_dir / "digits" / "train", digits_dir / "digits" / "held_out"
    data = WebDataset(str(train), **DIGITS, held_out=str(held_out), pack=pack)
    images, labels, others = data.read(train)["image"], data.read(train)["label"], data.read(held_out)["image"]
    assert (len(images), len(others)) == (1257, 540)
    assert labels.bincount().min() > 100 and len(labels.bincount()) == 10
    distances = torch.cdist(others.flatten(1).float(), images.flatten(1).float())
    assert (distances.min(1).values == 0).sum() == 0
    times = [path.stat().st_mtime_ns for path in sorted(train.iterdir())]
    data.prepare()
    assert times == [path.stat().st_mtime_ns for path in sorted(train.iterdir())]


def test_a_shard_cut_anywhere_is_found(tmp_path):
    folder = tmp_path / "one"
    write_shards(folder, (files(i, i) for i in range(3)), 10)
    path = folder / "000000.tar"
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    (folder / index.MANIFEST).unlink()
    for size in range(0, used + 1, 512):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"000000\.tar"):
            index.read(folder)
    path.write_bytes(whole[: 4 * 512] + b"x" + whole[4 * 512 + 1 :])  # a header in the middle
    with pytest.raises(ValueError, match="corrupt at byte"):
        index.read(folder)


def test_what_differs_from_the_manifest_is_found(shards):
    manifest = json.loads((shards / index.MANIFEST).read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [10, 10, 10, 10, 3]
    path = shards / "000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + b"!" + whole[701:])
    with pytest.raises(ValueError, match=r"000002\.tar is corrupt: its sha256"):
        stream(shards).check()
    path.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=r"000002\.tar is corrupt: \d+ bytes"):
        stream(shards).check()
    path.unlink()
    with pytest.raises(ValueError, match=r"000002\.tar of the manifest is missing"):
        stream(shards).check()


def test_shards_of_others_are_indexed_when_first_read(shards):
    (shards / index.MANIFEST).unlink()
    stream(shards).check()
    assert sum(shard.samples for shard in index.read(shards)) == 43


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        stream(tmp_path / "nowhere").check()
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        stream(tmp_path).check()
    with pytest.raises(ValueError, match="channels=2"):
        WebDataset("x", image_size=8, channels=2, num_classes=10)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"no image", "a.cls": b"1"}, "sample a of .* cannot be read"),
        ({"a.png": png(1)}, r"has no label: it needs a\.cls"),
        ({"a.cls": b"1"}, "has no image"),
        ({"a.png": png(1), "a.cls": b"10"}, "has the class 10, but data.num_classes=10"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path, members, message):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match=message):
        next(stream(tmp_path).batches(1, seed=0))


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


def test_workers_pass_on_more_embeddings_than_there_are_file_descriptors(tmp_path):
    def sample(i):
        file = io.BytesIO()
        np.save(file, np.full((3, 4), i, dtype=np.float16))
        return {"png": png(i % 250), "cls": b"1", "text.npy": file.getvalue()}

    write_shards(tmp_path / "shards", (sample(i) for i in range(400)), 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        stream_ = stream(tmp_path / "shards", fields=["label", "text"], num_workers=2)
        batches = stream_.batches(100, seed=0)
        for batch in itertools.islice(batches, 6):
            assert batch["text"].shape == (100,) and batch["text"][0].shape == (3, 4)
        batches.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
