import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_conf import dit

from dit.data import index
from dit.data.image import decode
from dit.data.input import NOTES
from dit.data.pack import pack
from dit.data.store import DataError, Store


def image(number, format="PNG", size=(9, 7), mode="RGB"):
    """The bytes of an image that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def classes(tmp_path):
    """Twelve images in three classes."""
    names = [f"{c}/{'deep/' if i % 2 else ''}{i}.png" for c in ("eel", "ant", "cat") for i in range(4)]
    return write(tmp_path / "classes", {name: image(i) for i, name in enumerate(names)})


@pytest.fixture
def flat(tmp_path):
    return write(tmp_path / "flat", {f"{i}.png": image(i) for i in range(5)})


def samples(folder):
    """Files by extension of every sample, by key; read by the index."""
    found = {}
    for shard in index.read(folder).shards:
        table = index.table(Store(str(folder)), shard)
        data = (folder / shard.name).read_bytes()
        for key, offsets, sizes in zip(table.keys, table.offsets, table.sizes, strict=True):
            places = zip(table.extensions, offsets, sizes, strict=True)
            found[key.decode()] = {name: data[at : at + size] for name, at, size in places if at >= 0}
    return found


def by_source(folder):
    return {json.loads(files["json"])["source"]: files for files in samples(folder).values()}


def report(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_class_folders_keep_their_bytes(classes, tmp_path, monkeypatch):
    assert len(pack(classes, tmp_path / "least", num_workers=1).shards) == 12  # of 16 that are wanted
    monkeypatch.setattr("dit.data.pack.MIN_SHARDS", 1)
    out = tmp_path / "out"
    found = pack(classes, out, shard_bytes=10_000, num_workers=1)
    packed = by_source(out)
    assert set(packed) == {str(path.relative_to(classes)) for path in classes.rglob("*.png")}
    for source, files in packed.items():
        assert files["png"] == (classes / source).read_bytes()
        assert int(files["cls"]) == ["ant", "cat", "eel"].index(source.split("/")[0])
        assert json.loads(files["json"]) == {"width": 9, "height": 7, "source": source}
    assert json.loads((out / "classes.json").read_text()) == found.about["classes"] == ["ant", "cat", "eel"]
    assert sorted(samples(out)) == [f"{i:08d}" for i in range(12)]
    assert [shard.samples for shard in found.shards] == [3, 3, 3, 3]
    assert not list(out.glob("*.done*")) and not report(out)


def test_the_shuffle_is_keyed(classes, tmp_path):
    def order(name, **options):
        pack(classes, tmp_path / name, num_workers=1, **options)
        return [json.loads(files["json"])["source"] for files in samples(tmp_path / name).values()]

    first = order("a", seed=3)
    assert first == order("b", seed=3) != order("c", seed=4)
    assert sorted(first) == order("d", shuffle=False) != first


def test_held_out_images_are_no_others(classes, tmp_path):
    for shuffle in (True, False):
        out, held_out = tmp_path / f"out{shuffle}", tmp_path / f"held{shuffle}"
        pack(classes, out, held_out=held_out, num_held_out=4, shuffle=shuffle, num_workers=1)
        one, other = set(by_source(out)), set(by_source(held_out))
        assert (len(one), len(other), len(one & other)) == (8, 4, 0)
    assert set(by_source(tmp_path / "heldTrue")) == other


def test_images_are_cropped_and_written_anew_if_asked(tmp_path):
    source = write(tmp_path / "in", {"a.png": image(1, size=(40, 30)), "b.jpg": image(2, "JPEG", (16, 16))})
    write(source, {"c.gif": image(3, "GIF"), "d.webp": image(4, "WEBP", mode="RGBA"), "e.png": image(5, mode="L")})

    def packed(**options):
        out = tmp_path / str(options)
        pack(source, out, num_workers=1, max_broken=0.2, **options)
        return by_source(out), report(out)

    kept, problems = packed()
    assert [set(kept[name]) - {"json"} for name in ("a.png", "b.jpg", "d.webp")] == [{"png"}, {"jpg"}, {"webp"}]
    [problem] = problems
    assert (problem["reason"], problem["source"]) == ("unsupported", "c.gif") and "format=png" in problem["detail"]
    small, problems = packed(size=16)
    assert not problems and small["b.jpg"]["jpg"] == kept["b.jpg"]["jpg"]  # is so already
    for name in ("a.png", "c.gif", "d.webp", "e.png"):
        with Image.open(io.BytesIO(small[name]["png"])) as file:
            assert file.size == (16, 16) and file.mode == ("L" if name == "e.png" else "RGB")
    assert json.loads(small["a.png"]["json"])["width"] == 40
    anew, problems = packed(format="jpg", quality=50)
    assert not problems and anew["b.jpg"]["jpg"] == kept["b.jpg"]["jpg"]
    assert all(Image.open(io.BytesIO(files["jpg"])).format == "JPEG" for files in anew.values())
    assert Image.open(io.BytesIO(packed(size=8, format="webp")[0]["a.png"]["webp"])).size == (8, 8)


def test_what_is_packed_is_what_the_reader_sees(tmp_path):
    source = write(tmp_path / "in", {"a.png": image(1, size=(40, 30)), "b.jpg": image(2, "JPEG", (31, 70))})
    write(source, {"c.webp": image(3, "WEBP", (16, 50)), "d.png": image(4, mode="L"), "e.png": image(5, mode="P")})
    pack(source, tmp_path / "untouched", num_workers=1)
    pack(source, tmp_path / "cropped", size=16, num_workers=1)
    untouched, cropped = by_source(tmp_path / "untouched"), by_source(tmp_path / "cropped")
    for name, files in untouched.items():
        assert torch.equal(decode(files[name.split(".")[1]], 16, 3), decode(cropped[name]["png"], 16, 3))


CAPTIONS = {
    "list.json": json.dumps([{"file_name": f"{i}.png", "text": f"ü {i}", "label": i} for i in range(5)]),
    "map.json": json.dumps({f"{i}.png": f"ü {i}" for i in range(5)}),
    "lines.jsonl": "".join(json.dumps({"image": f"{i}.png", "caption": f"ü {i}"}) + "\n" for i in range(5)),
    "table.csv": "file,caption,class\r\n" + "".join(f'{i}.png,"ü {i}",{"ab"[i % 2]}\r\n' for i in range(5)),
    "named.csv": "bild,wort\n" + "".join(f"./{i}.png,ü {i}\n" for i in range(5)),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_from_files(name, flat, tmp_path):
    (tmp_path / name).write_text(CAPTIONS[name], encoding="utf-8")
    columns = {"image": "bild", "caption": "wort"} if name == "named.csv" else {}
    found = pack(flat, tmp_path / "out", captions=str(tmp_path / name), columns=columns, num_workers=1)
    packed = by_source(tmp_path / "out")
    assert {source: files["txt"].decode() for source, files in packed.items()} == {
        f"{i}.png": f"ü {i}" for i in range(5)
    }
    labels = {"list.json": b"3", "table.csv": b"1"}.get(name)
    assert packed["3.png"].get("cls") == labels
    assert found.about.get("classes") == (["a", "b"] if name == "table.csv" else None)


def test_captions_beside_images_and_bad_ones_reported(flat, tmp_path):
    texts = {"0": "ä".encode(), "1": b"\xff\xfe", "2": b"a\0b", "3": b"x" * 2**15}
    write(flat, {f"{name}.txt": text for name, text in texts.items()} | {"5.png": image(5), "5.txt": b" \n"})
    with pytest.raises(DataError, match=r"1 of 6 samples cannot be packed.*\n.*4\.png"):  # said before any is written
        pack(flat, tmp_path / "out", captions="txt", num_workers=1)
    pack(flat, tmp_path / "out", captions="txt", max_broken=1, num_workers=1)
    assert {source: files["txt"] for source, files in by_source(tmp_path / "out").items()} == {"0.png": "ä".encode()}
    reasons = {problem["source"]: problem["reason"] for problem in report(tmp_path / "out")}
    assert reasons == {f"{i}.png": "no caption" if i in (4, 5) else "bad caption" for i in range(1, 6)}


def test_captions_that_are_lacking_or_several(flat, tmp_path):
    rows = [{"file": "0.png", "caption": ["one", "two"]}, {"file": "0.png", "caption": "three"}]
    rows += [
        {"file": "1.png", "caption": None},
        {"file": "2.png", "caption": "\ud800"},
        {"file": "4.png", "caption": "x"},
    ]
    (flat / "captions.json").write_text(json.dumps(rows))
    pack(flat, tmp_path / "out", captions="captions.json", max_broken=0.6, num_workers=1)
    assert {source: files["txt"] for source, files in by_source(tmp_path / "out").items()} == {
        "0.png": b"one",
        "4.png": b"x",
    }
    found = sorted((problem["source"], problem["reason"]) for problem in report(tmp_path / "out"))
    assert found == [
        ("0.png", "told again"),
        ("0.png", "told again"),
        ("1.png", "no caption"),
        ("2.png", "bad caption"),
        ("3.png", "no caption"),
    ]


def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": image(i, "JPEG"), "path": None} for i in range(6)], "label": [i % 2 for i in range(6)]}
    rows["text"] = [f"number {i}" for i in range(5)] + [None]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["odd", "even"])}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({**kinds, "text": datasets.Value("string")}))
    data.save_to_disk(tmp_path / "in")
    found = pack(tmp_path / "in", tmp_path / "out", max_broken=0.2, num_workers=1)
    packed = by_source(tmp_path / "out")
    assert {source: files["jpg"] for source, files in packed.items()} == {
        f"row {i}": image(i, "JPEG") for i in range(5)
    }
    assert packed["row 3"]["cls"] == b"1" and packed["row 3"]["txt"] == b"number 3"
    assert found.about["classes"] == ["odd", "even"]
    assert [(p["source"], p["reason"]) for p in report(tmp_path / "out")] == [("row 5", "no caption")]
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="several splits, train: give one"):
        pack(tmp_path / "both", tmp_path / "out2")
    renamed = data.rename_column("label", "kind").cast_column("kind", datasets.Value("int64"))
    renamed.save_to_disk(tmp_path / "renamed")
    pack(tmp_path / "renamed", tmp_path / "out3", columns={"label": "kind"}, max_broken=0.2, num_workers=1)
    assert by_source(tmp_path / "out3")["row 3"]["cls"] == b"1"
    with pytest.raises(
        ValueError, match=r"columns\.caption=nope: there is no such column; choose one of image, kind, text"
    ):
        pack(tmp_path / "renamed", tmp_path / "out4", columns={"caption": "nope"})
    with pytest.raises(ValueError, match="0 columns of images named text; of its columns"):
        pack(tmp_path / "renamed", tmp_path / "out4", columns={"image": "text"})


def test_tars_of_other_tools_are_mended(tmp_path):
    def tar(name, members):
        with tarfile.open(tmp_path / "in" / name, "w") as file:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    (tmp_path / "in").mkdir()
    extra = {"a.json": b'{"url": "x", "width": 1}', "a.t5.npy": b"numbers"}
    tar("0.tar", {"a.JPEG": image(0, "JPEG"), "a.cls": b"7", "a.txt": b"one", **extra})
    tar("1.tar", {"a.png": image(1), "a.cls": b"8", "a.txt": b"two", "b.png": b"none", "b.cls": b"1", "b.txt": b"x"})
    tar("2.tar", {"c.png": image(2), "c.txt": b"no class", "d.png": image(3), "d.jpg": image(4), "../e.png": b""})
    pack(tmp_path / "in", tmp_path / "out", shuffle=False, max_broken=1, num_workers=1)
    first, second = samples(tmp_path / "out").values()
    assert first["jpg"] == image(0, "JPEG") and (first["cls"], first["txt"], first["t5.npy"]) == (
        b"7",
        b"one",
        b"numbers",
    )
    assert json.loads(first["json"]) == {"url": "x", "width": 9, "height": 7, "source": "0.tar/a"}
    assert second["png"] == image(1) and list(samples(tmp_path / "out")) == ["00000000", "00000001"]
    found = {problem["source"]: problem["reason"] for problem in report(tmp_path / "out")}
    assert found == {
        "1.tar/b": "unreadable",
        "2.tar/c": "no class",
        "2.tar/d": "damaged",
        "2.tar/../e.png": "damaged",
    }
    tars = [str(tmp_path / "in" / name) for name in ("1.tar", "0.tar")]
    pack(tars, tmp_path / "listed", shuffle=False, max_broken=1, num_workers=1)
    assert [files["txt"] for files in samples(tmp_path / "listed").values()] == [b"two", b"one"]


def bomb():
    """A PNG of 30,000 x 30,000 pixels in few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_what_is_broken_or_twice_is_named(classes, tmp_path):
    write(classes, {"ant/bomb.png": bomb(), "ant/cut.png": image(50, size=(64, 64))[:3000], "ant/none.jpg": b""})
    write(classes, {"cat/twin.png": image(0), "cat/note.pdf": b"x", "cat/.hidden.png": b"x", "void/x.txt": b""})
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(file, "PNG")
    write(classes, {"eel/deep.png": file.getvalue()})
    (classes / "eel" / "out.png").symlink_to(write(tmp_path / "else", {"x.png": image(60)}) / "x.png")
    (classes / "eel" / "within.png").symlink_to(classes / "eel" / "0.png")
    (classes / "link").symlink_to(tmp_path / "else")
    with pytest.raises(DataError, match=r"6 of 20 samples cannot be packed(.*\n)*.*max_broken=0\.3$"):
        pack(classes, tmp_path / "out", max_broken=0.2, num_workers=1, shuffle=False)
    assert not (tmp_path / "out" / "manifest.json").exists()
    pack(classes, tmp_path / "out", max_broken=0.3, num_workers=1, shuffle=False)
    found = {problem["source"]: problem["reason"] for problem in report(tmp_path / "out")}
    assert found == {
        "ant/bomb.png": "unreadable",
        "ant/cut.png": "unreadable",
        "ant/none.jpg": "unreadable",
        "eel/deep.png": "unreadable",
        "eel/out.png": "a link",
        "link": "a link",
        "eel/0.png": "duplicate",
        "eel/within.png": "duplicate",
        "cat/note.pdf": "not an image",
        "void/x.txt": "not an image",
        "void": "an empty class",
        "cat/.hidden.png": "hidden",
    }
    assert {reason for reason in found.values() if reason in NOTES} == set(NOTES) - {"told again"}
    packed = samples(tmp_path / "out")
    assert len(packed) == 14 and max(packed) == "00000017"  # numbers do not move
    twice = next(p for p in report(tmp_path / "out") if p["source"] == "eel/0.png")
    assert packed[twice["detail"][-8:]]["png"] == packed[twice["key"]]["png"] == image(0)
    assert {int(files["cls"]) for files in packed.values()} == {0, 1, 2}


