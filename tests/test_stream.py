import hashlib
import io
import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from shard_files import DIGITS, png, sample, tar, write

from dit.data import index, store
from dit.data.image import encode_png
from dit.data.store import DataError, Store
from dit.data.stream import Stream
from dit.data.writer import write_shards

BATCH, LANES = 16, 8
STEPS, KILLED_AFTER = 30, (5, 11, 23)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """163 samples in shards of ten."""
    return write(tmp_path_factory.mktemp("data") / "train", 163)


def stream(folder, **options):
    return Stream(str(folder), **{**DIGITS, **options})


def keys(folder, number, first_step=0, batch_size=BATCH, seed=0, lanes=LANES, rank=0, world_size=1, **options):
    batches = stream(folder, **options).batches(
        batch_size, seed, first_step, lanes=lanes, rank=rank, world_size=world_size
    )
    read = [list(batch["key"]) for batch in itertools.islice(batches, number)]
    batches.close()
    return read


@pytest.fixture(scope="module")
def undisturbed(shards):
    """The ledger of a single process: the keys of every step."""
    return keys(shards, STEPS)


def test_an_epoch_has_each_sample_once(undisturbed):
    rows = [step[lane * 2 + row] for step in undisturbed for row in range(2) for lane in range(LANES)]
    for epoch in range(2):
        assert Counter(rows[epoch * 163 : (epoch + 1) * 163]) == Counter(f"{i:08d}" for i in range(163))
    assert rows[:163] != rows[163:326] and rows[:163] != sorted(rows[:163])


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "world_sizes",
    [
        (1, 2, 4, 8),
        (8, 4, 2, 1),
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((2, 1, 8, 4), (4, 8, 1, 2))),
    ],
)
def test_the_ledger_is_that_of_the_undisturbed_run(shards, undisturbed, world_sizes, num_workers):
    """Stopped at three steps, and continued with other numbers of devices."""
    bounds = [0, *KILLED_AFTER, STEPS]
    for world_size, first, last in zip(world_sizes, bounds[:-1], bounds[1:], strict=True):
        options = {"first_step": first, "world_size": world_size, "num_workers": num_workers}
        ranks = [keys(shards, last - first, rank=rank, **options) for rank in range(world_size)]
        for step in range(first, last):
            together = list(itertools.chain(*(rank[step - first] for rank in ranks)))
            assert together == undisturbed[step]


def _train(folder, ledger, first_step, rank, world_size):
    batches = stream(folder, num_workers=1).batches(BATCH, 0, first_step, lanes=LANES, rank=rank, world_size=world_size)
    with ledger.open("a") as file:
        for step, batch in enumerate(itertools.islice(batches, STEPS - first_step), first_step):
            file.write(f"{step} {' '.join(batch['key'])}\n")
            file.flush()
            time.sleep(0.02)


def test_the_ledger_is_right_after_processes_were_killed(shards, undisturbed, tmp_path):
    done, context = [], multiprocessing.get_context("fork")
    for turn, world_size in enumerate((2, 4, 1, 2)):
        ledgers = [tmp_path / f"{turn}-{rank}" for rank in range(world_size)]
        ranks = [
            context.Process(target=_train, args=(shards, ledger, len(done), rank, world_size))
            for rank, ledger in enumerate(ledgers)
        ]
        for process in ranks:
            process.start()
        if turn < 3:
            while not all(path.exists() and path.read_text().count("\n") >= 3 + turn for path in ledgers):
                time.sleep(0.01)
            for process in ranks:
                os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        lines = [path.read_text().splitlines(keepends=True) for path in ledgers]
        whole = [[line.split()[1:] for line in rank if line.endswith("\n")] for rank in lines]
        for parts in zip(*whole, strict=False):  # steps that all ranks have finished
            done.append(list(itertools.chain(*parts)))
    assert done == undisturbed


