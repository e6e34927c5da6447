import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dit.model.dit import DiT
from dit.model.unet import UNet
from dit.weights.ema import EMA, exponent, exponential, power
from dit.weights.lora import adapted, merged
from dit.weights.post_hoc import Average, fit, reconstruct


def averaged(layer, device=None, **profiles):
    return EMA(dict(layer.named_parameters()), profiles, device)


def disturb(network):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_average_is_the_recurrence(device):
    layer = nn.Linear(3, 2)
    ema = averaged(layer, device, ema=exponential(0.9))
    expected = layer.weight.detach().double().numpy()
    for step in range(1, 6):
        disturb(layer)
        ema.update(step)
        expected = 0.9 * expected + 0.1 * layer.weight.detach().double().numpy()
    np.testing.assert_allclose(ema.averages["ema"]["weight"], expected, rtol=1e-6, atol=1e-7)


def test_warm_up_shortens_the_memory():
    assert exponential(0.9999, warmup=True)(1) == 2 / 11
    assert exponential(0.9999, warmup=True)(10**6) == exponential(0.9999)(1) == 0.9999


@pytest.mark.parametrize("std", [0.02, 0.05, 0.10, 0.25])
def test_a_power_profile_weighs_steps_by_a_power(std):
    gamma = exponent(std)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(std**2)
    steps, weights = np.arange(1, 2001), np.random.default_rng(0).normal(size=(2000, 4))
    # Exactly: i^(gamma + 1) - (i - 1)^(gamma + 1), which is (gamma + 1) i^gamma, integrated.
    count = (steps / 2000) ** (gamma + 1) - ((steps - 1) / 2000) ** (gamma + 1)
    expected = count @ weights
    mean = count @ (steps - 0.5)
    assert (count @ (steps - 0.5 - mean) ** 2) ** 0.5 / 2000 == pytest.approx(std, rel=1e-3)

    parameter = torch.full((4,), 1e6)  # which is forgotten at once
    ema = EMA({"w": parameter}, {"ema": power(std)})
    for step in steps.tolist():
        parameter.copy_(torch.from_numpy(weights[step - 1]))
        ema.update(step)
    np.testing.assert_allclose(ema.averages["ema"]["w"], expected, atol=1e-5)


