import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from tiny_encoders import clip
from torch.fx.experimental.proxy_tensor import make_fx

from dit.command.compose import compose
from dit.model.dit import DiT
from dit.noise.draw import Draw
from dit.objective.objective import Batch
from dit.train.build import Parts, build
from dit.train.execution import arrange
from dit.train.graphed import Graphed
from dit.train.run import Run
from dit.train.saved import config_dir

torch._inductor.config.cpp_cache_precompile_headers = True  # compiling takes minutes here

BASES = ("dit", "unet", "jit", "lightning_dit")
DENOISERS = {path.stem for path in (config_dir() / "model").glob("*.yaml") if not path.stem.startswith("autoencoder")}
MODELS = sorted(DENOISERS - set(BASES))
SMALL = ["dit_digits", "dit_digits_modern", "dit_digits_text", "unet_digits"]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_builds_on_meta(model):
    size = {
        "jit_b_32": 512,
        "jit_l_32": 512,
        "jit_h_32": 512,
        "adm_64": 64,
        "adm_128": 128,
        "adm_512": 512,
        "unet_cifar": 32,
    }
    overrides = ["run=x", f"model={model}"]
    if "digits" in model:
        overrides += ["data=digits"]
    else:
        overrides += ["data=shards", "data.path=x", f"data.image_size={size.get(model, 256)}"]
        pixels = model.startswith(("jit", "adm", "unet"))
        overrides += [] if pixels else ["latent=sd_vae"]
    if model.endswith("text") or model.startswith("pixart"):
        overrides += ["condition=text_t5", "data.fields=[label,caption]"]
    parts = Parts(compose("train", overrides))
    network = parts.denoiser("meta").network
    assert all(p.is_meta for p in network.parameters())
    assert any(isinstance(module, network.units) for module in network.modules())


def small(name, tmp_path):
    """The denoiser, objective and one batch of a small model."""
    overrides = ["experiment=digits", f"model={name}"]
    if name == "dit_digits_text":
        clip(tmp_path / "clip")
        overrides += ["condition=text", f"condition.name={tmp_path}/clip"]
        overrides += ["condition.width=64", "condition.max_length=12", "data.fields=[label,caption]"]
    cfg = compose("train", overrides)
    parts = Parts(cfg)
    torch.manual_seed(0)
    denoiser = parts.denoiser()
    with torch.no_grad():
        for p in denoiser.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))  # so that nothing is zero
    asked = {"label": torch.arange(16) % 10, "caption": ["a seven", "a one"] * 8}
    draw = Draw(0, 0, range(8), 16)
    cond = parts.condition(asked, draw, lambda images, generator: images)
    batch = Batch(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)), cond, draw)
    return denoiser, build(cfg.objective), batch


