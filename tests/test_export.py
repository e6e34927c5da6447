import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from noted import note
from omegaconf import OmegaConf
from safetensors.torch import load_file

import dit
from dit.command import export
from dit.command.compose import ConfigError, compose
from dit.train import checkpoint, trained
from dit.train.build import Parts
from dit.train.exporting import identities
from dit.train.run import Run
from dit.weights.identity import sha256


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_dir):
    """A run with two averages and snapshots, and a third average to compare with; and one with the usual average."""
    folder = tmp_path_factory.mktemp("export") / "runs"
    for name, more in {
        "power": [
            "ema=power",
            "ema.snapshot_every_steps=2",
            "trainer.max_steps=20",
            "trainer.checkpoint_every_steps=10",
        ],
        "usual": ["trainer.max_steps=2"],
    }.items():
        cfg = compose(
            "train",
            [
                *("experiment=digits", f"run={name}", f"runs_dir={folder}", f"data_dir={digits_dir}", "metric=none"),
                *("logger=none", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "sampler.num_steps=2"),
                *("trainer.batch_size=16", "data.num_workers=0", "learning_rate=constant", *more),
            ],
        )
        if name == "power":
            OmegaConf.set_struct(cfg, False)
            cfg.ema.profiles.middle = {"_target_": "dit.weights.ema.power", "std": 0.08}
        assert Run(cfg).fit() is None
    return folder


def exported(runs, path, *overrides):
    """What `dit export` writes: the weights, and what is said of them."""
    cfg = compose("export", [f"runs_dir={runs}", f"path={path}", *overrides])
    export.check(cfg)
    assert export.main(cfg) == 0
    assert {file.name for file in path.iterdir()} - {"samples.png"} == {
        *("README.md", "config.json", "manifest.json", "model.safetensors")
    }
    assert not list(path.parent.glob("*.tmp")) and not list(path.parent.glob("*.old"))
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("weights", ["ema", "ema_long", "model"])
def test_the_network_is_rebuilt_of_what_is_exported(runs, tmp_path, weights):
    tensors, about = exported(runs, tmp_path / "deep" / "out", "run=power", f"weights={weights}")
    kept = checkpoint.load_weights(checkpoint.newest(runs / "power" / "checkpoints"), weights)
    assert kept.keys() <= tensors.keys() and all(torch.equal(tensors[name], kept[name]) for name in kept)
    assert (about["step"], about["weights"], about["precision"], about["format"]) == (20, weights, "float32", "native")
    network = Parts(OmegaConf.create(about["config"])).denoiser().network
    network.load_state_dict(tensors)
    assert about["parameters"] == sum(t.numel() for t in network.state_dict().values())


def test_an_earlier_step_and_half_the_bytes(runs, tmp_path):
    half, about = exported(runs, tmp_path / "half", "run=power", "step=10", "precision=bfloat16")
    whole, _ = exported(runs, tmp_path / "whole", "run=power", "step=10")
    last, _ = exported(runs, tmp_path / "last", "run=power")
    assert about["step"] == 10
    assert all(half[name].dtype == torch.bfloat16 and torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert any(not torch.equal(whole[name], last[name]) for name in whole)


@pytest.mark.parametrize("step", [20, 10])
def test_an_average_of_another_length_is_made_of_the_snapshots(runs, tmp_path, step):
    made, about = exported(runs, tmp_path / "made", "run=power", "ema_std=0.08", f"step={step}")
    tracked, _ = exported(runs, tmp_path / "tracked", "run=power", "weights=middle", f"step={step}")
    other, _ = exported(runs, tmp_path / "other", "run=power", "weights=ema_long", f"step={step}")
    assert (about["step"], about["ema_std"]) == (step, 0.08)

    def apart(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a).sqrt().item()

    # As few steps as these are far from a continuous profile.
    assert apart(made, tracked) < 0.1 * apart(other, tracked)


def test_a_damaged_snapshot_is_passed_over(runs, tmp_path, capsys):
    shutil.copytree(runs / "power", tmp_path / "runs" / "power")
    newest = checkpoint.committed(tmp_path / "runs" / "power" / "snapshots")[-1]
    file = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    _, about = exported(tmp_path / "runs", tmp_path / "out", "run=power", "ema_std=0.08")
    assert about["step"] == 18
    assert f"passing over the snapshot {newest}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no intact snapshot of step 20; there are 2, 4, "):
        exported(tmp_path / "runs", tmp_path / "again", "run=power", "ema_std=0.08", "step=20")