def test_several_profiles_are_kept_and_lent():
    layer = nn.Linear(3, 2)
    ema = averaged(layer, ema=exponential(0.5), short=exponential(0))
    begin = layer.weight.detach().clone()
    disturb(layer)
    ema.update(1)
    disturb(layer)
    raw = layer.weight.detach().clone()
    for profile, name in {None: "ema", "ema": "ema", "short": "short"}.items():
        with ema.applied(profile):
            assert torch.equal(layer.weight, ema.averages[name]["weight"])
            assert layer.weight.requires_grad
        assert torch.equal(layer.weight, raw)
    assert not torch.equal(ema.averages["ema"]["weight"], begin)
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert torch.equal(layer.weight, raw)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_averages_are_kept_in_float32_of_any_layout(memory_format):
    layer = nn.Conv2d(3, 4, 3).bfloat16().to(memory_format=memory_format)
    ema = averaged(layer, ema=exponential(0.999))
    begin = layer.weight.detach().float()
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(1)
    average = ema.averages["ema"]["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, begin + 0.001 * (layer.weight.detach().float() - begin))
    with ema.applied():
        assert torch.equal(layer.weight, average.bfloat16())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exponential(1.0), r"ema\.decay=1\.0 must lie in \[0, 1\), like 0\.9999"),
        (lambda: power(0), r"std=0 .* must lie in \(0, 0\.288\], like 0\.10"),
        (lambda: power(0.29), r"std=0\.29"),
        (lambda: EMA({}, {}), "ema.profiles is empty"),
        (lambda: EMA({}, {"model": power(0.1)}), "ema.profiles.model"),
        (lambda: EMA({}, {"a/b": power(0.1)}), "ema.profiles.a/b"),
        (lambda: EMA({}, {"ema": power(0.1)}, "gpu"), "ema.device=gpu: choose null, where the parameters are, or cpu"),
        (lambda: fit([], Average(10, 0.1)), "no snapshots"),
        (lambda: fit([Average(9, 0.1)], Average(10, 0.1)), "as far as step 10"),
        (lambda: fit([Average(9, 0.1)], Average(9, 0.5)), "std=0.5"),
        (lambda: reconstruct([(1, {"a": torch.ones(1)}), (1, {"a": torch.ones(2)})]), "names or shapes"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TARGETS = ["qkv", "attn.proj", "proj_out", "q_linear", "kv_linear", "cross_attn.proj", "fc1", "fc2", "w12", "w3"]
NETWORKS = {  # and the linear layers of attention and MLP in each block, or in all
    "plain": (DiT, {}, 2 * 4),
    "switches": (DiT, {"swiglu": True, "text_width": 12, "cross_attention": True, "lands": True}, 2 * 7),
    "unet": (UNet, {}, 4 * 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapter_is_no_change_at_first_is_all_that_is_trained_and_can_be_merged(name):
    pytest.importorskip("peft")
    cls, more, number = NETWORKS[name]
    sizes = {
        DiT: {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4},
        UNet: {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [4]},
    }[cls]
    sizes |= {"input_size": 8, "in_channels": 3, "num_classes": 7} | ({"head_channels": 8} if cls is UNet else {})
    torch.manual_seed(0)
    network = cls(**sizes, **more).eval()
    disturb(network)
    told = {"label": torch.tensor([0, 7]), "text": torch.randn(2, 3, 12), "text_mask": torch.ones(2, 3) > 0}
    told = told if more else {"label": told["label"]}
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])
    before, plain = network(x, time, **told), {n: value.clone() for n, value in network.state_dict().items()}
    assert all(torch.equal(value, plain[n]) for n, value in merged(plain).items())

    adapted(network, 3, TARGETS)
    assert torch.equal(network(x, time, **told), before)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    adapters = {n: p for n, p in trained.items() if ".lora_" in n}
    assert len(adapters) == 2 * number and all(3 in p.shape for p in adapters.values())
    assert all(n.startswith("gap_embedder.") for n in trained.keys() - adapters.keys())
    assert ("gap_embedder.mlp.2.weight" in trained) == ("lands" in more)
    again = merged(network.state_dict())
    assert again.keys() == plain.keys() and all(torch.equal(again[n], plain[n]) for n in plain)

    disturb(torch.nn.ParameterList(adapters.values()))
    after = network(x, time, **told)
    assert (after - before).norm() > 0.01 * before.norm()
    other = cls(**sizes, **more).eval()
    other.load_state_dict(merged(network.state_dict()))
    torch.testing.assert_close(other(x, time, **told), after, rtol=1e-3, atol=1e-3 * after.abs().max().item())


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, TARGETS, r"adapter\.rank=0 must be at least 1"),
        (2, ["qvk"], r"adapter\.targets=\[qvk\]: DiT has no such layer; choose .*attn\.qkv"),
        (2, TARGETS, r"needs peft: pip install 'ditforge\[lora\]'"),
    ],
)
def test_adapters_that_cannot_be(rank, targets, message, monkeypatch):
    monkeypatch.setattr("dit.weights.lora.find_spec", lambda name: None)
    with torch.device("meta"):
        network = DiT(input_size=8, in_channels=3, patch_size=2, hidden_size=32, depth=1, num_heads=4)
    with pytest.raises((ValueError, ImportError), match=message):
        adapted(network, rank, targets)


@pytest.fixture(scope="module")
def trajectory():
    """Averages of a noisy training of 1,000 steps, of several lengths; those of 0.05 and 0.10 every 25 steps."""
    generator = torch.Generator().manual_seed(0)
    goal, weights = (torch.randn(256, generator=generator) for _ in range(2))
    parameter = weights.clone()
    profiles = {f"std{round(1000 * std)}": power(std) for std in (0.05, 0.08, 0.10, 0.15, 0.20)}
    ema = EMA({"w": parameter}, profiles)
    kept = {}
    for step in range(1, 1001):
        parameter.add_(goal - parameter, alpha=3 / (step + 30)).add_(torch.randn(256, generator=generator), alpha=0.05)
        ema.update(step)
        if step % 25 == 0:
            for std in (0.05, 0.10):
                average = ema.averages[f"std{round(1000 * std)}"]["w"].clone()
                kept[Average(step, std)] = {"w": average}
    return ema, kept


