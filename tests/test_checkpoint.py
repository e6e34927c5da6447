"""Checkpoints: killed, damaged, without space, and read under other numbers of ranks."""

import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpointing import (
    groups,
    hybrid,
    load_sharded,
    network,
    parallel,
    processes,
    ranks,
    replicated,
    save_forever,
    save_sharded,
    save_until,
    save_with_a_full_disk,
    sharded,
    stepped,
    tensors,
    trained,
)
from test_conf import dit
from test_train import metrics

from dit.train import callbacks, checkpoint
from dit.train.callbacks import Checkpoints
from dit.train.checkpoint import CheckpointError, Saver
from dit.train.run import Run

LAYOUTS = [(1, sharded), (2, replicated), (2, sharded), (4, sharded), (4, hybrid), (4, parallel)]


def saved(root, *steps, size=100, **options):
    saver = Saver(root, **options)
    for step in steps:
        saver.save(step, tensors(step, size), {"step": step}, wait=True)
    return saver


def names(root):
    return sorted(path.name for path in root.iterdir())


def is_of(path, step, size=100):
    """Whether a checkpoint holds exactly what was saved at a step."""
    return all(
        torch.equal(value, checkpoint.load_weights(path, group)[name])
        for group, values in tensors(step, size).items()
        for name, value in values.items()
    )


