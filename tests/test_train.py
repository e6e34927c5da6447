import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dit.command.compose import compose
from dit.train import checkpoint, trained
from dit.train.run import Run


def train(cfg):
    """Train to the end; the lines of metrics.jsonl."""
    run = Run(cfg)
    signum = run.fit()
    assert signum is None
    return metrics(run.folder)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def weights(folder, step=12):
    path = folder / "checkpoints" / f"step-{step:08d}"
    return {name: checkpoint.load_weights(path, name) for name in ("model", "ema")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_dir):
    """The losses and weights of a run that nothing disturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, digits_dir)
    assert process.wait() == 0, process.stdout.read()
    return folder / "runs" / "digits"


def start(folder, digits_dir, *more):
    """`dit train` of a tiny digits run with two data workers."""
    overrides = [
        *("experiment=digits", f"runs_dir={folder}/runs", f"data_dir={digits_dir}", "metric=none", "logger=none"),
        *("model.hidden_size=16", "model.depth=1", "model.num_heads=2", "sampler.num_steps=2", "trainer.max_steps=40"),
        "learning_rate.warmup_steps=10",
        *("trainer.batch_size=32", "trainer.log_every_steps=1", "trainer.preview_every_steps=15"),
        *("trainer.checkpoint_every_steps=7", "data.num_workers=2", *more),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "dit", "train", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_line(folder, number, process):
    path = folder / "runs" / "digits" / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= number:
            return
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("signum", "line"),
    [
        (signal.SIGKILL, 3),
        pytest.param(signal.SIGKILL, 24, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 12, marks=pytest.mark.slow),
        (signal.SIGTERM, 16),
    ],
)
def test_a_run_stopped_at_any_step_goes_on_bit_equal(undisturbed, tmp_path, digits_dir, signum, line):
    process = start(tmp_path, digits_dir)
    wait_for_line(tmp_path, line, process)
    os.killpg(process.pid, signum)  # as a terminal and a scheduler do, data workers included
    code = process.wait()
    output = process.stdout.read()
    folder = tmp_path / "runs" / "digits"
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 75}[signum], output
    if signum != signal.SIGKILL:
        stopped = metrics(folder)[-1]["step"]
        assert stopped <= line + 8  # the step is finished and saved, not the run
        assert checkpoint.newest(folder / "checkpoints").name == f"step-{stopped:08d}"
    saved = bool(checkpoint.committed(folder / "checkpoints"))
    process = start(tmp_path, digits_dir)
    assert process.wait() == 0, process.stdout.read()
    assert ("going on from step" in process.stdout.read()) == saved
    assert losses(metrics(folder)) == losses(metrics(undisturbed))
    for name, tensors in weights(folder, 40).items():
        for key, value in weights(undisturbed, 40)[name].items():
            assert torch.equal(tensors[key], value), (name, key)


def test_a_run_leaves_the_folder_of_the_design(undisturbed):
    names = {path.name for path in undisturbed.iterdir()} - {".lock"}
    lineage = {"lineage", "lineage.jsonl"}
    assert names == {"attempts", "config.yaml", "metrics.jsonl", "samples", "summary.json", "checkpoints", *lineage}
    assert OmegaConf.load(undisturbed / "config.yaml").model.input_size == 8  # resolved
    assert [path.name for path in checkpoint.committed(undisturbed / "checkpoints")] == [
        "step-00000035",
        "step-00000040",
    ]
    pictures = sorted(path.name for path in (undisturbed / "samples").iterdir())
    assert pictures == ["step-00000015.png", "step-00000030.png", "step-00000040.png"]
    manifest = json.loads((undisturbed / "checkpoints" / "step-00000040" / "manifest.json").read_text())
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp", "state.json"}
    first, last = metrics(undisturbed)[0], metrics(undisturbed)[-1]
    assert first["loss"] == pytest.approx(1, abs=0.05) and first["images"] == 32
    assert last["loss"] < first["loss"]


def test_the_same_seed_gives_the_same_losses_and_another_others(config):
    first, again, other = (losses(train(config(f"run=r{i}", f"seed={seed}"))) for i, seed in enumerate((0, 0, 1)))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "condition", ["label", "none", "label_inpainting", "superresolution"], ids=lambda name: f"condition={name}"
)
def test_micro_batches_do_not_change_the_numbers(config, condition):
    told = [f"condition={condition}", *(["condition.factor=2"] if condition == "superresolution" else [])]
    whole = train(config("run=whole", *told))
    parts = train(config("run=parts", "trainer.micro_batch_size=8", *told))
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_line_is_the_mean_since_the_last_one_across_a_restart(config):
    every = train(config("run=every"))
    halves = train(config("run=halves", "trainer.log_every_steps=6", "trainer.max_steps=9"))
    assert [line["step"] for line in halves] == [6, 9]
    whole = train(config("run=halves", "trainer.log_every_steps=6"))
    assert [line["step"] for line in whole] == [6, 9, 12]
    assert whole[0]["loss"] == pytest.approx(sum(line["loss"] for line in every[:6]) / 6, rel=1e-5)


def test_bf16_trains(config):
    lines = train(config("run=bf16", "trainer.precision=bf16-mixed"))
    assert lines[-1]["loss"] == pytest.approx(train(config("run=fp32"))[-1]["loss"], rel=0.05)


def test_the_learning_rate_warms_up_and_falls(config):
    lines = train(config("run=lr", "learning_rate=cosine", "learning_rate.warmup_steps=4", "optimizer.lr=1.0"))
    rates = [line["lr"] for line in lines]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1)
    assert rates[-1] < 0.1 and rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("noise", ["linear", "cosine", "edm", "flow"])
@pytest.mark.parametrize("prediction", ["x0", "v", "edm"])
def test_every_schedule_trains_with_every_prediction(config, noise, prediction):
    lines = train(
        config(f"run={noise}-{prediction}", f"noise={noise}", f"prediction={prediction}", "trainer.max_steps=2")
    )
    assert all(line["loss"] > 0 for line in lines)


def test_a_complete_run_is_not_trained_again(config, capsys):
    train(config())
    before = (Path(config().runs_dir) / "digits" / "metrics.jsonl").stat().st_mtime_ns
    train(config())
    assert (Path(config().runs_dir) / "digits" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "is complete at step 12" in capsys.readouterr().out
    assert metrics(Path(config().runs_dir) / "digits") == train(config("trainer.max_steps=14"))[:12]


def test_a_run_killed_while_it_was_judged_is_judged_after_all(config):
    train(config())
    summary = Path(config().runs_dir) / "digits" / "summary.json"
    summary.unlink()
    train(config())
    assert json.loads(summary.read_text())["loss"] > 0


def test_another_configuration_under_the_same_name_is_refused(config):
    train(config())
    with pytest.raises(ValueError, match=r"begun with another configuration \(ema.decay=0.9, was 0.995\)"):
        Run(config("ema.decay=0.9"))
    with pytest.raises(ValueError, match="resume=never"):
        Run(config("resume=never"))
    with pytest.raises(ValueError, match=r"trainer\.max_steps=8, but run=digits is at step 12"):
        Run(config("trainer.max_steps=8"))


def test_other_data_under_the_same_name_is_refused_and_moved_data_is_not(config, digits_dir, tmp_path):
    import shutil

    from dit.data.digits import pack

    train(config())
    shutil.copytree(digits_dir, tmp_path / "moved")
    assert len(train(config(f"data_dir={tmp_path}/moved", "trainer.max_steps=13"))) == 13
    shutil.rmtree(tmp_path / "moved" / "digits" / "train")
    pack(tmp_path / "moved" / "digits" / "train", tmp_path / "other", samples_per_shard=150)
    with pytest.raises(ValueError, match="holds other shards than those run=digits was begun with"):
        Run(config(f"data_dir={tmp_path}/moved", "trainer.max_steps=14"))


def test_a_start_that_never_reached_a_checkpoint_does_not_bind_its_name(config):
    folder = Path(config().runs_dir) / "digits"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert len(train(config())) == 12


def test_a_longer_run_that_was_killed_before_its_end_is_summed_up_anew(config):
    train(config())
    summary = Path(config().runs_dir) / "digits" / "summary.json"
    before = summary.read_text()
    train(config("trainer.max_steps=14"))
    summary.write_text(before)
    train(config("trainer.max_steps=14"))
    assert json.loads(summary.read_text())["step"] == 14
    assert json.loads(summary.read_text())["images_per_second"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["latent=sd_vae", "latent.name=/nowhere", "data.image_size=64", "data.channels=3", "latent.channels=4"],
            "nowhere",
        ),
        (["metric=classifier", "data.held_out=null"], "data.held_out=null"),
        (["condition.num_classes=5"], "condition.num_classes=5 differs from data.num_classes=10"),
        (["latent.size=16"], "latent.size=16 is not data.image_size=8"),
        (["latent.channels=3"], "latent.channels=3 differs from data.channels=1"),
        (["noise=flow", "prediction=v", "times=discrete"], "Flow has no discrete steps: choose times=uniform"),
        (["model.mlp_ratio=-1"], r"model\.mlp_ratio=-1"),
        (["noise=edm", "prediction=edm", "grid.rho=0"], r"grid\.rho=0"),
        pytest.param(
            ["trainer=gpu"],
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_the_folder_is_made(config, overrides, message):
    cfg = config(*overrides)
    with pytest.raises(ValueError, match=message):
        Run(cfg)
    assert not Path(cfg.runs_dir).exists()


def test_two_processes_cannot_train_one_run(config):
    first = Run(config())
    with pytest.raises(ValueError, match="another process trains run=digits"):
        Run(config())
    assert first.fit() is None
    assert Run(config()).fit() is None


def test_a_damaged_checkpoint_is_passed_over_loudly_and_none_intact_is_an_error(config, capsys):
    lines = train(config())
    root = Path(config().runs_dir) / "digits" / "checkpoints"
    path = root / "step-00000012" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    (root / "step-00000013.tmp").mkdir()
    assert losses(train(config())) == losses(lines)
    assert "passing over the checkpoint" in capsys.readouterr().out
    assert sorted(p.name for p in root.iterdir()) == [
        "latest",
        "step-00000010",
        "step-00000012",
        "step-00000012.corrupt",
    ]
    (root / "step-00000012" / "manifest.json").write_text('{"files": {}}')
    assert checkpoint.newest(root).name == "step-00000010"
    (root / "step-00000012" / "manifest.json").write_text("[]")
    assert checkpoint.newest(root).name == "step-00000010"
    for path in root.glob("step-*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # and again: a second start must not begin anew in silence
        with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* is intact"):
            Run(config())


def test_the_final_figures_are_those_of_the_issue(config):
    cfg = config("metric=classifier", "evaluation.num_images=200")
    train(cfg)
    summary = json.loads((Path(cfg.runs_dir) / "digits" / "summary.json").read_text())
    keys = {
        "loss",
        "images_per_second",
        "accuracy",
        "diversity",
        "frechet",
        "frechet_floor",
        "frechet_noise",
        "nearest",
    }
    assert keys <= summary.keys()
    assert summary["frechet_noise"] > 20 * summary["frechet_floor"]


@pytest.mark.slow
def test_wandb_is_offline_when_nobody_is_logged_in(config, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    cfg = config("logger=wandb")
    train(cfg)
    folder = Path(cfg.runs_dir) / "digits"
    identity = (folder / "wandb-id").read_text()
    assert next(folder.glob("wandb/offline-run-*")).name.endswith(identity)
    train(config("logger=wandb", "trainer.max_steps=14"))
    assert (folder / "wandb-id").read_text() == identity


def test_wandb_out_of_reach_does_not_stop_a_run(config, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a closed port
    assert len(train(config("logger=wandb"))) == 12
    assert "Connection refused; training is not affected, and `dit sync run=digits" in capfd.readouterr().out


def test_a_run_begins_with_the_weights_it_is_given(config, tmp_path):
    first = Run(config("run=first", "trainer.max_steps=3"))
    assert first.fit() is None
    denoiser = trained.load(first.parts, trained.newest(first.folder), weights="model")
    torch.save({"ema": denoiser.network.state_dict(), "opt": {}}, tmp_path / "tiny.pt")
    init = ("init=published", f"init.path={tmp_path}/tiny.pt")
    run = Run(config("run=second", *init, "trainer.max_steps=1"))
    assert run.fit() is None
    before = [json.loads(line)["loss"] for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    [loss] = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert loss != before[0]
    begun = Run(config("run=fresh", *init))
    fresh = begun.strategy.begin(begun._denoiser(), begun.init, 0).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in denoiser.network.state_dict().items())
    (tmp_path / "tiny.pt").unlink()  # what goes on needs it no more
    assert Run(config("run=second", *init, "trainer.max_steps=2")).fit() is None
    with pytest.raises(ValueError, match=r"tiny\.pt"):
        Run(config("run=third", *init))
    torch.save(denoiser.network.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match=r"hidden_size|\(16,"):
        Run(config("run=third", *init, "model.hidden_size=32"))
    state = denoiser.network.state_dict()
    state["final_layer.linear.bias"] = state["final_layer.linear.bias"] * float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"nan\.pt: final_layer\.linear\.bias in the weights is not finite"):
        Run(config("run=third", "init=published", f"init.path={tmp_path}/nan.pt"))
    with pytest.raises(ValueError, match=r"was trained with noise=flow, but this run has linear"):
        Run(config("run=third", "init=sit", f"init.path={tmp_path}/tiny.pt"))
    assert not (first.folder.parent / "third").exists()


def test_a_metric_that_cannot_judge_is_refused_before_training(config):
    with pytest.raises(
        ValueError, match="metric=psnr judges autoencoders, and networks that restore the images they are told"
    ):
        Run(config("run=unjudged", "metric=psnr"))


def test_a_run_is_judged_once_by_any_metric(config, capsys):
    told = ("run=judged", "metric=psnr", "condition=superresolution", "condition.factor=2", "trainer.max_steps=1")
    for _ in range(2):
        assert Run(config(*told)).fit() is None
    assert "is complete" in capsys.readouterr().out


def test_dropout_is_keyed_by_the_step(tmp_path, digits_dir):
    def of(name, *stops):
        for stop in stops:
            overrides = ["experiment=digits", "model=unet_digits", "model.dropout=0.5", "model.model_channels=8"]
            overrides += ["model.head_channels=8", f"run={name}", f"trainer.max_steps={stop}", "trainer.batch_size=16"]
            overrides += [f"runs_dir={tmp_path}", f"data_dir={digits_dir}", "metric=none", "logger=none"]
            overrides += ["data.num_workers=0", "trainer.log_every_steps=1", "trainer.preview_every_steps=2"]
            overrides += ["learning_rate=constant", "sampler.num_steps=1"]
            lines = train(compose("train", overrides))
        return losses(lines)

    assert of("whole", 4) == of("parts", 2, 4)