def test_processes_and_restarts_do_not_change_a_byte(tmp_path):
    source = write(tmp_path / "in", {f"{i:03d}.png": image(i, size=(96, 96)) for i in range(240)})
    write(source, {"100.png": b"broken", "200.png": image(7, size=(96, 96))})
    options = {"shard_bytes": 200_000, "num_held_out": 20, "size": 64}
    pack(source, tmp_path / "out", held_out=tmp_path / "held", num_workers=1, **options)
    whole = {name: contents(tmp_path / name) for name in ("out", "held")}
    for name in whole:
        (tmp_path / name).rename(tmp_path / f"{name}-undisturbed")

    arguments = [f"source={source}", f"out={tmp_path}/out", f"held_out={tmp_path}/held", "num_workers=2"]
    command = [sys.executable, "-m", "dit", "pack", *arguments, *(f"{key}={value}" for key, value in options.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list((tmp_path / "out").glob("*.done.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children and not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ValueError, match="seed=0: give the same command"):
        pack(source, tmp_path / "out", held_out=tmp_path / "held", seed=1, **options)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/exe").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}/exe").exists() for child in children)  # no worker outlives its parent
    (tmp_path / "out" / "000099.tar").write_bytes(b"of another plan")
    (tmp_path / "out" / "000001.tar.123.tmp").write_bytes(b"half")
    code, output, _ = dit(*command[3:])
    assert code == 0 and "left out: 1 unreadable" in output and "1 duplicate" in output
    assert {name: contents(tmp_path / name) for name in whole} == whole
    code, output, _ = dit(*command[3:])
    assert code == 0 and "out is complete, as its source was listed when it was packed: 219 samples" in output


WRONG = {
    "source=nowhere": "source=nowhere does not exist",
    "source=empty": "source=empty holds no images",
    "source=flat out=flat": "flat stands in flat",
    "source=flat out=flat/sub": "stands in",
    "source=flat out=other": "other holds other files, like 1.png",
    "source=flat out=/proc/x": "/proc",
    "source=flat/0.png": "give one folder, or tars",
    "source=mixed": "classes=false",
    "source=flat size=0": "size=0 must be greater than 0",
    "source=flat size=1.5": "size=1.5: expected a whole number",
    "source=flat format=gif": "format=gif: choose one of null, png, jpg, webp",
    "source=flat classes=perhaps": "classes=perhaps: choose one of auto",
    "source=flat num_held_out=2": "give both",
    "source=flat num_held_out=5 held_out=h": "there are only 5 samples",
    "source=flat captions=none.csv": "captions=none.csv does not exist",
    "source=flat captions=names.csv": "of its columns (bild, wort) give columns.image=",
    "source=flat captions=absent.csv": "names 2 files that are not in the source, like 'x.png', 'y.png'",
    "source=flat captions=bad.json": "captions=bad.json cannot be read",
    "source=flat captions=list.json classes=true": "classes=true goes with captions=txt",
    "source=flat nosie=1": "there is no key nosie",
    "out=o": "source is not set",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_mistakes_are_answered(arguments, flat, tmp_path, monkeypatch, capsys):
    from dit.command import pack as command
    from dit.command.compose import ConfigError, compose

    write(tmp_path, {"other/1.png": b"", "mixed/a/1.png": b"", "mixed/1.png": b"", "bad.json": b"{"})
    write(tmp_path, {"names.csv": b"bild,wort\n1,2\n", "absent.csv": b"file,text\nx.png,1\ny.png,2\n"})
    write(tmp_path, {"list.json": b"[]", "empty/readme.md": b""})
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        overrides = arguments.split()
        cfg = compose("pack", overrides if "out=" in arguments.replace("held_out=", "") else [*overrides, "out=out"])
        command.check(cfg)
        command.main(cfg)
    assert WRONG[arguments] in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_exit_codes(flat, tmp_path):
    code, output, seconds = dit("pack", "source=nowhere", f"out={tmp_path}/out")
    assert (code, "source=nowhere does not exist" in output, "Traceback" in output) == (2, True, False)
    assert seconds < 15  # 1 on an idle machine
    write(flat, {"x.png": b"broken"})
    code, output, _ = dit("pack", f"source={flat}", f"out={tmp_path}/out")
    assert code == 3 and "x.png" in output and "max_broken=0.167" in output and "Traceback" not in output
    code, output, _ = dit("pack", f"source={flat}", f"out={tmp_path}/out", "max_broken=0.2")
    assert code == 0 and "5 samples in 5 shards" in output and "left out: 1 unreadable" in output
    code, output, _ = dit("pack", "--help")
    assert code == 0 and "dit pack source=" in output and "shard_bytes: 268435456" in output
    check = "import sys, dit.command.pack, dit.data.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env={**os.environ}).returncode == 0
