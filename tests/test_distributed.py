"""Whatever the strategy and the number of processes, a run has the same numbers, and checkpoints fit together."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from together import copied, differences, lines, train_together, weights

from dit.command import export
from dit.command.compose import compose
from dit.train.build import Parts
from dit.train.launch import launch
from dit.train.sharded import Sharded
from dit.train.strategy import by_layout
from dit.train.world import World
from dit.weights.ema import EMA, held

# Of sums in another order. In bfloat16 the order in which a sum is rounded matters more.
FP32 = {"loss": 1e-5, "grad_norm": 1e-5, "ema": 1e-5, "model": 2e-5, "optimizer": 1e-4}
BF16 = {"loss": 2e-3, "grad_norm": 2e-2, "ema": 2e-3, "model": 1e-2, "optimizer": 1e-1}
SMALL = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2"]
STRATEGIES = ["ddp", "fsdp", "fsdp_tp", "zero1", "zero2", "zero3"]
STEPS, HALF = 30, 15
KEPT = "trainer.reshard_after_forward=false"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, digits_dir):
    """The configuration of a small run by its name."""
    folder = tmp_path_factory.mktemp("together")

    def of(run, *overrides, steps=STEPS, model=()):
        small = [] if model else SMALL
        return compose(
            "train",
            [
                *("experiment=digits", f"run={run}", f"runs_dir={folder}/runs", f"data_dir={digits_dir}"),
                *("metric=none", "logger=none", "learning_rate=constant", "ema.decay=0.9", "data.num_workers=0"),
                *(*small, "sampler.num_steps=2"),
                *("trainer.batch_size=32", "trainer.log_every_steps=1", "trainer.precision=32-true"),
                *(f"trainer.max_steps={steps}", "trainer.checkpoint_every_steps=1000"),
                *("trainer.preview_every_steps=12", *overrides),
            ],
        )

    return of


@pytest.fixture(scope="module")
def single(recipe):
    """What one process gives, whole and stopped in the middle."""
    runs = [
        recipe("single", "trainer=cpu"),
        recipe("half-single", "trainer=cpu", steps=HALF),
    ]
    assert train_together(runs, 1) == 0
    return SimpleNamespace(whole=runs[0], half=runs[1])


@pytest.fixture(scope="module")
def double(recipe, single):
    """What two processes give: begun, stopped in the middle, gone on with from one, in parts; some of each."""
    whole = {name: recipe(name, f"trainer={name}") for name in STRATEGIES}
    whole["offload"] = recipe("offload", "trainer=zero1", "trainer.offload=true")
    whole["kept"] = recipe("kept", "trainer=fsdp", KEPT, "trainer.prefetch_units=1")
    half = {name: recipe(f"half-{name}", f"trainer={name}", steps=HALF) for name in ("fsdp_tp", "zero3")}
    from_one = {name: recipe(copied(single.half, f"from-one-{name}"), f"trainer={name}") for name in ("ddp", "zero3")}
    parts = {name: in_parts(recipe, name, f"trainer={name}", 4) for name in ("fsdp", "zero3")}
    assert train_together([*whole.values(), *half.values(), *from_one.values(), *parts.values()], 2) == 0
    return SimpleNamespace(whole=whole, half=half, from_one=from_one, parts=parts)


@pytest.fixture(scope="module")
def others(recipe, single):
    """The others of these, and in mixed precision."""
    half = {name: recipe(f"half-{name}", f"trainer={name}", steps=HALF) for name in ("ddp", "fsdp", "zero1", "zero2")}
    from_one = {name: recipe(copied(single.half, f"from-one-{name}"), f"trainer={name}") for name in ("fsdp", "zero2")}
    parts = {name: in_parts(recipe, name, f"trainer={name}", 4) for name in ("ddp", "zero2")}
    mixed = "trainer.precision=bf16-mixed"
    bf16 = {name: recipe(f"bf16-{name}", f"trainer={name}", mixed) for name in STRATEGIES}
    bf16["single"] = recipe("bf16-single", "trainer=cpu", mixed)
    assert train_together([bf16["single"]], 1) == 0
    runs = [*half.values(), *from_one.values(), *parts.values(), *(bf16[name] for name in STRATEGIES)]
    assert train_together(runs, 2) == 0
    return SimpleNamespace(half=half, from_one=from_one, parts=parts, bf16=bf16)


def in_parts(recipe, name, trainer, images):
    options = (f"trainer.micro_batch_size={images}", "trainer.max_grad_norm=0.5")
    return recipe(f"parts-{name}", trainer, *options, steps=8)


def close(found, tolerance):
    return all(found[key] <= tolerance[key] for key in tolerance)


@pytest.mark.parametrize("name", [*STRATEGIES, "offload", "kept"])
def test_two_processes_give_the_numbers_of_one(single, double, name):
    run = double.whole[name]
    found = differences(run, single.whole)
    assert close(found, FP32), found
    assert lines(single.whole)[0]["loss"] > 1.1 * lines(single.whole)[-1]["loss"]  # there was something to learn
    pictures = [Path(cfg.runs_dir) / cfg.run / "samples" for cfg in (run, single.whole)]
    assert [path.name for path in sorted(pictures[0].iterdir())] == [f"step-{n:08d}.png" for n in (12, 24, 30)]
    for path in sorted(pictures[1].iterdir()):
        ours, theirs = (np.asarray(Image.open(folder / path.name), int) for folder in pictures)
        assert np.abs(ours - theirs).max() <= 1, path.name


@pytest.mark.parametrize("options", [[], [KEPT]], ids=["resharded", "kept"])
def test_weights_that_change_are_seen_whatever_is_gathered(recipe, options):
    """Averages that are lent, also between a forward and its backward pass, and what a step has made of the weights."""
    cfg, world = recipe("lent", "trainer=fsdp", "trainer.devices=1", *options), World()
    world.join("cpu")
    try:
        strategy, denoiser = Sharded(cfg.trainer, world, torch.device("cpu")), Parts(cfg).denoiser("meta")
        network, plain = strategy.begin(denoiser, None, 0), Parts(cfg).denoiser().network
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p, same in zip(network.parameters(), plain.parameters(), strict=True):
                p.to_local().copy_(same.normal_(std=0.1, generator=generator))
        module = SimpleNamespace(network=network, ema=EMA(strategy.averaged(network), {"ema": held(10)}))
        average = copy.deepcopy(plain)
        of_plain, of_network = (torch.optim.SGD(by_layout([*n.parameters()]), lr=0.1) for n in (plain, network))
        strategy.start(denoiser, {"denoiser": of_network}, micro_batches=1, max_norm=None)
        x, told = torch.randn(4, 1, 8, 8, generator=generator), {"time": torch.ones(4), "label": torch.arange(4)}

        def alike(other, within=contextlib.nullcontext):
            with torch.no_grad(), within():
                torch.testing.assert_close(network(x, **told), other(x, **told))

        for _ in range(2):
            loss = network(x, **told).square().mean()
            alike(average, lambda: strategy.lent(module))
            loss.backward(), plain(x, **told).square().mean().backward()
            alike(plain)
            strategy.step("denoiser", lambda _, norm: norm > 0), of_plain.step(), of_plain.zero_grad()
            alike(plain)
            alike(average, lambda: strategy.lent(module))
    finally:
        world.leave()


def test_exports_of_one_state_are_bit_equal_whatever_saved_it(recipe, tmp_path):
    """Whole, in shares or in ZeRO's flat ones: the same weights, averaged and raw, and the same file."""
    still = ["optimizer.lr=0", "init=published", f"init.path={tmp_path}/begun.safetensors"]
    names = ("ddp", "fsdp", "fsdp_tp", "zero3")
    runs = {name: recipe(f"still-{name}", f"trainer={name}", *still, steps=2) for name in names}
    generator = torch.Generator().manual_seed(3)
    state = Parts(runs["ddp"]).denoiser().network.state_dict()
    begun = {n: v if n == "pos_embed" else torch.randn(v.shape, generator=generator) for n, v in state.items()}
    save_file(begun, tmp_path / "begun.safetensors")
    assert train_together([*runs.values()], 2) == 0
    written = {}
    for name, run in runs.items():
        for kept in ("ema", "model"):
            path = tmp_path / name / kept
            overrides = [f"run={run.run}", f"runs_dir={run.runs_dir}", f"path={path}", f"weights={kept}"]
            assert export.main(compose("export", overrides)) == 0
            written[name, kept] = (path / "model.safetensors").read_bytes()
    assert len(set(written.values())) == 1
    found = load_file(path / "model.safetensors")
    assert all(torch.equal(found[n], value) for n, value in begun.items())