def losses(name, tmp_path, *, bf16=False, **options):
    """Those of three steps, and how many graphs had been compiled after each."""
    denoiser, objective, batch = small(name, tmp_path)
    arrange(denoiser.network, **options)
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=1e-3)
    figures, graphs = [], []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            [(_, loss)] = objective.phases(denoiser, batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        figures.append(loss.item())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] if options.get("compile") else 0)
    return figures, graphs


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_checkpointing_and_channels_last_change_nothing(name, bf16, tmp_path):
    plain, _ = losses(name, tmp_path, bf16=bf16)
    assert plain[2] < plain[0]
    for options in ({"checkpointing": "full"}, {"checkpointing": "selective"}):
        assert losses(name, tmp_path, bf16=bf16, **options)[0] == plain
    assert losses(name, tmp_path, bf16=bf16, channels_last=True)[0] == pytest.approx(plain, rel=2e-3 if bf16 else 1e-5)
    assert losses(name, tmp_path)[0] == pytest.approx(plain, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_compiled_it_is_the_same_and_compiled_once(name, bf16, tmp_path):
    plain, _ = losses(name, tmp_path, bf16=bf16)
    compiled, graphs = losses(name, tmp_path, bf16=bf16, compile=True)
    assert compiled == pytest.approx(plain, rel=1e-2 if bf16 else 1e-4)
    assert graphs[0] > 0 and len(set(graphs)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_is_checkpointed_can_be_compiled(mode, tmp_path):
    plain, _ = losses("dit_digits", tmp_path)
    compiled, graphs = losses("dit_digits", tmp_path, compile=True, checkpointing=mode)
    assert compiled == pytest.approx(plain, rel=1e-4) and len(set(graphs)) == 1


def kept(**options):
    """How many numbers a network keeps for the backward pass."""
    network = DiT(input_size=8, in_channels=1, patch_size=2, hidden_size=64, depth=4, num_heads=4)
    arrange(network, **options)
    sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(x):
        if (where := x.untyped_storage().data_ptr()) not in weights:
            sizes[where] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = network(torch.randn(8, 1, 8, 8, requires_grad=True), torch.ones(8))
    del out
    return sum(sizes.values())


def test_checkpointing_saves_memory():
    everything, nothing = kept(), kept(checkpointing="full")
    assert nothing < everything / 4


def test_a_run_is_executed_as_configured(config):
    def of(name, *more):
        run = Run(config(f"run={name}", "trainer.max_steps=3", *more))
        assert run.fit() is None
        lines = (Path(run.folder) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert of("a") == of("b", "trainer.activation_checkpointing=full", "trainer.channels_last=true")


@pytest.mark.slow
def test_a_run_compiles_and_samples_without_compiling_again(config):
    def of(name, *more):
        run = Run(config(f"run={name}", "trainer.max_steps=4", "trainer.preview_every_steps=2", *more))
        assert run.fit() is None
        lines = (Path(run.folder) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    plain = of("a")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert of("b", "trainer.compile=true") == pytest.approx(plain, rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_what_cannot_be_arranged_is_refused():
    with pytest.raises(ValueError, match=r"activation_checkpointing=some: choose one of none, full, selective"):
        arrange(torch.nn.Linear(2, 2), checkpointing="some")
    with pytest.raises(ValueError, match="Linear names no units"):
        arrange(torch.nn.Linear(2, 2), compile=True)
    if not torch.cuda.is_available():
        import torch._inductor.config as inductor

        network = DiT(input_size=8, in_channels=1, patch_size=2, hidden_size=64, depth=1, num_heads=4)
        nowhere = inductor.patch({"cpp.cxx": (None, "/nowhere/g++")})
        with nowhere, pytest.raises(ValueError, match="compile=true needs a C\\+\\+ compiler: install"):
            arrange(network, compile=True)


def test_a_packed_weight_is_that_of_now():
    from dit.train import products  # takes seconds

    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    x, before = torch.randn(64, 96), len(products._in_order)

    def check(weight, rows=64):
        torch.testing.assert_close(torch.ops.dit.packed(x[:rows], weight, None), x[:rows] @ weight.T)

    weight = torch.nn.Parameter(torch.randn(128, 96), requires_grad=False)
    for rows in (64, 8, 64):
        check(weight, rows)
    for _ in range(20):  # the second has the memory of the one before
        weight.data = weight.data * 1.1
        weight.data = weight.data * 1.1
        check(weight)
    with torch.inference_mode():
        told = torch.randn(128, 96)
        for _ in range(2):
            check(told)
            told.mul_(2)
    assert len(products._in_order) == before + 1
    del weight
    assert len(products._in_order) == before


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="of glibc, where there is no GPU")
def test_memory_that_tensors_leave_is_kept():
    arrange(torch.nn.Linear(2, 3))

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**22) for _ in range(6)]  # of 16 MiB
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert [faults() for _ in range(4)][-1] < 2**10  # pages, of 6 x 2^12


def test_products_of_compiled_code_are_chosen_by_their_sizes():
    from dit.train import products  # takes seconds

    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")

    def gradients(x, weight, bias):
        y = torch.nn.functional.linear(x, weight, bias)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))

    def traced(rows, told, out, frozen=False):
        inputs = [torch.randn(*shape, requires_grad=True) for shape in ((rows, told), (out, told), (out,))]
        graph = make_fx(gradients, tracing_mode="fake")(*inputs)
        products.Products(frozen)(graph.graph)
        graph.graph.lint()
        graph.recompile()
        for _ in range(2):
            for ours, expected in zip(graph(*inputs), gradients(*inputs), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
            with torch.no_grad():
                inputs[1].mul_(2)  # a weight that was packed is packed anew
        return [node.target for node in graph.graph.nodes if node.op == "call_function"]

    found = traced(128, 64, 96)  # the output and the gradient of x; that of the weight is as before, of the bias new
    assert found.count(torch.ops.dit.linear.default) == 2 and found.count(torch.ops.aten.mm.default) == 2
    assert torch.ops.aten.sum.dim_IntList not in found
    assert traced(128, 192, 64).count(torch.ops.dit.linear.default) == 3  # the gradient of the weight, too
    few = traced(8, 64, 96)  # rows: the gradient of the weight is a sum of outer products
    assert few.count(torch.ops.dit.linear.default) == 2 and torch.ops.aten.mm.default not in few
    assert traced(16, 64, 96).count(torch.ops.aten.mm.default) == 2
    kept = traced(128, 96, 96, frozen=True)  # the weight of the output, and not its transpose for the gradient of x
    assert kept.count(torch.ops.dit.packed.default) == 1 and kept.count(torch.ops.dit.linear.default) == 1


def test_without_a_gpu_no_forward_is_captured():
    layer = torch.nn.Linear(2, 3)
    x = torch.randn(4, 2)
    with torch.no_grad():
        assert torch.equal(Graphed(layer)(x), layer(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_replay_what_the_network_computes_with_the_weights_of_now():
    layer = torch.nn.Linear(2, 3).cuda()
    graphed = Graphed(layer)
    with torch.no_grad():
        for rows in (4, 4, 5):
            x = torch.randn(rows, 2, device="cuda")
            torch.testing.assert_close(graphed(x), layer(x))
            layer.weight.mul_(2)
        assert len(graphed._captured) == 2
        layer.cpu().cuda()
        layer.weight.mul_(2)
        torch.testing.assert_close(graphed(x), layer(x))
