import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from shard_files import png, sample

from dit.command import encode
from dit.command.compose import ConfigError, compose
from dit.data import index
from dit.data.image import encode_png
from dit.data.shards import Shards
from dit.data.store import DataError
from dit.data.stream import Stream
from dit.data.writer import write_shards
from dit.latent.autoencoder import Autoencoder
from dit.train.encoding import Encoding
from dit.train.run import Run


def save_vae(folder, seed=0):
    """A tiny random VAE of grey images, 2 channels at stride 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """170 noisy images in shards of ten."""
    folder = tmp_path_factory.mktemp("data") / "train"
    rng = np.random.default_rng(0)

    def noisy(i):
        pixels = torch.from_numpy(rng.integers(0, 255, (1, 8, 8), dtype=np.uint8))
        return {**sample(i), "png": encode_png(pixels), "json": b"{}"}

    write_shards(folder, (noisy(i) for i in range(170)), 10)
    return folder


SMALL = ("data.image_size=8", "data.channels=1", "data.num_classes=10", "data.num_workers=0")


def options(shards, vae, out, *more):
    return [
        *("data=shards", f"data.path={shards}", *SMALL, "data.flip=false"),
        *("latent=digits_vae", f"latent.name={vae}", f"out={out}", *more),
    ]


def encoded(shards, vae, out, *more):
    cfg = compose("encode", options(shards, vae, out, *more))
    encode.check(cfg)
    assert encode.main(cfg) == 0
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_encoded_shards_hold_the_moments_of_their_images(shards, vae, tmp_path, capsys):
    out = encoded(shards, vae, tmp_path / "out", "data.flip=true")
    assert "170 samples in 17 shards" in capsys.readouterr().out
    found = index.read(out)
    assert found.about["latent"]["shape"] == [2, 4, 4] and found.about["latent"]["flipped"]
    assert found.about["source"] == index.read(shards).fingerprint
    images = Stream(str(shards), 8, 1, 10).read("train")
    latent = Autoencoder(vae, channels=2, size=4, stride=2, in_channels=1)
    moments = latent.moments(images["image"].float() / 127.5 - 1)
    mirrored = latent.moments(images["image"].flip(-1).float() / 127.5 - 1)
    reader = Shards([str(out)])
    for i in range(170):
        files = reader.whole(i // 10, i % 10)
        assert set(files) == {"cls", "txt", "json", "latent.npy", "latent_flipped.npy"} and reader.key(i // 10, i % 10)
        for name, expected in {"latent.npy": moments[i], "latent_flipped.npy": mirrored[i]}.items():
            array = np.load(io.BytesIO(files[name]))
            assert array.shape == (2, 2, 4, 4) and array.dtype == np.float32
            np.testing.assert_allclose(array, expected.numpy(), atol=1e-5)


RUN = ("latent=digits_vae", "model.patch_size=2", "trainer.max_steps=6", "trainer.checkpoint_every_steps=100")


def trained(config, vae, *overrides):
    run = Run(config(*RUN, f"latent.name={vae}", *overrides))
    assert run.fit() is None
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def of(shards):
    return ("data=shards", f"data.path={shards}", *SMALL, "data.flip=true")


def test_training_on_latents_is_training_with_the_encoder(config, shards, vae, tmp_path):
    out = encoded(shards, vae, tmp_path / "out", "data.flip=true")
    on_the_fly = trained(config, vae, *of(shards), "run=fly")
    on_latents = trained(config, vae, *of(out), "run=latents", "data.encoded=true")
    np.testing.assert_allclose(on_latents, on_the_fly, rtol=1e-5)
    assert len({loss for loss, _ in on_latents}) == 6
    half = encoded(shards, vae, tmp_path / "half", "data.flip=true", "dtype=float16")
    rounded = trained(config, vae, *of(half), "run=half", "data.encoded=true")
    np.testing.assert_allclose(rounded, on_the_fly, rtol=1e-2)
    again = trained(config, vae, *of(out), "run=other", "data.encoded=true", "seed=1")
    assert abs(again[0][0] - on_latents[0][0]) > 1e-4


def test_what_was_encoded_otherwise_is_refused(config, shards, vae, tmp_path):
    out = encoded(shards, vae, tmp_path / "out")
    run = [*RUN, *of(out)[:-1], "data.flip=false", "data.encoded=true"]
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was encoded by .*, whose weights are others than those of .*other"):
        Run(config(*run, f"latent.name={other}"))
    with pytest.raises(ValueError, match=r"data.encoded=true, but latent=pixels"):
        Run(config(*run, "latent=pixels", "latent.channels=1"))
    with pytest.raises(ValueError, match=r"no latent \(\.latent_flipped\.npy\).*encode again with data.flip=true"):
        Run(config(*run, f"latent.name={vae}", "data.flip=true"))
    with pytest.raises(ValueError, match=r"holds latents: take data=latents"):
        Run(config(*run, f"latent.name={vae}", "data.encoded=false"))
    with pytest.raises(ValueError, match=r"holds images, not latents"):
        Run(config(*run, f"latent.name={vae}", f"data.path={shards}"))
    with pytest.raises(ValueError, match=r"reads the image, but data.encoded=true"):
        Run(config(*run, f"latent.name={vae}", "condition=superresolution"))
    with pytest.raises(ValueError, match=r"encoded with image_size=8"):
        Run(config(*run, f"latent.name={vae}", "data.image_size=16"))


def test_tasks_share_the_work(shards, vae, tmp_path, capsys):
    one = encoded(shards, vae, tmp_path / "one")
    for task in (1, 0, 2):
        encoded(shards, vae, tmp_path / "tasks", f"task={task}", "tasks=3")
        assert (tmp_path / "tasks" / index.MANIFEST).exists() == (task == 2)
    assert "waits for the shards of other tasks" in capsys.readouterr().out
    assert contents(one) == contents(tmp_path / "tasks")


@pytest.mark.slow
def test_processes_share_the_work(shards, vae, tmp_path):
    one = encoded(shards, vae, tmp_path / "one")
    assert contents(one) == contents(encoded(shards, vae, tmp_path / "several", "processes=2"))


def test_encoding_that_was_killed_goes_on_to_the_same_bytes(shards, vae, tmp_path):
    whole = encoded(shards, vae, tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dit", "encode", *options(shards, vae, out, "batch_size=64")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.npz"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(out.glob("*.npz")))
    assert 3 <= done < 17 and not (out / index.MANIFEST).exists()
    (out / "000003.tar").write_bytes(b"half")  # as if it had been cut
    before = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))[:2]}  # the third may be half
    encoded(shards, vae, out)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    left = {name: data for name, data in contents(out).items() if not name.endswith(".tmp")}
    assert left == contents(whole)


def test_other_settings_need_another_folder(shards, vae, tmp_path):
    out = encoded(shards, vae, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"encoded otherwise.*dtype.*choose another out"):
        encoded(shards, vae, out, "dtype=float16")
    with pytest.raises(ConfigError, match=r"encoded otherwise"):
        encoded(shards, save_vae(tmp_path / "other", seed=1), out)
    with pytest.raises(ConfigError, match=r"holds shards of another kind"):
        encoded(shards, vae, shards)


def test_bad_samples_are_left_out_up_to_a_share(vae, tmp_path):
    files = [sample(i) for i in range(40)]
    files[13]["png"] = b"no image"
    write_shards(tmp_path / "bad", files, 10)
    for _ in range(2):  # starting again changes nothing
        with pytest.raises(DataError, match=r"1 of 40 samples cannot be encoded.*00000013 of 000001\.tar"):
            encoded(tmp_path / "bad", vae, tmp_path / "out")
    out = encoded(tmp_path / "bad", vae, tmp_path / "out", "data.max_bad=0.05")
    assert index.read(out).about["left_out"] == 1
    [line] = (out / "000001.left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "00000013"
    assert [shard.samples for shard in index.read(out).shards] == [10, 9, 10, 10]


def test_bad_samples_of_all_shards_count_together(vae, tmp_path):
    files = [{**sample(i), **({"png": b"no image"} if i % 10 == 3 or 20 <= i < 30 else {})} for i in range(100)]
    write_shards(tmp_path / "bad", files, 10)
    with pytest.raises(DataError, match=r"1[0-9] of 100 samples cannot be encoded"):
        encoded(tmp_path / "bad", vae, tmp_path / "out", "data.max_bad=0.1")
    out = encoded(tmp_path / "bad", vae, tmp_path / "out", "data.max_bad=0.2")
    found = index.read(out)
    assert found.about["left_out"] == 19 and [shard.samples for shard in found.shards] == [9] * 9


def test_images_may_be_kept_beside(config, shards, vae, tmp_path):
    out = encoded(shards, vae, tmp_path / "out", "keep_images=true")
    data = Stream(str(out), 8, 1, 10, encoded=True, held_out=str(out))
    data.check()
    both = data.read("train")
    assert both["image"].shape == (170, 1, 8, 8) and len(data.read("held_out", most=3)["key"]) == 3
    bare = encoded(shards, vae, tmp_path / "bare")
    without = Stream(str(bare), 8, 1, 10, encoded=True)
    assert set(without.read("train")) == {"key", "label"}
    run = [*RUN, *of(bare)[:-1], "data.flip=false", "data.encoded=true", f"latent.name={vae}"]
    with pytest.raises(ValueError, match=r"the metric needs images.*data\.images=<folder>"):
        Run(config(*run, "metric=classifier", f"data.held_out={shards}"))
    Run(config(*run, "metric=classifier", f"data.held_out={shards}", f"data.images={shards}"))


def test_a_vae_that_was_trained_anew_is_noticed(config, shards, tmp_path):
    vae = save_vae(tmp_path / "vae")
    run = [*of(shards), "run=fly", f"latent.name={vae}", *RUN]
    trained(config, vae, *of(shards), "run=fly")
    Run(config(*run, "trainer.max_steps=8"))._lock.close()
    save_vae(tmp_path / "vae", seed=1)
    with pytest.raises(ValueError, match=r"or latent\.name=.*vae has other weights"):
        Run(config(*run, "trainer.max_steps=8"))


@pytest.mark.parametrize(("overrides", "message"), [
    (["dtype=int8"], "dtype=int8: choose one of"),
    (["task=3", "tasks=3"], r"task=3 must be one of 0\.\.2"),
    (["data.encoded=true"], "encode shards of images"),
    (["data.path=/nowhere"], "/nowhere does not exist"),
    (["latent.name=/nowhere"], r"latent\.name=/nowhere"),
    (["data=webdataset"], "take data=shards"),
    (["condition=inpainting"], "only captions are encoded"),
    (["accelerator=tpu"], "accelerator=tpu"),
])  # fmt: skip
def test_what_cannot_be_encoded_is_refused(shards, vae, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        encoded(shards, vae, tmp_path / "out", *overrides)


def test_captions_become_embeddings(config, vae, tmp_path):
    from tiny_encoders import clip as save_clip

    save_clip(tmp_path / "clip")
    files = [{**sample(i), "png": png(3 * i)} for i in range(64)]
    for i in (3, 17):
        files[i]["txt"] = b" "
    write_shards(tmp_path / "data", files, 8)
    told = ["condition=text", f"condition.name={tmp_path}/clip", "condition.width=64", "condition.max_length=9"]
    told += ["condition.pooled=true"]
    out = encoded(tmp_path / "data", vae, tmp_path / "out", *told)
    assert index.read(out).about["text"]["width"] == 64
    lengths = {len(Stream(str(out), 8, 1, 10, encoded=True, fields=["text"]).first()["text"][0])}
    assert lengths <= set(range(2, 10))

    def path(folder):
        return [*of(folder)[:-1], "data.flip=false"]

    told += ["model.cross_attention=true"]
    on_the_fly = trained(config, vae, *path(tmp_path / "data"), *told, "data.fields=[caption]", "run=fly")
    fields = ["data.encoded=true", "data.fields=[text,pooled]", "condition.precomputed=true", "run=latents"]
    on_latents = trained(config, vae, *path(out), *told, *fields)
    np.testing.assert_allclose(on_latents, on_the_fly, rtol=1e-5)
    with pytest.raises(ValueError, match=r"condition\.width=16"):
        Run(config(*RUN, *path(out), *told, *fields, f"latent.name={vae}", "condition.width=16", "run=narrow"))


def test_a_deterministic_encoder_has_one_moment(shards, tmp_path):
    class Halved(Autoencoder):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.shape, self.name, self.scale, self.shift = (1, 4, 4), "halved", 2.0, 0.0
            self.weight = torch.nn.Parameter(torch.ones(1))

        def moments(self, images):
            return torch.nn.functional.avg_pool2d(images, 2)[:, None]

    encoding = Encoding(Shards([str(shards)]), Halved(), tmp_path / "out", image_size=8, channels=1)
    for number in range(17):
        encoding.one(number)
    assert encoding.commit() is not None
    batch = next(Stream(str(tmp_path / "out"), 8, 1, 10, encoded=True).batches(4, 0))
    assert batch["latent"].shape == (4, 1, 1, 4, 4)
    assert torch.equal(Halved().draw(batch["latent"]), batch["latent"][:, 0] * 2)