@pytest.mark.parametrize(
    ("std", "every", "error"),
    # With 10 snapshots of two averages any between them, and with 40 those that are twice as long.
    [(0.08, 100, 2e-3), (0.08, 50, 2e-4), (0.15, 50, 1e-3), (0.20, 25, 1e-3), (0.05, 500, 1e-6)],
)
def test_an_average_of_another_length_is_made_of_snapshots(trajectory, std, every, error):
    ema, kept = trajectory
    snapshots = [average for average in kept if average.step % every == 0]
    coefficients, misfit = fit(snapshots, Average(1000, std))
    made = reconstruct(zip(coefficients, (kept[average] for average in snapshots), strict=True))["w"]
    assert misfit < 10 * error
    tracked = ema.averages[f"std{round(1000 * std)}"]["w"]
    assert ((made - tracked).norm() / tracked.norm()).item() < error


def test_sharded_averages_are_those_of_the_whole(tmp_path):
    torch.multiprocessing.spawn(_sharded, (f"file://{tmp_path}/store",), nprocs=2)


def _sharded(rank, store):
    """On one of two processes: train and average a network in several divisions, beside the whole one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    one = init_device_mesh("cpu", (2,))
    names = ("replicas", "shards")
    shards, copies = (init_device_mesh("cpu", shape, mesh_dim_names=names) for shape in ((1, 2), (2, 1)))  # of HSDP
    for mesh in (one, shards, copies):
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
        divided = copy.deepcopy(whole)
        for unit in (divided[0], divided):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        averages, outputs = {}, {}
        for network in (whole, divided):
            outputs[network], averages[network] = _train(network)
        for profile, expected in averages[whole].items():
            for name, average in averages[divided][profile].items():
                _check_like(average, dict(divided.named_parameters())[name])
                torch.testing.assert_close(average.full_tensor(), expected[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(outputs[divided], outputs[whole], rtol=1e-5, atol=1e-6)
    _divided_each_its_own_way(one, shards)
    dist.destroy_process_group()


def _train(network):
    """What the network puts out with its averages, and afterwards; the averages, kept in both ways."""
    generator = torch.Generator().manual_seed(1)
    network(torch.zeros(1, 5))
    averages = [averaged(network, device, ema=exponential(0.9), long=power(0.1)) for device in (None, "cpu")]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(1, 7):
        network(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in averages:
            ema.update(step)
    x, outputs = torch.randn(4, 5, generator=generator), []
    for ema in averages:
        for profile in (None, "long"):
            with torch.no_grad(), ema.applied(profile):
                outputs.append(network(x))
    kept = {f"{profile}{i}": a for i, ema in enumerate(averages) for profile, a in ema.averages.items()}
    return torch.stack([*outputs, network(x)]).detach(), kept


def _divided_each_its_own_way(one, two):
    """Parameters of one network on several meshes, as tensor parallelism leaves them, one of them whole."""
    generator = torch.Generator().manual_seed(2)
    ways = {"a": (one, [Shard(0)]), "b": (two, [Replicate(), Shard(1)]), "c": (two["shards"], [Replicate()]), "d": None}
    values = {name: [torch.randn(3, 5, generator=generator) for _ in range(4)] for name in ways}

    def divided(name, value):
        return distribute_tensor(value, *ways[name]) if ways[name] else value.clone()

    ema = EMA({name: divided(name, value[0]) for name, value in values.items()}, {"ema": exponential(0.5)})
    whole = EMA({name: value[0].clone() for name, value in values.items()}, {"ema": exponential(0.5)})
    for step in (1, 2, 3):
        for name, value in values.items():
            ema.parameters[name].copy_(divided(name, value[step]))
            whole.parameters[name].copy_(value[step])
        ema.update(step)
        whole.update(step)
    for name, average in ema.averages["ema"].items():
        _check_like(average, ema.parameters[name])
        full = average.full_tensor() if ways[name] else average
        torch.testing.assert_close(full, whole.averages["ema"][name], rtol=1e-6, atol=1e-7)


def _check_like(average, parameter):
    assert isinstance(average, DTensor) == isinstance(parameter, DTensor)
    if isinstance(average, DTensor):
        assert (average.device_mesh, average.placements) == (parameter.device_mesh, parameter.placements)
        assert average.shape == parameter.shape and average.dtype == torch.float32
