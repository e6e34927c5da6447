import json
import sys
from pathlib import Path

import pytest
import torch

from dit.noise.vp import linear

TINY = [
    "data.image_size=32",
    "model.patch_size=2",
    "model.depth=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "data.num_classes=10",
]

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def bench(monkeypatch, capsys):
    """What a sub-command prints: the lines, of which the last is JSON."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import bench

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        bench.main()
        *lines, last = capsys.readouterr().out.splitlines()
        return lines, json.loads(last)

    run.commands = {command.__name__: arguments for command, (_, arguments) in bench.COMMANDS.items()}
    return run


def test_figures_come_with_their_machine_and_command(bench):
    lines, told = bench("attention", "--batch-size", "1", "--heads", "1", "--tokens", "4", "--repeats", "2")
    assert told["machine"].keys() == {"device", "threads", "torch", "precision", "date"}
    assert all(str(value) in lines[0] for value in told["machine"].values())
    assert told["asked"] == {"batch_size": 1, "heads": 1, "tokens": 4, "steps": 1, "repeats": 2, "threads": 1}
    assert len(told["seconds"]["math"]["72 in 80"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention", "--repeats", "0"], "--repeats: 0 must be greater than 0"),
        (["train", "--memory", "-1"], "--memory: -1 must be greater than 0"),
        (["train", "latent=pixels"], "take latent=sd_vae"),
        (["train", "model=dit_x"], "model=dit_x"),
        (["train", "--trace", "nowhere/trace.json"], "give a file in a folder"),
        (["train", "trainer.compile=true"], "give --compile"),
        pytest.param(["train", "trainer.float8=tensorwise", "--compile"], "needs a GPU", marks=WITHOUT_GPU),
        (["train", "model=lightning_dit_b_2", "--against", "published"], "the published DiT alone"),
        (["curves", "--steps", "2"], "50 steps is the least"),
    ],
)
def test_mistakes_end_with_exit_code_2(bench, words, message, capsys):
    with pytest.raises(SystemExit) as raised:
        bench(*words)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def test_the_interval_is_the_published_one(bench):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = linear()(t)
    inside = t[(sigma / alpha > 0.28) & (sigma / alpha <= 2.9)]
    assert json.loads(bench.commands["sample"]["--interval"]["default"]) == pytest.approx(inside[[0, -1]], abs=0.005)


@pytest.mark.slow
def test_a_step_beside_those_of_others(bench, tmp_path):
    words = ["--against", "diffusers", "published", "--batch-size", "2", "--memory", "2"]
    words += ["--trace", f"{tmp_path}/trace.json"]
    lines, told = bench("train", *TINY, *words, "--steps", "1", "--repeats", "2")  # which checks that all do the same
    assert "aten::addmm" in {
        event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    ours, *peers = told["seconds"]
    assert ours == "ours, eager" and peers[0] == "published recipe" and len(peers) == 3
    for parts in told["seconds"].values():
        assert list(parts) == ["data", "forward", "backward", "optimizer", "EMA", "peak"]
        assert all(len(parts[part]) == 2 and min(parts[part]) > 0 for part in list(parts)[:-1])
    assert lines[-2].startswith("ours, eager, over the better of the peers, ")
    assert [row["checkpointing"] for row in told["memory"]] == ["none", "full", "selective"]
    assert all(row["peak"] <= row["predicted"] < 2 * row["peak"] for row in told["memory"])


@pytest.mark.slow
def test_what_two_processes_send_each_other(bench):
    lines, told = bench("communication", *TINY, "--repeats", "1")
    assert [line.split(" | ")[0] for line in lines[-4:-1]] == ["| ddp", "| fsdp", "| fsdp, kept"]
    for way in told["ways"].values():
        assert len(way["ranks"]) == 2 and way["sent"] > 0
        assert all(rank["communication"] > 0 for rank in way["ranks"])
    assert told["ways"]["fsdp, kept"]["sent"] < told["ways"]["fsdp"]["sent"]


@pytest.mark.slow
def test_sampling_beside_the_pipeline_and_by_sampler(bench):
    words = ["--images", "1", "--steps", "2", "--repeats", "1", "--against", "diffusers"]
    _, told = bench("sample", *TINY, *words, "--samplers", "ddim", "heun", "--table-steps", "2")  # images are compared
    assert [*told["seconds"]] == ["DiTPipeline", "ours, eager", "ours, eager, guided within [0.08,0.47]"]
    assert [(row["sampler"], row["guidance"]) for row in told["table"]] == [
        (sampler, guidance) for sampler in ("ddim", "heun") for guidance in ("none", "full", "interval")
    ]
