import itertools
import json
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_conf import dit
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit.command import doctor, train
from dit.command.compose import ConfigError, compose
from dit.train.build import Parts
from dit.train.cost import inputs_of, memory, shard
from dit.train.hardware import HARDWARE, hardware
from dit.train.layout import Layout, assumed_layout, check, divided
from dit.train.plan import Plan, Planner, Traffic, ring
from dit.train.sharded import Sharded
from dit.train.world import World

TOOLS = Path(__file__).parents[1] / "tools"
D, DEPTH, IMAGES = 96, 3, 4
SMALL = ["latent=pixels", "data.image_size=16", "data.num_classes=10", "model.patch_size=2", "model.num_heads=4"]
SMALL += [f"model.hidden_size={D}", f"model.depth={DEPTH}"]
KEPT = ["trainer=fsdp", "trainer.reshard_after_forward=false"]

# By hand: qkv, proj, fc1, fc2, adaLN with their biases; patches, time, labels, positions, final layer.
BLOCK = 18 * D * D + 15 * D
POSITIONS = 64 * D
REST = 13 * D + (256 * D + D + D * D + D) + 11 * D + POSITIONS + (2 * D * D + 2 * D + 12 * D + 12)
ALL = DEPTH * BLOCK + REST
TRAINED = ALL - POSITIONS


def planner(*overrides):
    cfg = compose("doctor", [*SMALL, *overrides])
    doctor.check(cfg)
    return Planner(Parts(cfg))


@pytest.fixture(scope="module")
def plain():
    return planner("trainer.precision=32-true")


@pytest.fixture(scope="module")
def mixed():
    return planner("trainer.precision=bf16-mixed")


def planned(planner, *values, batch=None, micro=None, **options) -> Plan:
    layout = Layout(*values, **options)
    return planner(layout, batch or IMAGES * layout.data_parallel, micro)


def sent(plan, kind):
    return sum(t.inside for t in plan.traffic if t.kind == kind), sum(t.between for t in plan.traffic if t.kind == kind)


