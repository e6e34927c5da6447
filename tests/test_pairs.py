"""Pairs of noise and of what a run makes of it: what they hold, and who may learn from them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import SCHEDULES
from shard_files import sample, write
from test_students import MEAN, STD, Gaussian
from together import train_together

from dit.command import encode
from dit.command.compose import ConfigError, compose
from dit.condition.unconditional import Unconditional
from dit.data import index
from dit.data.shards import Shards
from dit.data.stream import Stream
from dit.data.writer import write_shards
from dit.latent.pixels import Pixels
from dit.objective.reflow import Reflow
from dit.sampler import heun
from dit.sampler.pipeline import Pipeline
from dit.train import trained
from dit.train.build import Parts
from dit.train.encoding import space
from dit.train.pairs import Pairs, of_data
from dit.train.run import Run


def config(folder, digits_dir, *overrides):
    """Of a run that takes seconds."""
    small = [
        "model.hidden_size=32",
        "model.depth=2",
        "model.num_heads=2",
        "learning_rate=constant",
        "optimizer.lr=2e-3",
        "ema.decay=0.99",
    ]
    return compose(
        "train",
        [
            *("experiment=digits_teacher", f"runs_dir={folder}/runs", f"data_dir={digits_dir}", "metric=none", *small),
            *(
                "logger=none",
                "data.num_workers=0",
                "trainer.max_steps=2",
                "trainer.preview_every_steps=1000",
                *overrides,
            ),
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_dir):
    """A folder with a run that has hardly learned anything."""
    folder = tmp_path_factory.mktemp("pairs")
    assert train_together([config(folder, digits_dir, "run=teacher")], 1) == 0
    return folder


def options(folder, out, *more):
    return [
        *("run=teacher", f"runs_dir={folder}/runs", f"out={out}", "num_images=90", "batch_size=3"),
        *("sampler.num_steps=2", "samples_per_shard=10", *more),
    ]


def encoded(folder, out, *more):
    """The folder of some pairs."""
    overrides = options(folder, out, *more)
    encode.prepare(overrides)
    cfg = compose(encode.configuration(overrides), overrides)
    encode.check(cfg)
    assert encode.main(cfg) == 0
    return out


def read(out):
    """The noise and the ends (N, c, h, w), and the labels, in order."""
    data = Stream(str(out), 8, 1, 10, encoded=True, fields=["label", "noise"])
    data.check()
    samples = [
        data.decoder(key, data.shards.files(number, i, data.decoder.files()), None)
        for number, shard in enumerate(data.shards.all)
        for i, key in enumerate(data.shards.key(number, i) for i in range(shard.samples))
    ]
    return (torch.from_numpy(np.stack([s[name] for s in samples])) for name in ("noise", "latent", "label"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pairs_are_what_the_run_makes_of_noise(folder, tmp_path, capsys):
    out = encoded(folder, tmp_path / "out", "dtype=float32", "guidance.scale=2")
    assert "90 samples in 18 shards, by run=teacher at step 2" in capsys.readouterr().out
    eps, ends, labels = read(out)
    assert torch.equal(labels, torch.arange(90) % 10)
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    cfg = config(folder, "unused", "run=teacher", "sampler.num_steps=2", "guidance.scale=2")
    parts = Parts(cfg)
    pipeline = parts.pipeline(trained.load(parts, trained.newest(folder / "runs" / "teacher")), parts.latent())
    drawn = torch.cat(list(pipeline.latents({"label": labels}, 90, noise=eps)))
    torch.testing.assert_close(ends[:, 0], drawn, atol=1e-5, rtol=1e-5)
    about = index.read(out).about
    assert about["latent"] == {"name": "pixels", "sha256": "", "shape": [1, 8, 8], "image_size": 8, "dtype": "float32"}
    pairs = about["pairs"]
    assert (pairs["run"], pairs["step"], pairs["weights"], about["seed"]) == ("teacher", 2, "ema", 0)
    assert (pairs["sampler"]["num_steps"], pairs["guidance"]["scale"], pairs["told"]) == (2, 2, {"num_classes": 10})
    half = read(encoded(folder, tmp_path / "half", "guidance.scale=2"))
    rounded = encoded(folder, tmp_path / "rounded", "dtype=float32", "guidance.scale=2", "precision=bfloat16")
    assert index.read(rounded).about["pairs"] == pairs | {"precision": "bfloat16"}
    _, near, _ = read(rounded)
    assert 0 < (near - ends).abs().max() < 0.05 * ends.abs().max()
    for exact, kept in zip((eps, ends), half, strict=False):
        assert kept.dtype == torch.float16 and (exact - kept).abs().max() < 0.01
    with pytest.raises(ConfigError, match=r"encoded otherwise \(precision was bfloat16"):
        encoded(folder, rounded, "dtype=float32", "guidance.scale=2")


@pytest.mark.parametrize("name", ["linear", "cosine", "edm", "flow"])
def test_the_noise_of_a_pair_leads_to_its_end_on_every_schedule(name, tmp_path):
    """On N(m, s^2) data to m + s eps, up to what is left of the data at t_max."""
    schedule, laid = SCHEDULES[name]

    class Exact(Pipeline):
        device = torch.device("cpu")  # of a denoiser without parameters

    def alone(denoiser, null):
        return lambda x_t, t, s, **cond: denoiser(x_t, t)

    latent = Pixels(1, 4)
    pipeline = Exact(
        Gaussian(schedule), Unconditional(), latent, alone, heun.sample, lambda schedule: laid(schedule, num_steps=40)
    )
    about = {"latent": space(latent, 4, "float32")}
    pairs = Pairs(pipeline, lambda i: {}, tmp_path / "out", about, num_images=32, dtype="float32")
    for number in range(pairs.num_shards):
        pairs.one(number)
    assert pairs.commit() is not None
    data = Stream(str(tmp_path / "out"), 4, 1, 1, encoded=True, fields=["noise"])
    data.check()
    batch = next(data.batches(32, 0))
    torch.testing.assert_close(batch["latent"][:, 0], MEAN + STD * batch["noise"], atol=0.03, rtol=0)


def test_pairs_are_told_what_the_data_say(tmp_path):
    shards = Shards([str(write(tmp_path / "data", 43))])
    told = of_data(shards, SimpleNamespace(fields=("label", "caption")), seed=0)
    once = [told(i) for i in range(43)]
    assert sorted(each["caption"] for each in once) == sorted(sample(i)["txt"] for i in range(43))
    assert once != sorted(once, key=lambda each: each["caption"]) and told(43 + 5) == once[5]
    assert all(int(each["caption"].split()[1]) % 10 == int(each["label"]) for each in once)
    with pytest.raises(ValueError, match="the condition reads images"):
        of_data(shards, SimpleNamespace(fields=("image",)), seed=0)


def test_pairs_that_were_cut_short_go_on_to_the_same_bytes(folder, tmp_path, capsys):
    """As SIGKILL leaves them, and by several tasks."""
    whole = contents(encoded(folder, tmp_path / "whole"))
    out = tmp_path / "parts"
    encoded(folder, out, "task=1", "tasks=2")
    assert "waits for the shards of other tasks" in capsys.readouterr().out
    (out / "000001.tar").write_bytes(b"half")
    (out / "000003.index.npz").unlink()
    shutil.copy(out / "000005.tar", out / "000002.tar.abc.tmp")
    before = (out / "000005.tar").stat().st_mtime_ns
    encoded(folder, out)
    assert contents(out) == whole and (out / "000005.tar").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"encoded otherwise.*num_images.*choose another out"):
        encoded(folder, out, "num_images=91")


@pytest.mark.slow
def test_pairs_that_were_killed_go_on_to_the_same_bytes(folder, tmp_path):
    more = ["num_images=600", "sampler.num_steps=8"]
    whole = encoded(folder, tmp_path / "whole", *more)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dit", "encode", *options(folder, out, *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.npz"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(out.glob("*.npz"))) < 60 and not (out / index.MANIFEST).exists()
    assert contents(encoded(folder, out, *more, "processes=2")) == contents(whole)


@pytest.mark.parametrize(("overrides", "message"), [
    (["run=nobody"], "run=nobody: no such run"),
    (["sampler=ddpm", "sampler.num_steps=4"], "the sampler draws fresh noise"),
    (["sampler.churn=0.2"], "the sampler draws fresh noise"),
    (["dtype=int8"], "dtype=int8: choose one of"),
    (["num_images=0"], "num_images=0 must be at least 1"),
    (["weights=nothing"], "weights=nothing: choose one of ema, model"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused(folder, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        encoded(folder, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def student(folder, digits_dir, out, *overrides):
    given = ["experiment=digits_reflow", "run=student", "optimizer.lr=1e-3", f"data.path={out}"]
    return config(folder, digits_dir, *given, f"init.path={folder}/runs/teacher", *overrides)


def test_a_student_of_another_kind_is_refused(folder, digits_dir, tmp_path):
    out = encoded(folder, tmp_path / "out")
    for overrides, message in [
        ([f"data.path={tmp_path}/none"], r"none does not exist: dit encode run=<a teacher> .*out=.*none writes it"),
        (
            ["data.num_classes=11"],
            r"of run=teacher, .* \{'num_classes': 10\}, but this run is told \{'num_classes': 11",
        ),
        (["data.image_size=16", "model.patch_size=8"], r"was encoded with image_size=8, but the run has 16"),
        (["data.encoded=false"], r"noise belongs to pairs"),
        (["data=digits"], r"the objective learns from pairs.*dit encode run=<a teacher>.*data=pairs"),
        (["objective=denoising"], r"take objective=reflow"),
        (["data.flip=true"], r"data\.flip=false"),
        (["objective.scale=2"], r"guidance of scale 1, .* take objective\.scale=1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Run(student(folder, digits_dir, out, *overrides))
    files = [
        {"cls": b"0", "latent.npy": npy(1, 1, 8, 8), "noise.npy": npy(1, 4, 4)},
        {"cls": b"0", "latent.npy": npy(1, 1, 8, 8), "noise.npy": npy(1, 8, 8)},
    ]
    write_shards(tmp_path / "odd", files, 2)
    data = Stream(str(tmp_path / "odd"), 8, 1, 10, encoded=True, fields=["label", "noise"])
    data.decoder.latent_shape = (1, 8, 8)
    assert data.first()["key"] == ["00000001"]


def npy(*shape):
    from dit.train.made import npy

    return npy(np.zeros(shape), "float32")


@pytest.mark.slow
def test_pairs_that_do_not_belong_together_teach_nothing(tmp_path, digits_dir, monkeypatch):
    """One step lands near to where the teacher leads (0.13) with right pairs, and not (0.64) with shuffled ones."""
    steps = ["trainer.batch_size=64", "trainer.max_steps=500"]
    assert train_together([config(tmp_path, digits_dir, "run=teacher", *steps)], 1) == 0
    out = encoded(tmp_path, tmp_path / "out", "num_images=4000", "batch_size=500", "sampler.num_steps=8")
    phases = Reflow.phases

    def shuffled(self, denoiser, batch, step):
        return phases(self, denoiser, batch._replace(eps=batch.eps.flip(0)), step)

    def distances(run):
        """Of one step to where the teacher leads from the same noise, over that between two ends."""
        ends, drawn = (
            torch.cat(list(pipeline.latents({"label": [i % 10 for i in range(500)]}, 500, seed=1)))
            for pipeline in map(_pipeline, (teacher, run))
        )
        return ((drawn - ends).square().mean() / (ends.flip(0) - ends).square().mean()).sqrt().item()

    def _pipeline(cfg):
        parts = Parts(cfg)
        folder = tmp_path / "runs" / cfg.run
        return parts.pipeline(trained.load(parts, trained.newest(folder)), parts.latent())

    teacher = config(tmp_path, digits_dir, "run=teacher", "sampler.num_steps=8")
    found = {}
    for name in ("right", "shuffled"):
        if name == "shuffled":
            monkeypatch.setattr(Reflow, "phases", shuffled)
        cfg = student(tmp_path, digits_dir, out, *steps, f"run={name}")
        assert train_together([cfg], 1) == 0
        found[name] = distances(cfg)
    assert found["right"] < 0.25 < 0.4 < found["shuffled"], found