def parts_are_those_of_one(recipe, runs):
    reference = in_parts(recipe, "single", "trainer=cpu", 8)
    assert train_together([reference], 1) == 0
    assert max(line["grad_norm"] for line in lines(reference)) > 0.5
    for name, run in runs.items():
        found = differences(run, reference)
        assert close(found, FP32), (name, found)


def one_goes_on(recipe, single, halves):
    """And has to take its batch in parts."""
    parts = ["trainer=cpu", "trainer.micro_batch_size=16"]
    runs = {name: recipe(copied(half, f"to-one-{name}"), *parts) for name, half in halves.items()}
    assert train_together(runs.values(), 1) == 0
    for name, run in runs.items():
        found = differences(run, single.whole)
        assert close(found, FP32), (name, found)


def test_accumulation_and_clipping_are_those_of_one_process(double, recipe):
    parts_are_those_of_one(recipe, double.parts)


def test_two_processes_go_on_from_one(single, double):
    for name, run in double.from_one.items():
        found = differences(run, single.whole)
        assert close(found, FP32), (name, found)


def test_one_process_goes_on_from_two(single, double, recipe):
    one_goes_on(recipe, single, double.half)


@pytest.mark.slow
def test_so_it_is_with_the_other_strategies(single, others, recipe):
    parts_are_those_of_one(recipe, others.parts)
    one_goes_on(recipe, single, others.half)
    for name, run in others.from_one.items():
        found = differences(run, single.whole)
        assert close(found, FP32), (name, found)