def test_a_batch_holds_images_and_fields(shards):
    batch = next(stream(shards, fields=["label", "caption"]).batches(BATCH, 0, lanes=LANES))
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (BATCH, 1, 8, 8)
    assert set(batch) == {"key", "image", "label", "caption"}
    for i, key in enumerate(batch["key"]):
        assert batch["image"][i].unique().tolist() == [int(key)] and batch["label"][i] == int(key) % 10
        assert batch["caption"][i] == f"number {int(key)}"


def test_other_seeds_have_other_orders(shards, undisturbed):
    assert keys(shards, 3, seed=1) != undisturbed[:3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_and_flips_follow_from_the_step_and_the_lane(tmp_path, num_workers):
    picture = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 64).expand(1, 8, 64)
    folder = tmp_path / "ramps"
    write_shards(folder, ({"png": encode_png(picture), "cls": b"0"} for _ in range(64)), 8)

    def first_columns(first_step=0, rank=0, world_size=1, **options):
        data = stream(folder, num_workers=num_workers, **options)
        batches = data.batches(32, 0, first_step, lanes=8, rank=rank, world_size=world_size)
        found = torch.stack([batch["image"][:, 0, 0, :2] for batch in itertools.islice(batches, 6 - first_step)])
        batches.close()
        return found[..., 0], (found[..., 0] > found[..., 1])

    left, flipped = first_columns(crop="random", flip=True)  # (steps, 32)
    again = [first_columns(2, rank, 2, crop="random", flip=True)[0] for rank in range(2)]
    assert torch.equal(torch.cat(again, dim=1), left[2:])
    assert 0.35 < flipped.float().mean() < 0.65
    assert len(left.unique()) > 30 and left.min() < 8 and left.max() > 56
    agreement = [(a == b).float().mean().item() for a, b in itertools.combinations(flipped, 2)]
    assert max(agreement) < 0.9 and min(agreement) > 0.1
    assert first_columns()[0].unique().tolist() == [28]  # the centre


def test_going_on_reads_nothing_of_what_comes_before(shards, monkeypatch):
    opened = []
    real = Store.open
    monkeypatch.setattr(Store, "open", lambda self, name, *rest: opened.append(name) or real(self, name, *rest))
    next(stream(shards, window=1).batches(8, 0, 10**6, lanes=8))
    assert len(set(opened)) <= 8


# What cannot be used.


def broken(folder, number, every=20, start=7):
    """Shards of ten with a broken image every so many samples."""
    bad = set(range(start, number, every)) if every else set()
    write_shards(folder, ({**sample(i), **({"png": b"no image"} if i in bad else {})} for i in range(number)), 10)
    return {f"{i:08d}" for i in bad}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_and_the_others_keep_their_places(tmp_path, capsys, num_workers):
    bad = broken(tmp_path / "bad", 160)  # 5 %
    broken(tmp_path / "good", 160, every=0)
    good = keys(tmp_path / "good", 20)
    found = keys(tmp_path / "bad", 20, max_bad=0.05, num_workers=num_workers)
    places = list(zip(itertools.chain(*good), itertools.chain(*found), strict=True))
    assert {was for was, now in places if was != now} == bad and len(bad) == 8
    assert not bad & set(itertools.chain(*found))
    out = capsys.readouterr().out
    assert all(f"sample {key} of the shard" in out for key in bad) and "8 so far" in out
    assert out.count("WARNING") == 8  # each is named once


def test_too_many_bad_images_end_the_run_with_a_list(tmp_path):
    bad = broken(tmp_path / "bad", 160)
    with pytest.raises(DataError, match=r"too many samples cannot be used, \d+ of \d+ that were read") as caught:
        keys(tmp_path / "bad", 20)
    assert caught.value.exit_code == 3
    assert any(f"sample {key}" in str(caught.value) for key in bad)


def test_many_bad_images_in_a_row_end_the_run(tmp_path):
    broken(tmp_path / "bad", 160, every=1, start=40)
    with pytest.raises(DataError, match=r"100 samples in a row cannot be used:\n(.*\n){20}  and 80 more"):
        keys(tmp_path / "bad", 20, max_bad=1.0, lanes=1, batch_size=160, window=1)
    broken(tmp_path / "few", 160, every=1, start=120)
    assert len(keys(tmp_path / "few", 3, max_bad=1.0, lanes=1, batch_size=160, window=16)) == 3