def test_the_first_rank_has_the_largest_shard():
    for size in (1, 3, 96, 97):
        for shards in (1, 2, 5, 128):
            chunks = torch.empty(size, 2).chunk(shards)
            assert shard((size, 2), shards) == tuple(chunks[0].shape)
            assert math.prod(shard((size, 2), shards, flat=True)) == -(-2 * size // shards)


def test_a_ring_by_hand():
    assert ring("all-gather", 800, 8, 8) == Traffic("all-gather", 700, 0, True)
    assert ring("reduce-scatter", 1600, 16, 8) == Traffic("reduce-scatter", 1500 * 7 / 8, 1500 / 8, True)
    assert ring("all-reduce", 400, 4, 1) == Traffic("all-reduce", 0, 600, True)
    assert ring("all-reduce", 400, 1, 1) == Traffic("all-reduce", 0, 0, True)


@pytest.mark.slow
def test_one_device_is_what_the_doctor_says(plain, mixed):
    for recipe in (plain, mixed):
        plan = planned(recipe)
        assert plan.traffic == [] and plan.host_bytes == 0 and plan.flops == 6 * recipe.multiply_adds * IMAGES
        assert plan.memory.parameters == 4 * ALL and plan.memory.gradients == 4 * TRAINED
    assert planned(mixed).memory == memory(mixed.parts, IMAGES)


def test_ddp_by_hand(plain):
    alone, plan = planned(plain), planned(plain, "ddp", 2, 4)
    assert plan.memory == alone.memory and plan.flops == alone.flops  # activations leave room for copies of gradients
    total = 2 * 7 / 8 * 4 * TRAINED
    assert sent(plan, "all-reduce") == (total * 3 / 4, total / 4)
    assert not plan.traffic[0].hidden and len(plan.traffic) == 1


def test_fsdp_by_hand(plain, mixed):
    [rest, block] = planned(plain, "fsdp", 1, 4).units
    assert (block.name, block.number, block.parameters, rest.parameters) == ("Block", DEPTH, BLOCK, REST)
    assert (block.held, block.padded, block.reduced) == (BLOCK // 4, BLOCK, BLOCK)  # all sizes are multiples of 4
    assert rest.held == (REST - POSITIONS - 11 * D) // 4 + 3 * D + POSITIONS  # 3 of 11 labels, and all positions
    plan = planned(mixed, "fsdp", 1, 4)
    held = DEPTH * block.held + rest.held
    assert plan.memory.parameters == 4 * held
    assert plan.memory.gradients == plan.memory.ema == 4 * (held - POSITIONS)
    assert plan.memory.optimizer == pytest.approx(8 * (held - POSITIONS), rel=0.01)
    assert plan.memory.gathered == 4 * 2 * rest.padded + 2 * 3 * BLOCK + 4 * BLOCK
    assert plan.memory.copies <= 2 * rest.padded < planned(mixed).memory.copies
    assert sent(plan, "all-gather") == (3 / 4 * 2 * (2 * DEPTH * BLOCK + 4 * rest.padded), 0)
    assert sent(plan, "reduce-scatter") == (3 / 4 * 4 * (DEPTH * BLOCK + rest.reduced), 0)
    twice = planned(mixed, "fsdp", 1, 4, batch=32, micro=4)
    assert (twice.images, twice.num_micro_batches, twice.memory) == (4, 2, plan.memory)
    assert sent(twice, "all-gather")[0] == 2 * sent(plan, "all-gather")[0]


def test_what_is_gathered_when_by_hand():
    recipe = planner("trainer.precision=bf16-mixed", "model.depth=5", *KEPT)
    options = recipe.parts.cfg.trainer
    kept = planned(recipe, "fsdp", 1, 4)
    options.reshard_after_forward = True
    plan = planned(recipe, "fsdp", 1, 4)
    most = plan.memory.gathered - 2 * 3 * BLOCK  # two blocks, and the gradients of one, in bfloat16
    for number, blocks in ((1, 3), (2, 4), (9, 5)):
        options.prefetch_units = number
        ahead = planned(recipe, "fsdp", 1, 4)
        assert ahead == plan._replace(memory=plan.memory._replace(gathered=most + 2 * blocks * BLOCK))
    assert kept.memory == ahead.memory and sent(kept, "reduce-scatter") == sent(plan, "reduce-scatter")
    assert sent(kept, "all-gather")[0] == sent(plan, "all-gather")[0] / 2


def test_hsdp_is_fsdp_in_each_node(mixed):
    node, plan = planned(mixed, "fsdp", 1, 4), planned(mixed, "fsdp", 8, 4, "node")
    assert plan.memory == node.memory and plan.units == node.units and plan.layout.name == "hsdp"
    for kind in ("all-gather", "reduce-scatter"):
        assert sent(plan, kind) == sent(node, kind)
    reduced = sum(unit.number * unit.reduced for unit in plan.units)
    assert sent(plan, "all-reduce") == (0, 2 * 7 / 8 * 4 * reduced / 4)


def test_tensor_parallel_by_hand(mixed):
    plan = planned(mixed, "fsdp", 1, 4, tensor_parallel=2)
    [rest, block] = plan.units
    assert (
        block.parameters == 6 * (D * D + D) + (12 * D * D + 7 * D) // 2 + 2 * D
    )  # adaLN and row-wise biases are whole
    assert rest.parameters == REST and plan.layout.shards == 2
    each = 2 * IMAGES * 64 * D * 2 * 1 / 2  # tokens in bfloat16, times 2 (n - 1) / n of 2 ranks
    assert sent(plan, "all-reduce") == (4 * DEPTH * each, 0)  # after attention and MLP, forward and backward
    assert planned(mixed, "fsdp", 1, 2).memory.activations > plan.memory.activations
    assert plan.images == IMAGES and plan.layout.name == "fsdp+tp2"


def test_zero_by_hand(plain, mixed):
    part, trained = -(-ALL // 4), -(-TRAINED // 4)
    stages = [planned(mixed, f"zero{stage}", 1, 4).memory for stage in (1, 2, 3)]
    # Every parameter of this network is small enough that stage 3 keeps it whole, too.
    assert [s.parameters for s in stages] == pytest.approx([4 * ALL, 4 * ALL, 4 * (part + ALL)], rel=0.01)
    assert [s.gradients for s in stages] == pytest.approx([4 * TRAINED, 4 * trained, 4 * trained], rel=0.01)
    assert [s.optimizer for s in stages] == pytest.approx([12 * trained] * 3, rel=0.02)
    assert [s.ema for s in stages] == pytest.approx([4 * TRAINED, 4 * TRAINED, 4 * trained], rel=0.01)
    assert [s.gathered for s in stages] == [4 * ALL, 4 * ALL, 4 * (ALL + ALL)]
    away = planned(mixed, "zero2", 1, 4, offload=True)
    assert away.memory == stages[1]._replace(optimizer=0)
    assert away.host_bytes == pytest.approx(20 * trained, rel=0.02)
    share = 3 / 4 * 4
    assert sent(planned(plain, "zero2", 1, 4, batch=32, micro=4), "reduce-scatter") == (2 * share * TRAINED, 0)
    assert sent(planned(plain, "zero3", 1, 4), "all-gather") == (2 * share * ALL, 0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_more_gpus_never_need_more_memory_each(mixed, strategy):
    plans = [planned(mixed, strategy, nodes, 4, batch=256) for nodes in (1, 2, 4, 16)]
    for few, many in itertools.pairwise(plans):
        for part in ("parameters", "gradients", "optimizer", "ema", "activations"):
            assert getattr(many.memory, part) <= getattr(few.memory, part)
        assert many.flops == few.flops / (many.layout.world / few.layout.world)
        assert sum(sum(sent(many, t.kind)) for t in many.traffic) >= sum(sum(sent(few, t.kind)) for t in few.traffic)


@pytest.mark.slow
def test_checkpointing_computes_more_and_keeps_less():
    none, full = (
        planned(planner(f"trainer.activation_checkpointing={mode}"), "fsdp", 1, 4) for mode in ("none", "full")
    )
    assert full.flops == none.flops * 4 / 3 and full.memory.activations < none.memory.activations / 2


def test_averages_are_those_of_the_configuration(mixed):
    one, two = planned(mixed, "fsdp", 1, 4), planned(planner("trainer.precision=bf16-mixed", "ema=power"), "fsdp", 1, 4)
    assert two.memory == one.memory._replace(ema=2 * one.memory.ema)
    away = planned(planner("trainer.precision=bf16-mixed", "ema.device=cpu"), "fsdp", 1, 4)
    assert away.memory == one.memory._replace(ema=0) and away.host_bytes == one.memory.ema
    assert away.update_bytes == one.update_bytes - 2 * one.memory.ema


def test_the_time_by_hand():
    h100 = hardware("H100", bf16=1000e12, inside=100e9, between=10e9, memory_rate=1e12)
    traffic = [Traffic("all-gather", 1e9, 0.2e9, True), Traffic("all-reduce", 0.5e9, 0, False)]
    plan = Plan(Layout(), 1, 1, 1, None, 0, [], traffic, 10e12, 10**9)
    seconds = plan.seconds(h100, "bf16-mixed", 0.5, 0.4)
    assert seconds["compute"] == pytest.approx(0.020) and seconds["update"] == pytest.approx(0.001)
    assert seconds["communication"] == pytest.approx(0.020 + 0.005)
    assert seconds["exposed"] == pytest.approx(0.020 - 0.4 * 0.020 + 0.005)
    assert seconds["step"] == pytest.approx(0.020 + 0.001 + 0.017)
    assert plan.seconds(h100, "32-true", 0.5, 0.4)["compute"] == pytest.approx(10 / 67 / 0.5)
    assert {name for name, gpu in HARDWARE.items() if gpu.name == name} == {"a100", "h100", "h200"}


@pytest.fixture
def ranks(monkeypatch):
    """Begins a process group of so many ranks, some a node, of which this is the first; what they send is made up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def begin(world, gpus):
        for name, value in {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": gpus}.items():
            monkeypatch.setenv(name, str(value))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)

    yield begin
    dist.destroy_process_group()


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.mark.parametrize(
    ("nodes", "gpus", "options"),
    [(1, 2, {}), (1, 5, {}), (16, 8, {}), (2, 2, {"shard": "node"}), (2, 2, {"tensor_parallel": 2})],
)
def test_torch_shards_as_planned(nodes, gpus, options, ranks, tools, plain):
    from bench_memory import bytes_of_a_step

    world = nodes * gpus
    ranks(world, gpus)
    more = [f"trainer.{key.replace('parallel', 'parallel_size')}={value}" for key, value in options.items()]
    found = bytes_of_a_step([*SMALL, "trainer.precision=32-true", *more], IMAGES)
    expected = planned(plain, "fsdp", nodes, gpus, **options).memory._asdict()
    if "tensor_parallel" in options:  # DTensors between layers have wrappers, which are counted, too
        assert expected["activations"] <= found.pop("activations") < 1.3 * expected["activations"]
    assert found == {part: pytest.approx(expected[part], rel=1e-3) for part in found}


class Now(TorchDispatchMode):
    """The most bytes of storages at a time, at their sizes of that time, which FSDP2 changes."""

    def __init__(self, tensors):
        super().__init__()
        self.known, self.most = {}, 0
        self.add(tensors)

    def add(self, tensors):
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves((args, kwargs, result)))
        alive = {at: storage for at, found in self.known.items() if (storage := found()) is not None}
        self.most = max(self.most, sum(storage.nbytes() for storage in alive.values()))
        return result


@pytest.mark.parametrize(
    ("precision", "world", "options"),
    [
        ("32-true", 2, []),
        pytest.param("32-true", 2, ["trainer=fsdp", "trainer.prefetch_units=3"], marks=pytest.mark.slow),
        pytest.param("32-true", 2, KEPT, marks=pytest.mark.slow),
        pytest.param("bf16-mixed", 8, [], marks=pytest.mark.slow),
        pytest.param("bf16-mixed", 8, KEPT, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_fsdp_is_as_planned(precision, world, options, ranks):
    wide = ["data.image_size=8", "model.patch_size=4", "model.hidden_size=256", "model.depth=6"]
    recipe = planner(*wide, f"trainer.precision={precision}", *options)  # what is gathered is much of it
    ranks(world, world)
    network = recipe.parts.denoiser("meta").network
    Sharded(recipe.parts.cfg.trainer, World(), torch.device("cpu")).shard(network)
    network.to_empty(device="cpu")
    for p in network.parameters():
        nn.init.normal_(p.detach().to_local(), std=0.02)

    def step():
        (x, t), cond = inputs_of(recipe.parts, 1, "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed):
            loss = network(x.normal_(), t.uniform_(), label=cond["label"].zero_()).float().square().mean()
        loss.backward()

    step()  # now there are gradients
    with Now([t.to_local() for p in network.parameters() for t in (p, p.grad) if t is not None]) as now:
        step()
    plan = planned(recipe, "fsdp", 1, world, batch=world).memory
    assert 1 <= (plan.total - plan.optimizer - plan.ema) / now.most < 1.1  # parts are at their most at different times


@pytest.mark.slow
def test_two_processes_have_what_is_planned(tools, plain):
    from bench_memory import bytes_of_a_step
    from bench_ranks import ranks

    overrides = [*SMALL, "trainer.precision=32-true"]
    expected = planned(plain, "fsdp", 1, 2).memory._asdict()
    found = ranks(2, bytes_of_a_step, overrides, IMAGES)
    for part in found[0]:
        assert max(rank[part] for rank in found) == pytest.approx(expected[part], rel=0.001)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("fsdp", 1, 0), "trainer.devices=0"),
        (Layout("fsdp", 0, 1), "trainer.nodes=0"),
        (Layout("tsdp"), "choose one of single, ddp"),
        (Layout("fsdp", shard="rack"), "choose one of world, node"),
        (Layout("single", 1, 2), "choose trainer=ddp or trainer=fsdp"),
        (Layout("ddp", 1, 2, tensor_parallel=2), "needs trainer=fsdp_tp"),
        (Layout("fsdp", 1, 8, tensor_parallel=3), "must divide trainer.devices=8"),
        (Layout("fsdp", 1, 8, offload=True), "needs zero1, zero2 or zero3"),
    ],
)
def test_layouts_that_cannot_be(layout, message):
    with pytest.raises(ValueError, match=message):
        check(layout)


def test_batches_that_cannot_be_divided(mixed):
    with pytest.raises(ValueError, match=r"trainer\.batch_size=20 must be a multiple of the 8 ranks"):
        divided(Layout("ddp", 2, 4), 20, None)
    with pytest.raises(ValueError, match=r"micro_batch_size=3 must divide the 4 images .* choose one of \[4, 2, 1\]"):
        divided(Layout("ddp", 2, 4), 32, 3)
    with pytest.raises(ValueError, match=r"micro_batch_size=2 must .*whole lanes \(trainer.lanes=8\): .* \[4\]"):
        divided(Layout("ddp", 2, 4), 32, 2, lanes=8)
    with pytest.raises(ValueError, match=r"trainer.lanes=4 must .* of its 8 ranks: choose one of \[8, 16, 32\]"):
        divided(Layout("ddp", 2, 4), 32, None, lanes=4)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=8 does not divide model.num_heads=4"):
        planned(mixed, "fsdp", 1, 8, tensor_parallel=8)
    with pytest.raises(ValueError, match="UNet has no blocks that can be divided"):
        unet = Planner(Parts(compose("doctor", ["experiment=digits_unet"])))
        planned(unet, "fsdp", 1, 2, tensor_parallel=2)


def test_what_is_assumed_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    layout, words = assumed_layout(compose("doctor", ["trainer=fsdp"]).trainer)
    assert (layout.nodes, layout.gpus) == (1, 8) and "trainer.devices=auto: 8 assumed" in words
    assert assumed_layout(compose("doctor", ["trainer=ddp", "trainer.nodes=2", "trainer.devices=4"]).trainer)[1] == ""
    assert assumed_layout(compose("doctor", []).trainer) == (Layout(), "")


def test_a_dry_run_of_the_canonical_recipe(tmp_path):
    overrides = ["experiment=imagenet256_dit_xl_2", "data.path=/nowhere", "trainer=fsdp", "trainer.dry_run=true"]
    code, output, _ = dit("train", *overrides, cwd=tmp_path)
    assert code == 0, output
    assert list(tmp_path.iterdir()) == []
    assert "28 x Block" in output and "23,905,152 parameters,   2,988,144 on a rank" in output
    assert "675,129,632" in output and "182.2 TFLOP a step" in output and "8 assumed" in output
    assert "all-gather" in output and "predicted, not measured" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=digits"],
        ["experiment=digits_unet", "trainer=zero3", "trainer.devices=2"],
        ["experiment=digits_modern", "trainer=fsdp_tp", "trainer.devices=4"],
        ["experiment=digits_vae", "trainer=ddp", "trainer.devices=2"],
    ],
    ids=" ".join,
)
def test_dry_runs_of_whatever(overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", [*overrides, "trainer.dry_run=true"])
    train.check(cfg)
    assert train.main(cfg) == 0
    assert "dry run of run=digits" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer=fsdp", "trainer.devices=0"], "trainer.devices=0 must be a whole number"),
        (["trainer=fsdp", "trainer.nodes=1.5"], "trainer.nodes=1.5 must be a whole number"),
        (["trainer=fsdp", "trainer.nodes=3"], "trainer.batch_size=128 must be a multiple of the 24 ranks"),
        (["trainer=ddp", "trainer.devices=16"], "trainer.lanes=8 must divide"),
        (["trainer=ddp", "trainer.strategy=dpp"], "choose one of single, ddp"),
        (["trainer.devices=2"], "trainer.strategy=single"),
        (["objective.bound_weight=1"], "model.learn_sigma=true"),
        (["optimizer.betas=[2,3]"], "optimizer.betas=[2,3] must be two numbers, from 0 to less than 1"),
    ],
)
def test_dry_runs_that_end_with_exit_code_2(overrides, message):
    with pytest.raises(ConfigError) as raised:
        cfg = compose("train", ["experiment=digits", *overrides, "trainer.dry_run=true"])
        train.check(cfg)
        train.main(cfg)
    assert raised.value.exit_code == 2 and message in str(raised.value)


@pytest.mark.slow
def test_the_table_of_layouts(tools, monkeypatch):
    import scaling

    words = ["--nodes", "1,2", "--gpus", "4", "--strategies", "ddp,fsdp,hsdp,fsdp_tp,zero1", "trainer.batch_size=64"]
    monkeypatch.setattr(
        sys, "argv", ["scaling.py", *SMALL, *words, "trainer.micro_batch_size=4", "--memory-gb", "0.014"]
    )
    rows = scaling.predicted(scaling.options_of())
    assert len(json.loads(json.dumps(rows))) == 10 and all(0 < row["scaling"] <= 1 for row in rows)
    lines = scaling.table(rows).splitlines()
    assert lines[3].startswith("| 1 x 4 | fsdp | 4 x 4 |") and "| yes |" in lines[3] and "| NO |" in lines[2]


def test_efficiency_is_what_a_bench_measured(tools, tmp_path):
    import scaling

    path, seconds = tmp_path / "bench.txt", {"forward": [0.1, 0.2, 0.1], "backward": [0.3, 0.2, 0.3], "EMA": [9.0] * 3}
    line = {
        "asked": {"overrides": []},
        "flops": 2e14,
        "datasheet": 1e15,
        "seconds": {"ours, eager": {}, "ours, compiled": seconds, "peer": {}},
    }
    path.write_text(f"a table\n{json.dumps(line)}\n")
    assert scaling.measured(path) == pytest.approx(0.5)
    path.write_text(json.dumps(line | {"asked": {"overrides": ["trainer.activation_checkpointing=full"]}}))
    with pytest.raises(ValueError, match="without it"):
        scaling.measured(path)
    path.write_text(json.dumps(line | {"asked": {"overrides": [], "precision": "float32"}}))
    with pytest.raises(ValueError, match="--precision bfloat16"):
        scaling.measured(path)
    path.write_text(json.dumps(line | {"datasheet": None}))
    with pytest.raises(ValueError, match="is not that of tools/bench"):
        scaling.measured(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "b9000"], "gpu=b9000: choose one of a100, h100, h200"),
        (["--gpus", "0"], "trainer.devices=0"),
        (["--nodes", "3"], "multiple of the 24 ranks"),
        (["--nodes", "one"], "no list of whole numbers"),
        (["--strategies", "foo"], "trainer.strategy=foo"),
        (["--between-gb", "0"], "between=0.0 must be greater than 0"),
        (["--efficiency", "40"], "--efficiency=40.0 must lie in"),
        (["--measured", "nowhere"], "--measured=nowhere: No such file"),
        (["--measured", "nowhere", "--efficiency", "0.4"], "give one of them"),
        (["model.hidden_size=97"], "hidden_size=97"),
    ],
)
def test_bad_options_of_the_tool_end_with_exit_code_2(words, message, tools, monkeypatch, capsys):
    import scaling

    monkeypatch.setattr(sys, "argv", ["scaling.py", *SMALL, *words])
    with pytest.raises(SystemExit) as raised:
        scaling.main()
    assert raised.value.code == 2 and message in capsys.readouterr().err
