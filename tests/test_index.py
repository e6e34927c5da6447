import json
import tarfile

import numpy as np
import pytest
from shard_files import png, sample, tar, write

from dit.data import index
from dit.data.scan import scan
from dit.data.shards import Shards
from dit.data.store import Store
from dit.data.writer import write_shard


@pytest.fixture
def shards(tmp_path):
    """Five shards of ten, the last of three."""
    return write(tmp_path / "train")


def test_the_index_tells_where_every_file_lies(shards):
    found = index.read(shards)
    assert [shard.samples for shard in found.shards] == [10, 10, 10, 10, 3]
    assert found.shards[0].files == {"cls": 10, "png": 10, "txt": 10}
    reader = Shards([str(shards)])
    wanted = {"a": ("txt",), "b": ("jpg", "png"), "c": ("cls",)}
    for i in range(43):
        files = reader.files(i // 10, i % 10, wanted)
        assert reader.key(i // 10, i % 10) == f"{i:08d}"
        assert files == {"a": sample(i)["txt"], "b": sample(i)["png"], "c": sample(i)["cls"]}


def test_other_shards_have_another_fingerprint(shards, tmp_path):
    found = index.read(shards)
    manifest = json.loads((shards / index.MANIFEST).read_text())
    assert manifest["fingerprint"] == found.fingerprint == index.write(shards).fingerprint
    assert index.read(write(tmp_path / "other", 42)).fingerprint != found.fingerprint


def test_shards_of_others_are_indexed_when_first_read(shards, capsys):
    before = index.read(shards)
    for path in [*shards.glob("*.npz"), shards / index.MANIFEST]:
        path.unlink()
    assert index.read(shards) == before
    assert "indexed now" in capsys.readouterr().out
    (shards / index.MANIFEST).write_text(json.dumps({"shards": []}))  # of an older version
    assert index.read(shards) == before


def test_processes_make_the_same_index(shards, tmp_path):
    one = index.write(shards, out=tmp_path / "one")
    several = index.write(shards, out=tmp_path / "several", num_workers=2)
    assert one == several == index.read(shards, tmp_path / "several")
    for name in ("000000.index.npz", index.MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()


def test_files_of_any_layout_are_found(tmp_path):
    members = [
        ("./a/x.y.PNG", png(1)),  # the key ends at the first dot of the file's name
        ("./a/x.cls", b"1"),
        ("readme", b""),  # no extension
        ("._a/x.png", b"1"),
        (".hidden", b"1"),
    ]
    found, damages = scan(tar(tmp_path / "a.tar", members))
    assert found.keys.tolist() == [b"./a/x", b"._a/x"] and not damages
    assert found.extensions == ["cls", "png", "y.png"]
    gnu = tmp_path / "gnu.tar"
    with tarfile.open(gnu, "w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(tarfile.TarInfo("d" * 150 + "/b.cls"))
    assert scan(gnu)[0].keys.tolist() == [b"d" * 150 + b"/b"]


def test_a_shard_cut_anywhere_is_found(tmp_path):
    folder = tmp_path / "one"
    path = folder / "000000.tar"
    folder.mkdir()
    write_shard(path, ((f"{i}", sample(i)) for i in range(3)))
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in range(0, used + 1024, 512):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"the shard 000000\.tar: .* at byte \d+"):
            index.write(folder)
        kept = scan(path)[0].keys.tolist()
        assert kept == [b"0", b"1", b"2"][: len(kept)] and len(kept) < 3
    path.write_bytes(whole[: 4 * 512] + b"x" + whole[4 * 512 + 1 :])  # a header in the middle
    with pytest.raises(ValueError, match=r"corrupt at byte 2048"):
        index.write(folder)


@pytest.mark.parametrize("size", [0, 1, 512, 5000, -512])
def test_a_shard_that_was_cut_since_is_found(shards, size):
    path = shards / "000002.tar"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"000002\.tar is corrupt: \d+ bytes instead of \d+"):
        index.read(shards)


def test_what_differs_from_the_manifest_is_found(shards):
    path = shards / "000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + b"!" + whole[701:])
    with pytest.raises(ValueError, match=r"000002\.tar is corrupt: its sha256"):
        index.read(shards)
    path.unlink()
    with pytest.raises(ValueError, match=r"000002\.tar of the manifest is missing"):
        index.read(shards)


def test_tables_that_are_missing_or_of_another_shard_are_named(shards):
    table = shards / "000001.index.npz"
    whole = table.read_bytes()
    table.unlink()
    with pytest.raises(ValueError, match=r"000001\.index\.npz of the index is missing: run dit index path"):
        index.read(shards)
    table.write_bytes(whole)
    reader = Shards([str(shards)])
    assert len(reader.all) == 5
    table.write_bytes((shards / "000000.index.npz").read_bytes())
    with pytest.raises(ValueError, match=r"000001\.index\.npz is not that of its shard: run dit index"):
        reader.key(1, 0)
    table.write_bytes(table.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"000001\.index\.npz is missing or damaged"):
        reader.key(1, 0)
    (shards / index.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        index.read(shards)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        index.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.tar"):
        index.read(tmp_path)


MEMBERS = [(f"{i}.{extension}", data) for i in range(4) for extension, data in sample(i).items()]


@pytest.mark.parametrize(("members", "message", "kept"), [
    ([], "it holds no sample", []),
    ([*MEMBERS, ("0.txt", b"again")], "sample 0: its key occurs twice", ["1", "2", "3"]),
    ([*MEMBERS, ("3.txt", b"again")], r"sample 3: it has two files \.txt", ["0", "1", "2"]),
    ([m for m in MEMBERS if m[0] != "2.txt"], r"sample 2: it has no \.txt", ["0", "1", "3"]),
])  # fmt: skip
def test_damage_is_named_or_left_out(tmp_path, capsys, members, message, kept):
    tar(tmp_path / "bad.tar", members)
    write_shard(tmp_path / "good.tar", [("good", sample(0))])
    with pytest.raises(ValueError, match=message):
        index.write(tmp_path, require=[["txt"]])
    assert not (tmp_path / index.MANIFEST).exists()
    found = index.write(tmp_path, require=[["txt"]], lenient=True)
    names = [key.decode() for shard in found.shards for key in index.table(Store(str(tmp_path)), shard).keys]
    assert sorted(names) == sorted([*kept, "good"])
    assert found.about["left_out"] == 1 and "1 left out, the first" in capsys.readouterr().out
    [line] = (tmp_path / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["shard"] == "bad.tar"
    assert index.read(tmp_path) == found


def test_keys_of_two_shards_are_told(tmp_path):
    write_shard(tmp_path / "a.tar", [(str(i), sample(i)) for i in range(5)])
    write_shard(tmp_path / "b.tar", [(str(i), sample(i)) for i in range(3, 9)])
    with pytest.raises(ValueError, match=r"b\.tar, sample 3: its key occurs in a\.tar, too"):
        index.write(tmp_path)
    found = index.write(tmp_path, lenient=True)
    assert [shard.samples for shard in found.shards] == [5, 4] and found.about["left_out"] == 2
    assert index.table(Store(str(tmp_path)), found.shards[1]).keys.tolist() == [b"5", b"6", b"7", b"8"]


def test_hashes_of_keys_do_not_depend_on_their_width():
    short, long = np.array([b"a", b"bcd"]), np.array([b"a", b"bcd", b"x" * 50])
    assert np.array_equal(index._hashes(short), index._hashes(long)[:2])
    many = np.array([b"%d" % i for i in range(10**5)])
    assert len(np.unique(index._hashes(many))) == 10**5


def test_an_index_beside_other_shards_needs_a_place(tmp_path):
    with pytest.raises(ValueError, match=r"give out=<folder>"):
        index.write("memory://nowhere", shards="{0..1}.tar")
    with pytest.raises(ValueError, match=r"has no manifest\.json .*: run dit index path=memory://nowhere out="):
        index.read("memory://nowhere")


def test_new_shards_of_an_indexed_folder_are_noticed(shards, tmp_path):
    write_shard(shards / "more.tar", [("more", sample(0))])
    with pytest.raises(ValueError, match=r"has shards that its index in .* lacks, more\.tar"):
        index.read(shards)
    assert len(index.write(shards).shards) == 6 and len(index.read(shards).shards) == 6


def test_an_index_is_replaced_whole_or_not_at_all(shards):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    tar(shards / "bad.tar", [*MEMBERS, ("0.txt", b"again")])
    with pytest.raises(ValueError, match="occurs twice"):
        index.write(shards)
    (shards / "bad.tar").unlink()
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_other_samples_of_the_same_shards_have_another_fingerprint(tmp_path):
    members = [m for m in MEMBERS if m[0] not in ("1.txt", "2.cls")]
    tar(tmp_path / "a.tar", members)
    first = index.write(tmp_path, require=[["txt"]], lenient=True).fingerprint
    assert index.write(tmp_path, require=[["cls"]], lenient=True).fingerprint != first


def test_names_of_every_script_are_taken(tmp_path):
    names = ["\u6f22\u5b57\u3000x", "\u0915\u094d\u200d\u0937", "\U0001f468\u200d\U0001f469", "d/" * 150 + "deep"]
    found, damages = scan(tar(tmp_path / "a.tar", [(f"{name}.png", png(1)) for name in names]))
    assert not damages and [key.decode() for key in found.keys] == names