@pytest.mark.slow
def test_in_mixed_precision_they_agree_within_its_rounding(others):
    for name in STRATEGIES:
        found = differences(others.bf16[name], others.bf16["single"])
        assert close(found, BF16), (name, found)


@pytest.mark.slow
def test_in_float8_they_agree_within_its_rounding(recipe):
    """Factors are those of what a device sees of a batch."""
    pytest.importorskip("torchao")
    ways = {"ddp": [], "fsdp": [], "kept": ["trainer=fsdp", KEPT, "trainer.precision=bf16-mixed"]}
    single = recipe("float8-single", "trainer=cpu", "trainer.float8=emulate")
    runs = [
        recipe(f"float8-{n}", f"trainer={n.replace('kept', 'fsdp')}", "trainer.float8=emulate", *more)
        for n, more in ways.items()
    ]
    assert train_together([single], 1) == 0 and train_together(runs, 2) == 0
    for name, run in zip(ways, runs, strict=True):
        found = differences(run, single)
        assert close(found, BF16), (name, found)


@pytest.mark.slow
def test_the_same_strategy_and_size_go_on_bit_equal(double, others, recipe):
    half = {**double.half, **others.half}
    runs = {name: recipe(copied(half[name], f"again-{name}"), f"trainer={name}") for name in STRATEGIES}
    assert train_together(runs.values(), 2) == 0
    for name, run in runs.items():
        assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(double.whole[name])], name
        assert set(differences(run, double.whole[name]).values()) == {0.0}, name


@pytest.mark.slow
def test_checkpoints_fit_all_strategies_and_sizes(single, double, others, recipe):
    """Saved under one, two and four processes, resumed under each other."""
    two, four = ["ddp", "fsdp", "zero3"], {"fsdp4": "fsdp", "tensor4": "fsdp_tp"}
    halves = {name: recipe(f"half-{name}", f"trainer={way}", steps=HALF) for name, way in four.items()}
    assert train_together(halves.values(), 4) == 0
    begun = {"single": single.half, **{name: {**double.half, **others.half}[name] for name in two}, **halves}
    for size, ways in ((1, {"single": "cpu"}), (2, {name: name for name in two}), (4, four)):
        runs = {
            (old, new): recipe(copied(cfg, f"{old}-to-{new}"), f"trainer={way}")
            for old, cfg in begun.items()
            for new, way in ways.items()
            if old != new
        }
        assert train_together(runs.values(), size) == 0
        for way, run in runs.items():
            found = differences(run, single.whole)
            assert close(found, FP32), (way, found)