def test_one_bad_sample_never_ends_a_run(tmp_path):
    """Not even where its window has no other."""
    broken(tmp_path / "bad", 260, every=260, start=133)
    read = keys(tmp_path / "bad", 4 * 260 // 8, batch_size=8, max_bad=0.01, window=1)
    assert "00000133" not in set(itertools.chain(*read))


def test_a_sample_without_a_field_is_named_at_the_start(tmp_path):
    files = [{**sample(i)} for i in range(20)]
    del files[13]["txt"]
    write_shards(tmp_path / "data", files, 10)
    stream(tmp_path / "data").check()
    with pytest.raises(ValueError, match=r"sample 00000013 of the shard 000001\.tar .* has no caption \(\.txt\)"):
        stream(tmp_path / "data", fields=["label", "caption"]).check()
    with pytest.raises(ValueError, match=r"no text \(\.text\.npy\), as have 10 of its 10 samples"):
        stream(tmp_path / "data", fields=["text"]).check()
    tar(tmp_path / "bare" / "a.tar", [("a.cls", b"1")])
    with pytest.raises(ValueError, match=r"sample a of .* has no image \(\.png or \.jpg"):
        stream(tmp_path / "bare").check()


def test_classes_out_of_range_are_bad(tmp_path):
    write_shards(tmp_path / "data", ({"png": png(0), "cls": b"10"} for _ in range(10)), 10)
    with pytest.raises(ValueError, match=r"the class 10, but data\.num_classes=10"):
        stream(tmp_path / "data").first()


@pytest.mark.parametrize(("options", "message"), [
    ({"channels": 2}, r"data\.channels=2"),
    ({"num_classes": 0}, r"data\.num_classes=0"),
    ({"fields": ["lable"]}, r"there is no lable; choose of label"),
    ({"crop": "center"}, r"data\.crop=center: choose one of centre, random"),
    ({"order": "random"}, r"data\.order=random"),
    ({"weights": [1, 2]}, r"data\.weights=\[1, 2\] goes with data\.order=resampled"),
    ({"num_workers": -1}, r"data\.num_workers=-1"),
    ({"encoded": True, "crop": "random"}, r"encoded shards are cropped already"),
])  # fmt: skip
def test_options_that_do_not_do_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stream("x", **options)


def test_fewer_shards_than_lanes_or_lanes_than_devices_are_refused(tmp_path):
    folder = write(tmp_path / "few", 30)
    with pytest.raises(ValueError, match=r"3 shards are fewer than trainer\.lanes=8"):
        keys(folder, 1)
    with pytest.raises(ValueError, match=r"lanes=8 cannot be shared out evenly among 3"):
        keys(folder, 1, world_size=3)
    assert len(keys(folder, 1, order="resampled")[0]) == BATCH


def test_several_folders_are_one_set_or_a_mixture(tmp_path):
    write_shards(tmp_path / "a", ({"png": png(1), "cls": b"1"} for _ in range(40)), 10)
    write_shards(tmp_path / "b", ({"png": png(2), "cls": b"2"} for _ in range(120)), 10)

    def labels(**options):
        data = Stream([str(tmp_path / "a"), str(tmp_path / "b")], **DIGITS, **options)
        return Counter(torch.cat([b["label"] for b in itertools.islice(data.batches(16, 0, lanes=8), 200)]).tolist())

    assert labels()[1] / 3200 == pytest.approx(1 / 4, abs=0.01)
    assert labels(order="resampled")[1] / 3200 == pytest.approx(1 / 4, abs=0.05)
    assert labels(order="resampled", weights=[3, 1])[1] / 3200 == pytest.approx(3 / 4, abs=0.05)


def test_all_images_are_read_for_evaluation(shards, tmp_path, capsys):
    data = stream(shards, held_out=str(write(tmp_path / "held_out", 20)))
    data.check()
    assert data.read("train")["label"].tolist() == [i % 10 for i in range(163)]
    assert len(data.read("held_out")["key"]) == 20 and len(data.read("train", most=7)["key"]) == 7
    broken(tmp_path / "bad", 40)
    assert len(stream(tmp_path / "bad").read("train")["key"]) == 38
    assert "left out, 2 so far" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data\.held_out=null"):
        stream(shards).read("held_out")


def test_workers_pass_on_more_embeddings_than_there_are_file_descriptors(tmp_path):
    def embedded(i):
        file = io.BytesIO()
        np.save(file, np.full((3, 4), i, dtype=np.float16))
        return {"png": png(i % 250), "cls": b"1", "text.npy": file.getvalue()}

    write_shards(tmp_path / "shards", (embedded(i) for i in range(400)), 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        batches = stream(tmp_path / "shards", fields=["label", "text"], num_workers=2).batches(100, 0, lanes=4)
        for batch in itertools.islice(batches, 6):
            assert batch["text"].shape == (100,) and batch["text"][0].shape == (3, 4)
        batches.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Shards behind a URL.


@pytest.fixture
def server(shards):
    """A store that answers every third request with an error; its address, and the requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            path = shards / self.path.lstrip("/")
            if not path.is_file() or len(asked) % 3 == 0:
                self.send_error(404 if not path.is_file() else 503)
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_fails_now_and_then_gives_the_same_order(server, undisturbed, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(store, "MAX_PAUSE_SECONDS", 0.001)
    url, asked = server
    cache = tmp_path / "cache"
    assert keys(url, STEPS, cache=str(cache), num_workers=num_workers) == undisturbed
    kept = sorted(path.name for path in cache.glob("*.tar"))
    assert len(kept) == 17 and len({path for path in asked if path.endswith(".tar")}) == 17
    if num_workers == 0:
        before = len([path for path in asked if path.endswith(".tar")])
        assert keys(url, STEPS, cache=str(cache)) == undisturbed
        assert len([path for path in asked if path.endswith(".tar")]) == before  # none is fetched twice


def test_the_cache_is_bounded_and_checks_what_comes(server, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_PAUSE_SECONDS", 0.001)
    url, _ = server
    found = index.read(shards).shards
    cached = Store(url, tmp_path / "cache", cache_bytes=3 * found[0].bytes)
    for shard in found:
        handle = cached.open(shard.name, shard.bytes, shard.sha256)
        assert hashlib.sha256(os.pread(handle, shard.bytes, 0)).hexdigest() == shard.sha256
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3 * found[0].bytes
    with pytest.raises(DataError, match=r"000003\.tar cannot be fetched, 18 times tried: what came is not the shard"):
        cached.open("000003.tar", found[3].bytes, "0" * 64)
    with pytest.raises(DataError, match=r"nothing\.tar is missing"):
        cached.open("nothing.tar", 5, "0" * 64)


def test_a_cache_that_is_too_small_is_refused(server):
    with pytest.raises(ValueError, match=r"data\.cache_gb=0\.0001 is too little for 8 lanes"):
        stream(server[0], cache_gb=0.0001).check(BATCH, LANES)


def test_urls_are_indexed_into_a_folder(server, shards, tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(store, "MAX_PAUSE_SECONDS", 0.001)
    url, _ = server
    found = index.write(url, shards="{000000..000016}.tar", out=tmp_path / "index")
    assert found.shards == index.read(shards).shards
    options = {"index": str(tmp_path / "index"), "cache": str(tmp_path / "cache")}
    assert keys(url, 4, **options) == undisturbed[:4]


@pytest.mark.parametrize("path", ["pipe:touch marker", "ftp://x/y", "pipe://x"])
def test_other_schemes_are_no_place_for_data(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is no place for data"):
        stream(path)
    assert not list(tmp_path.iterdir())
