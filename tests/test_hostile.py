"""Data that were made to do harm: refused at once, and nothing is run, written or filled with memory."""

import io
import pickle
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import DIGITS, png, sample, tar

from dit.data import index
from dit.data.image import decode
from dit.data.sample import Augmentation, BadSample, Decoder
from dit.data.stream import Stream

MAX_MILLISECONDS = 50


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def quickly(function, error, message):
    """The function is refused in under 50 ms, the shortest of three attempts."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(error, match=message):
            function()
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < MAX_MILLISECONDS / 1000, seconds


def header(width, height, depth=1, colour=0):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side):
    squeeze, rows = zlib.compressobj(9), bytes((1 + side // 8) * 1000)
    data = b"".join(squeeze.compress(rows) for _ in range(side // 1000)) + squeeze.flush()
    return header(side, side) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif_bomb(frames=20000):
    file = io.BytesIO()
    Image.new("P", (100, 100)).save(file, "GIF")
    whole = file.getvalue()
    frame = whole[whole.index(b",") : -1]
    return whole[:-1] + frame * (frames - 1) + b";"


def animated(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind, save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    return file.getvalue()


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/a.png", "a\nb.png", "a\x1b[2J.png", "a" * 300 + ".png"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    tar(tmp_path / "shards" / "0.tar", [("good.png", png(1)), (name, png(1))])
    quickly(lambda: index.write(tmp_path / "shards"), ValueError, "its name ")
    found = index.write(tmp_path / "shards", lenient=True)
    assert found.shards[0].samples == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("a.png")
    member.type, member.linkname = kind, "/etc/passwd"
    tar(tmp_path / "0.tar", [("good.png", png(1)), (member, b"")])
    quickly(lambda: index.write(tmp_path), ValueError, "it is a (link|device)")
    assert index.write(tmp_path, lenient=True).shards[0].samples == 1


def test_pickles_are_never_read(tmp_path):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Touch(marker))
    array = np.empty(1, dtype=object)
    array[0] = Touch(marker)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    members = {**sample(0), "pkl": evil, "pyd": evil, "pth": evil, "text.npy": file.getvalue()}
    tar(tmp_path / "shards" / "0.tar", [(f"a.{extension}", data) for extension, data in members.items()])
    batch = next(Stream(str(tmp_path / "shards"), **DIGITS).batches(1, 0))
    assert set(batch) == {"key", "image", "label"}
    data = Stream(str(tmp_path / "shards"), **DIGITS, fields=["text"])
    data.check()
    quickly(data.first, ValueError, "its text cannot be read: an array of shape .* and object")
    tar(tmp_path / "shards" / "0.tar", [("a.png", evil), ("a.cls", b"1")])
    (tmp_path / "shards" / index.MANIFEST).unlink()
    quickly(Stream(str(tmp_path / "shards"), **DIGITS).first, ValueError, "its image cannot be read")
    table = tmp_path / "shards" / "0.index.npz"
    np.savez(table, keys=array, extensions=array, offsets=array, sizes=array, bytes=1, sha256="")
    with pytest.raises(ValueError, match="missing or damaged"):
        Stream(str(tmp_path / "shards"), **DIGITS).first()
    assert not marker.exists()


@pytest.mark.parametrize("path", ["pipe:touch marker", "pipe:touch marker #.tar", "$(touch marker)", "; touch marker"])
def test_names_are_never_run_by_a_shell(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    quickly(lambda: Stream(path, **DIGITS).check(), ValueError, "no place for data|does not exist")
    assert not list(tmp_path.iterdir())
    evil = tmp_path / "shards" / f"{path.replace('/', '')}.tar"
    tar(evil, [(f"a.{extension}", data) for extension, data in sample(3).items()])
    assert next(Stream(str(tmp_path / "shards"), **DIGITS).batches(1, 0))["label"] == 3
    assert not list(tmp_path.rglob("marker"))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: png_bomb(30000), "no image that can be read .DecompressionBombError"),
    (lambda: png_bomb(8000), "8,000 x 8,000 pixels in [0-9,]+ bytes, which is suspiciously little"),
    (lambda: png_bomb(9000), "9,000 x 9,000 pixels; at most 67,108,864"),
    (lambda: header(2**31 - 1, 2**31 - 1), "no image that can be read"),
    (lambda: header(1, 10**7, 8) + chunk(b"IDAT", b"x" * 10**5), "one side may be at most 50 times the other"),
    (gif_bomb, "no image that can be read"),
    (lambda: animated("PNG"), "that move"),
    (lambda: animated("WEBP"), "that move"),
    (lambda: b"", "no image that can be read"),
    (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
    (lambda: bytes(2**26 + 1), "an image file of 67,108,865 bytes"),
])  # fmt: skip
def test_images_that_would_fill_memory_are_refused(make, message):
    data = make()
    quickly(lambda: decode(data, 8, 3), ValueError, message)
    decoder = Decoder(**DIGITS, fields=[])
    quickly(lambda: decoder("a", {"image": data}, Augmentation()), BadSample, message)


def test_the_large_bomb_is_small():
    assert len(png_bomb(30000)) < 150_000


def npy(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)


@pytest.mark.parametrize(("field", "data", "message"), [
    ("caption", b"a\0b", "control characters"),
    ("caption", b"a\x1b[2Jb", "control characters"),
    ("caption", b"a" * 10**6, "a caption of 1,000,000 bytes"),
    ("caption", b"\xff\xfe", "codec can't decode"),
    ("label", b"1" * 5000, "is no number"),
    ("label", b"one", "is no number"),
    ("label", b"-1", "is no number"),
    ("text", npy((10**9, 10**3)), "an array of shape"),
    ("text", npy((16,)), "expected numbers in 2 dimensions"),
    ("text", b"\x93NUMPY\x01\x00\xff\xff{", "cannot be read"),
    ("text", b"", "cannot be read"),
])  # fmt: skip
def test_fields_that_are_none_are_refused(field, data, message):
    decoder = Decoder(**DIGITS, fields=["label", "caption", "text"])
    quickly(lambda: decoder("a", {field: data}, Augmentation()), BadSample, message)


def test_large_true_images_are_read():
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1500, 3), dtype=np.uint8)
    for picture, kind in [(noise, "JPEG"), (noise, "WEBP"), (np.full((3000, 4000, 3), 255, np.uint8), "PNG")]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, kind)
        assert decode(file.getvalue(), 64, 3).shape == (3, 64, 64)


def progressive(scans):
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    begin = data.rindex(b"\xff\xda")
    return data[:begin] + data[begin:-2] * scans + data[-2:]


def test_a_jpeg_of_many_scans_is_refused():
    quickly(lambda: decode(progressive(2000), 8, 1), ValueError, "in more than 100 scans")
    assert decode(progressive(1), 8, 1).shape == (1, 8, 8)


def test_pixels_of_more_than_eight_bits_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 32000, dtype=np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(file.getvalue(), 8, 1)


@pytest.mark.parametrize("kind", ["header", "pax"])
def test_members_that_lead_back_end_the_scan(tmp_path, kind):
    path = tar(tmp_path / "0.tar", [(f"{i}.png", png(i)) for i in range(3)])
    data = bytearray(path.read_bytes())
    begin = data.index(b"1.png\0")
    if kind == "header":
        data[begin + 124 : begin + 136] = (-1536 % 256**12).to_bytes(12, "big")  # base 256, negative
        data[begin + 148 : begin + 156] = b" " * 8
        data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])
        path.write_bytes(data)
    else:
        member = tarfile.TarInfo("x.png")
        member.pax_headers = {"size": "-1536"}
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
            for i in range(3):
                other = tarfile.TarInfo(f"{i}.png")
                other.size = 4
                file.addfile(other, io.BytesIO(b"1234"))
            file.addfile(member)
    quickly(lambda: index.write(tmp_path), ValueError, "0.tar: (corrupt|cut) at byte")


def test_files_are_not_read_whole_to_be_refused(tmp_path):
    folder = tmp_path / "shards"
    tar(folder / "0.tar", [("a.png", png(1)), ("a.cls", b"1"), ("a.txt", bytes(10**7))])
    data = Stream(str(folder), **DIGITS, fields=["caption"])
    data.check()
    quickly(data.first, ValueError, "its caption has 10,000,000 bytes; at most 16,384")


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    folder = tmp_path / "shards"
    tar(folder / "0.tar", [("a.png", png(1)), ("a.cls", b"1")])
    index.write(folder)
    manifest, table = folder / index.MANIFEST, folder / "0.index.npz"
    before = manifest.read_text()
    for name in ("../0.tar", "/etc/0.tar", ".0.tar"):
        manifest.write_text(before.replace('"0.tar"', f'"{name}"'))
        with pytest.raises(ValueError, match="leads out of the folder"):
            index.read(folder)
    manifest.write_text(before.replace('"format": 3', '"format": 99'))
    with pytest.raises(ValueError, match="of a later version, 99"):
        index.read(folder)
    manifest.write_text(before)
    with np.load(table) as arrays:
        np.savez_compressed(folder / "bomb.npz", **{**arrays, "more": np.zeros(10**7)})
    (folder / "bomb.npz").replace(table)
    quickly(Stream(str(folder), **DIGITS).first, ValueError, r"0\.index\.npz is missing or damaged")