def test_few_snapshots_are_warned_of(runs, tmp_path, capsys):
    exported(runs, tmp_path / "out", "run=power", "ema_std=0.02", "step=4")
    assert "WARNING: that is much; take an ema_std nearer" in capsys.readouterr().out


def test_what_is_there_stays_unless_told_otherwise(runs, tmp_path):
    path = tmp_path / "out"
    first, _ = exported(runs, path, "run=power")
    with pytest.raises(ConfigError, match=r"out exists: choose another path, or overwrite=true"):
        exported(runs, path, "run=power", "weights=model")
    assert all(torch.equal(first[name], value) for name, value in load_file(path / "model.safetensors").items())
    second, _ = exported(runs, path, "run=power", "weights=model", "overwrite=true")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    (path / "evaluation.jsonl").write_text("{}")
    (path / "evaluation").mkdir()
    with pytest.raises(
        ConfigError, match=r"has evaluations.*: choose another path, or move .*/evaluation, .*n\.jsonl away"
    ):
        exported(runs, path, "run=power", "overwrite=true")
    assert (path / "evaluation.jsonl").exists() and (path / "evaluation").exists()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no export: choose another path"):
        exported(runs, path, "run=power", "overwrite=true")
    with pytest.raises(ConfigError, match="exists and is no export"):
        exported(runs, path / "notes.txt", "run=power", "overwrite=true")
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=nope"], "run=nope: no such run; runs in .*: power, usual"),
        (["run=../x"], "a run's name is a folder's name"),
        (["run=usual", "weights=ema_long"], "weights=ema_long: choose one of ema, model"),
        (["run=power", "weights=best"], "weights=best: choose one of ema, ema_long, middle, model"),
        (["run=power", "ema_std=0.3"], r"ema_std=0.3 must lie in \(0, 0.288\], like 0.10"),
        (["run=power", "ema_std=0"], "ema_std=0 must be greater than 0"),
        (["run=power", "ema_std=wide"], "ema_std=wide must be a number"),
        (["run=power", "ema_std=0.1", "weights=model"], "give weights=model or ema_std=0.1, not both"),
        (["run=power", "ema_std=0.1", "step=3"], "no intact snapshot of step 3; there are 2, 4, 6"),
        (["run=power", "step=3"], "has no checkpoint of step 3; there are 10, 20"),
        (["run=usual", "ema_std=0.1"], "kept no snapshots.* train with ema=power ema.snapshot_every_steps=N"),
        (["run=power", "precision=float16"], "precision=float16: choose one of float32, bfloat16"),
        (["run=power", "format=ckpt"], "format=ckpt: choose one of native, diffusers, pt2, onnx"),
        (["run=power", "batch_size=4"], "batch_size=4 is for format=pt2 and format=onnx"),
        (["run=power", "format=pt2", "batch_size=0"], "batch_size=0 must be at least 1"),
        (["run=power", "shard_gb=0"], "shard_gb=0 must be greater than 0"),
        (["run=power", "shard_gb=1e300"], r"shard_gb=1e\+300 must be at most 1000000: leave it out"),
        (["run=power", "push=digits"], "push=digits: give a repository of the hub, like push=name/model"),
        (["run=power", "push=a/b/c"], "push=a/b/c: give a repository of the hub, like push=name/model"),
        (["run=power", "licence=3"], "licence=3: give the name that hubs have for it, like licence=apache-2.0"),
        (["run=power", "convention=sit"], "convention=sit is that of published weights: give published=<file>"),
        (["run=power", "format=pt2", "shard_gb=1"], "shard_gb=1: format=pt2 is one file"),
        (["run=power", "path=/proc/out"], "path=/proc/out cannot be written, .*: choose another path"),
        (["run=power", "path=/dev/null/out"], "path=/dev/null/out cannot be written, Not a directory: choose another"),
    ],
)
def test_mistakes_are_answered_and_leave_nothing(runs, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        exported(runs, tmp_path / "out", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_card_has_figures_of_these_weights_alone(runs, tmp_path):
    """Also of those they were rounded from, which it says; an export that is exported again is what it was."""
    shutil.copytree(runs / "power", tmp_path / "power")

    names = ["own", "other", "unsaid", "half", "made"]  # whose weights figures are of, which are their places here

    def judge(run, **digests):
        for name, digest in digests.items():
            note(tmp_path / run, {"bits": names.index(name)}, step=20, sha256=digest, metric={"bits": {}})

    def judged(run, *overrides):
        """The figures of a card, and of which weights it says they are."""
        _, about = exported(tmp_path, tmp_path / run, *overrides)
        lines = (tmp_path / run / "README.md").read_text().splitlines()
        cells = [line.split(" | ") for line in lines[lines.index("## Evaluations by bits") + 4 :] if "|" in line]
        assert any(line.endswith(", rounded to bfloat16 |") for line in lines) == bool(about["rounded_from"])
        return about, {names[int(row[-1].removesuffix(" |"))]: row[0].removeprefix("| ") for row in cells}

    newest = checkpoint.newest(tmp_path / "power" / "checkpoints")
    parts = Parts(OmegaConf.load(tmp_path / "power" / "config.yaml"))
    own, other = (sha256(trained.load(parts, newest, weights)) for weights in ("ema", "model"))
    judge("power", own=own, other=other, unsaid=None)
    assert judged("whole", "run=power")[1] == {"own": "ema", "unsaid": "ema"}
    half = {"own": "ema, before rounding", "unsaid": "ema, before rounding"}
    assert judged("half", "run=power", "precision=bfloat16")[1] == half
    judge("half", half=sha256(dit.load(tmp_path / "half")._loaded.denoiser), other=own[::-1])
    for precision in ("float32", "bfloat16"):
        assert judged(f"{precision}_again", "run=half", f"precision={precision}")[1] == {**half, "half": "ema"}
    exported(tmp_path, tmp_path / "made", "run=power", "ema_std=0.08")
    judge("made", made=sha256(dit.load(tmp_path / "made")._loaded.denoiser))
    about, figures = judged("made_again", "run=made")
    assert figures == {"made": "an average of std 0.08"} and about["ema_std"] == 0.08 and "weights" not in about


def test_an_adapter_is_judged_as_it_was_trained(runs):
    """Not merged, so that its weights have another name."""
    weights = trained.weights_of(checkpoint.newest(runs / "power" / "checkpoints"))
    adapted = {f"{name}.base_layer": value for name, value in weights.items()}
    merged, trained_as = (sha256({f"network.{k}": v for k, v in each.items()}) for each in (weights, adapted))
    about = identities(weights, weights, adapted, {})
    assert about == {"sha256": [merged, trained_as], "rounded_from": []}
    half = {name: value.bfloat16() for name, value in weights.items()}
    assert identities(weights, half, adapted, {})["rounded_from"] == [merged, trained_as]


def test_the_command_line(runs, tmp_path):
    command = [sys.executable, "-m", "dit", "export", f"runs_dir={runs}", "run=power", "path=out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    codes, outputs = [], []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        codes.append(done.returncode)
        outputs.append(done.stdout + done.stderr)
    assert codes == [0, 2], outputs
    assert "parameters of step 20, float32: out" in outputs[0]
    assert "path=out exists" in outputs[1] and "Traceback" not in outputs[1]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