@pytest.mark.slow
def test_all_kinds_of_networks_are_sharded(recipe):
    """Also with queries and keys normalized, fused matrices, convolutions, an optimizer of the objective's own."""
    model = ["trainer.max_steps=6"]
    kinds = {
        "modern": ["model=dit_digits_modern", *SMALL, "model.mlp_ratio=4.5", "trainer.max_steps=6"],
        "shared": ["model.shared_adaln=true", "model.class_tokens=4", "model.rms_norm=true", *model],
        "unet": ["model=unet_digits", "trainer.max_steps=6"],
        "unet-bf16": ["model=unet_digits", "trainer.max_steps=6", "trainer.precision=bf16-mixed"],
        "uncertain": ["objective=uncertain", *model],
    }

    def of(kind, name, *more):
        plain = [o for o in kinds[kind] if o.startswith("model=")]
        return recipe(f"{kind}-{name}", *kinds[kind], *more, model=plain)

    ways = {"modern": ["fsdp", "fsdp_tp", "zero3"], "shared": ["fsdp", "fsdp_tp"], "unet": ["fsdp", "zero3"]}
    ways |= {"unet-bf16": ["fsdp"], "uncertain": ["ddp", "fsdp"]}
    assert train_together([of(kind, "single", "trainer=cpu") for kind in kinds], 1) == 0
    runs = {(kind, way): of(kind, way, f"trainer={way}") for kind in ways for way in ways[kind]}
    assert train_together(runs.values(), 2) == 0
    for (kind, way), run in runs.items():
        found = differences(run, of(kind, "single", "trainer=cpu"))
        assert close(found, BF16 if "bf16" in kind else FP32), (kind, way, found)


@pytest.mark.slow
def test_nodes_may_have_copies(single, recipe, monkeypatch):
    """HSDP: two nodes of two devices each, as their environment says."""
    run = recipe("hsdp", "trainer=fsdp", "trainer.shard=node")
    assert launch(_two_nodes, run, 4) == 0
    found = differences(run, single.whole)
    assert close(found, FP32), found


def _two_nodes(cfg):
    from dit.command.train import one_of_several

    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2)}
    return one_of_several(cfg)


def command(cfg, *launcher, **env):
    """`dit train` of a configuration, by a launcher, in a group of processes of its own."""
    from omegaconf import OmegaConf

    keys = ["run", "runs_dir", "data_dir", "data.num_workers", "model.hidden_size", "sampler.num_steps"]
    keys += [f"trainer.{key}" for key in ("batch_size", "log_every_steps", "max_steps", "precision", "lanes")]
    keys += [f"trainer.{key}" for key in ("devices", "accelerator", "checkpoint_every_steps")]
    overrides = [f"{key}={OmegaConf.select(cfg, key)}" for key in keys] + [f"trainer={cfg.trainer.strategy}"]
    fixed = [
        "experiment=digits",
        "metric=none",
        "logger=none",
        "learning_rate=constant",
        "model.depth=1",
        "model.num_heads=2",
    ]
    return subprocess.Popen(
        [*(launcher or [sys.executable]), "-m", "dit", "train", *fixed, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **env},
    )


def wait_for_line(cfg, number, process):
    path = Path(cfg.runs_dir) / cfg.run / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= number):
        time.sleep(0.01)


def test_a_signal_stops_all_processes_at_the_same_step(recipe):
    cfg = recipe("signal", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", steps=100_000)
    process = command(cfg)
    wait_for_line(cfg, 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert output.count("stopped and saved at step") == 1, output
    assert output.count("stopping after this step") == 1, output
    assert weights(cfg)["model"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(recipe):
    cfg = recipe("dies", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", steps=100_000)
    process = command(cfg)
    wait_for_line(cfg, 5, process)
    ranks = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "forkserver"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "was ended by SIGKILL" in output


@pytest.mark.slow
def test_torchrun_starts_it_too(recipe):
    cfg = recipe("torchrun", "trainer=fsdp", "trainer.accelerator=cpu", steps=6)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"]
    process = command(cfg, *launcher)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "= 2 devices x 16 images" in output
    assert len(lines(cfg)) == 6