def test_what_is_loaded_is_what_was_saved(tmp_path):
    state = {"step": 3, "recorder": {"loss_sum": 0.1 + 0.2, "num_losses": 2}, "none": None}
    given = {
        "model": {"a/b": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "empty": torch.zeros(0, 2)},
        "objective": {},
        "optimizer": {"a/b/step": torch.tensor(3.0), "a/b/count": torch.tensor(7)},
    }
    Saver(tmp_path, data="of the data").save(3, given, state, wait=True)
    path = checkpoint.newest(tmp_path)
    assert path.name == "step-00000003" and checkpoint.step_of(path) == 3 and checkpoint.data_of(path) == "of the data"
    assert checkpoint.load_state(path) == state
    for group in ("model", "optimizer"):
        loaded = checkpoint.load_weights(path, group)
        assert loaded.keys() == given[group].keys() == checkpoint.layout(path, group).keys()
        for name, value in given[group].items():
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
            like = checkpoint.layout(path, group)[name]
            assert like.is_meta and (like.shape, like.dtype) == (value.shape, value.dtype)
    assert checkpoint.layout(path, "objective") == {}
    with pytest.raises(CheckpointError, match="step-00000003 has no ema"):
        checkpoint.load_weights(path, "ema")
    with pytest.raises(CheckpointError, match="Missing key"):
        checkpoint.load_into(path, {"model": {"c": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="Size mismatch"):
        checkpoint.load_into(path, {"model": {"a/b": torch.zeros(4, 3)}})


def test_the_folder_is_that_of_the_design(tmp_path):
    saved(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert names(tmp_path / "step-00000001") == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    manifest = checkpoint._manifest(tmp_path / "step-00000001")
    assert manifest["world_size"] == 1 and manifest["versions"].keys() == {"dit", "torch", "lightning"}
    for file in (tmp_path / "step-00000001").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()  # nor where it was made


def test_the_newest_are_kept_and_every_nth(tmp_path):
    saved(tmp_path / "two", *range(1, 6), keep=2)
    assert names(tmp_path / "two") == ["latest", "step-00000004", "step-00000005"]
    saved(tmp_path / "third", *range(1, 8), keep=1, keep_every_steps=3)
    assert names(tmp_path / "third") == ["latest", "step-00000003", "step-00000006", "step-00000007"]
    saved(tmp_path / "all", *range(1, 6), keep=None)
    assert len(checkpoint.committed(tmp_path / "all")) == 5


def test_what_is_there_already_is_left_unless_it_is_damaged(tmp_path):
    path = tmp_path / "step-00000001"
    saved(tmp_path, 1)
    before = path.stat().st_ino
    saved(tmp_path, 1)
    assert path.stat().st_ino == before
    (path / "state.json").write_text("{}")
    saved(tmp_path, 1)
    assert checkpoint.verify(path) is None and names(tmp_path)[-1] == "step-00000001.corrupt"


class Gate:
    """Holds a save up where it begins to write, and counts."""

    def __init__(self, monkeypatch):
        self.open, self.entered = threading.Event(), 0
        before = checkpoint._begun

        def begun(*arguments):
            self.entered += 1
            assert self.open.wait(60)
            return before(*arguments)

        monkeypatch.setattr(checkpoint, "_begun", begun)


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path)
    given = tensors(1, 100)
    saver.save(1, given, {})
    buffers = {name: buffer.data_ptr() for name, buffer in saver._buffers.items()}
    for values in given.values():
        for value in values.values():
            value.mul_(-1)  # while nothing is written yet
    assert checkpoint.committed(tmp_path) == []
    gate.open.set()
    saver.wait()
    assert is_of(tmp_path / "step-00000001", 1)
    saver.save(2, given, {})
    saver.wait()
    assert {name: buffer.data_ptr() for name, buffer in saver._buffers.items()} == buffers  # reused
    asynchronous, synchronous = tmp_path / "step-00000001", tmp_path / "other"
    saved(synchronous, 1, asynchronous=False)
    for name in (".metadata", "__0_0.distcp"):
        assert (asynchronous / name).read_bytes() == (synchronous / "step-00000001" / name).read_bytes()


def test_one_save_is_under_way_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path)
    saver.save(1, tensors(1, 100), {})
    second = threading.Thread(target=saver.save, args=(2, tensors(2, 100), {}))
    second.start()
    time.sleep(0.2)
    assert gate.entered == 1 and second.is_alive()
    gate.open.set()
    second.join()
    saver.wait()
    assert gate.entered == 2 and names(tmp_path)[1:] == ["step-00000001", "step-00000002"]
    assert 0.15 < saver.stall_seconds < 60


def test_a_save_killed_at_any_point_leaves_the_one_before_or_itself(tmp_path):
    saved(tmp_path / "before", 1, size=40_000)

    def killed(point):
        root = tmp_path / f"at-{point}"
        shutil.copytree(tmp_path / "before", root)
        process = processes.Process(target=save_until, args=(root, point))
        process.start()
        process.join()
        return root, process.exitcode

    root, number = killed(0)
    assert number > 40 and names(root) == ["latest", "step-00000002"]
    found = []
    for point in sorted({round(1 + i * (number - 1) / 21) for i in range(22)}):
        root, code = killed(point)
        assert code == -signal.SIGKILL
        whole = checkpoint.committed(root)
        assert whole and not any(map(checkpoint.verify, whole))
        newest = checkpoint.newest(root)
        found.append(checkpoint.step_of(newest))
        assert is_of(newest, found[-1], 40_000)
        checkpoint.clean(root, newest)
        assert all(path in whole or path.name.startswith("latest") for path in root.iterdir())
        saved(root, 3)
        assert checkpoint.newest(root).name == "step-00000003"
        shutil.rmtree(root)
    assert len(found) >= 20 and found == sorted(found) and set(found) == {1, 2}


@pytest.mark.slow
def test_a_save_killed_at_any_time_leaves_what_is_whole(tmp_path):
    size = 400_000  # 13 MB
    for i in range(20):
        root = tmp_path / str(i)
        saved(root, 1, size=size)
        ready = processes.Event()
        process = processes.Process(target=save_forever, args=(root, size, ready))
        process.start()
        ready.wait()
        time.sleep(0.017 * i)
        process.kill()
        process.join()
        whole = checkpoint.committed(root)
        assert whole and not any(map(checkpoint.verify, whole))
        newest = checkpoint.newest(root)
        assert is_of(newest, checkpoint.step_of(newest), size)
        checkpoint.clean(root, newest)
        assert not list(root.glob("*-*.*"))
        shutil.rmtree(root)


FILES = ["manifest.json", "state.json", ".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_named(tmp_path, name, capsys):
    saved(tmp_path, 1, 2, size=4)
    path = tmp_path / "step-00000002" / name
    data = path.read_bytes()

    def seen():
        problem = checkpoint.verify(path.parent)
        return problem is not None and name in problem and checkpoint.newest(tmp_path).name == "step-00000001"

    for position in range(0, len(data), 1 + len(data) // 150):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert seen(), position
    for damaged in (b"", data[:-1], data[: len(data) // 2], data + b"\n", b"[]", b"\x80\x04N."):
        path.write_bytes(damaged)
        assert seen(), damaged
    path.unlink()
    assert seen()
    path.mkdir()
    assert seen()
    path.rmdir()
    os.mkfifo(path)  # which would not answer
    assert seen()
    path.unlink()
    path.symlink_to(shutil.copy(tmp_path / "step-00000001" / name, tmp_path / "elsewhere"))
    assert seen()
    assert f"passing over the checkpoint {path.parent}: " in capsys.readouterr().out


def test_none_intact_is_an_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    saved(tmp_path, 1, 2)
    for path in checkpoint.committed(tmp_path):
        (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact") as raised:
        checkpoint.newest(tmp_path)
    assert raised.value.exit_code == 4


def test_the_pointer_names_what_is_gone_on_from(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "state.json").unlink()
    checkpoint.clean(tmp_path, checkpoint.newest(tmp_path))
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002.corrupt"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_another_format_is_told_from_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    saved(tmp_path, 1)
    monkeypatch.undo()
    assert "is of format 99, which another version of dit reads" in checkpoint.verify(tmp_path / "step-00000001")


@pytest.fixture
def small_files():
    """No file may exceed 50 kB, for a while."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_said_once_and_tried_again(tmp_path, capsys, small_files, asynchronous):
    saver = Saver(tmp_path, asynchronous=asynchronous)
    saver.save(1, tensors(1, 100), {})
    for step in (2, 3, 4):
        saver.save(step, tensors(step, 40_000), {})
    saver.wait()
    assert "File too large" in saver.problem
    output = capsys.readouterr().out
    assert output.count("WARNING") == output.count("\n") == 1
    assert "step-00000002 could not be written" in output and "File too large" in output
    assert names(tmp_path) == ["latest", "step-00000001"] and is_of(checkpoint.newest(tmp_path), 1)
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 5 could not be written .*File too large"
    ) as raised:
        saver.save(5, tensors(5, 40_000), {}, wait=True)
    assert raised.value.exit_code == 4
    small_files()
    saver.save(6, tensors(6, 40_000), {})
    saver.wait()
    assert saver.problem is None and "written again" in capsys.readouterr().out
    assert is_of(checkpoint.newest(tmp_path), 6, 40_000)


@pytest.mark.parametrize("where", ["_begun", "sealed", "sync", "fingerprint"])
def test_a_save_may_fail_anywhere(tmp_path, monkeypatch, where):
    saver = saved(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, where, full)
        saver.save(2, tensors(2, 100), {})
        saver.wait()
    assert "No space left" in saver.problem and checkpoint.newest(tmp_path).name == "step-00000001"
    assert not list(tmp_path.glob("step-*.tmp"))


def test_what_is_no_tensor_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match="a/count is no tensor"):
        Saver(tmp_path).save(1, {"optimizer": {"a/count": 3}}, {})
    with pytest.raises(ValueError, match=r"the optimizer keeps .*/count=1, which is no tensor .*: choose another one"):
        Run(config("optimizer._target_=checkpointing.Counting")).fit()
    assert [line["step"] for line in metrics(Path(config().runs_dir) / "digits")] == [1]  # said at once


def test_snapshots_of_the_averages_are_all_kept(config, monkeypatch):
    monkeypatch.setattr(
        callbacks,
        "Checkpoints",
        lambda *args, **kwargs: Checkpoints(*args, **{**kwargs, "snapshot_every_steps": 4}),
    )
    run = Run(config("trainer.keep_checkpoints=1"))
    root = run.folder / "snapshots"
    (root / "step-00000003.tmp").mkdir(parents=True)
    assert run.fit() is None
    assert names(root) == ["latest", "step-00000004", "step-00000008", "step-00000012"]
    last = checkpoint.committed(root)[-1]
    assert checkpoint.verify(last) is None and checkpoint.load_state(last) == {"step": 12}
    [whole] = checkpoint.committed(run.folder / "checkpoints")
    expected = checkpoint.load_weights(whole, "ema")
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint.load_weights(last, "ema").items())
    assert checkpoint.layout(last, "model") == checkpoint.layout(last, "optimizer") == {}


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_and_says_so_at_its_end(tmp_path, tiny):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        told = [*tiny("trainer.max_steps=30", "trainer.keep_checkpoints=1"), f"runs_dir={disk}"]
        assert dit("train", *told, "trainer.max_steps=5")[0] == 0
        root = disk / "digits" / "checkpoints"
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 60_000))
        code, output, _ = dit("train", *told)
        assert code == 4 and "the checkpoint of step 30 could not be written" in output, output
        assert output.count("WARNING") == 1 and "step 30/30" in output, output
        assert checkpoint.newest(root).name == "step-00000005" and len(names(root)) == 2
        filler.unlink()
        code, output, _ = dit("train", *told)
        assert code == 0 and "going on from step 5" in output, output
        assert checkpoint.newest(root).name == "step-00000030"
        for path in root.glob("step-*/.metadata"):
            path.unlink()
        assert dit("train", *told)[0] == 4
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_of_one_rank_is_known_to_all(tmp_path):
    [(first, output), (second, silence)] = ranks(2, save_with_a_full_disk, tmp_path)
    assert first == second == [None, "[Errno 28] No space left on device", None]
    assert output.count("WARNING") == 1 and not silence
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]
    assert is_of(checkpoint.newest(tmp_path), 3)


def test_two_ranks_save_and_one_loads(tmp_path):
    assert sum(ranks(2, save_sharded, tmp_path, sharded)) == sum(p.numel() for p in network(0).parameters())
    path = checkpoint.newest(tmp_path)
    expected = trained(0, replicated)
    for group, values in expected.items():
        loaded = checkpoint.load_weights(path, group)
        assert loaded.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(loaded[name], value.detach())
    net = network(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    stepped(net, optimizer)
    checkpoint.load_into(path, groups(net, optimizer, {}))
    assert torch.equal(net[2].bias, checkpoint.load_weights(path, "model")["2.bias"])
    assert optimizer.state[net[0].bias]["step"] == 2
    assert checkpoint._manifest(path)["world_size"] == 2


def test_what_all_ranks_have_is_written_once(tmp_path):
    ranks(2, save_sharded, tmp_path / "two", replicated)
    Saver(tmp_path / "one").save(2, trained(0, replicated), {}, wait=True)
    sizes = [sum(p.stat().st_size for p in root.rglob("*.distcp")) for root in (tmp_path / "one", tmp_path / "two")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.slow
def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path):
    paths = []
    for number, shard in LAYOUTS:
        root = tmp_path / f"{shard.__name__}-{number}"
        ranks(number, save_sharded, root, shard)
        paths.append(checkpoint.newest(root))
        for group, values in trained(0, replicated).items():
            loaded = checkpoint.load_weights(paths[-1], group)
            for name, value in values.items():
                torch.testing.assert_close(loaded[name], value.detach())
    for path in paths:
        for number, shard in LAYOUTS:
            assert all(ranks(number, load_sharded, path, shard)), (path, number, shard)
