import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file

from dit.model.dit import DiT
from dit.model.layers import sincos_positions
from dit.model.unet import UNet
from dit.weights import convert

TINY = {"input_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4}
LABELS = {**TINY, "num_classes": 7, "learn_sigma": True}
UNET = {"input_size": 8, "in_channels": 3, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
UNET |= {"attention_resolutions": [4], "head_channels": 16, "num_classes": 7}


def network(state, **sizes):
    ours = DiT(**sizes).eval()
    ours.load_state_dict(convert.fitted(state, ours))
    return ours


def random_like(state):
    """Random values of such names and shapes, but for the table of positions."""
    generator = torch.Generator().manual_seed(0)
    values = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    return values | {name: state[name].clone() for name in ("pos_embed",) if name in state}


@pytest.fixture
def dit_state():
    """A published DiT's names and shapes, written out."""
    width, shapes = 32, {"x_embedder.proj": (32, 3, 2, 2), "final_layer.linear": (24, 32)}
    shapes |= {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    for i in range(2):
        block = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
        block |= {"mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    state = {f"{name}.weight": torch.empty(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.empty(shape[0]) for name, shape in shapes.items()}
    state |= {"y_embedder.embedding_table.weight": torch.empty(8, width), "pos_embed": sincos_positions(width, 4)}
    return random_like(state)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 3, 6, 7])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Reading


def test_the_averaged_weights_of_a_published_checkpoint_are_read_and_load_strictly(tmp_path, dit_state):
    model = {name: torch.zeros_like(value) for name, value in dit_state.items()}
    args = argparse.Namespace(model="DiT-XL/2")
    torch.save({"model": model, "ema": dit_state, "args": args, "opt": {"state": {}}}, tmp_path / "DiT.pt")
    state = convert.published(tmp_path / "DiT.pt")
    assert equal(state, dit_state)
    DiT(**LABELS).load_state_dict(state, strict=True)


@pytest.mark.parametrize("within", ["ema", "model_ema1", "model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net."])
def test_wrappers_are_taken_off(tmp_path, within, prefix):
    state = {f"{prefix}blocks.0.weight": torch.ones(2), f"{prefix}blocks.1._orig_mod.module.weight": torch.ones(3)}
    torch.save({within: state} if within else state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=bool(within))
    assert list(convert.read(str(tmp_path / "a.ckpt"))) == ["blocks.0.weight", "blocks.1.module.weight"]


@pytest.mark.parametrize("inside", ["", "transformer", "unet"])
@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_folders_of_diffusers_are_read(tmp_path, inside, kind):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    state = {"a.weight": torch.arange(3.0), "b.weight": torch.arange(4.0)}
    if kind == "single":
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    elif kind == "bin":
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    else:
        shards = {name: f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i, name in enumerate(state)}
        for name, shard in shards.items():
            save_file({name: state[name]}, folder / shard)
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert equal(convert.read(tmp_path), state)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Command(Malicious):
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", [Malicious, Command])
@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, kind, archive):
    path, created = tmp_path / "nice.pt", tmp_path / "created"
    torch.save({"ema": {"a": torch.zeros(1)}, "x": kind(created)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"nice\.pt holds pickled objects, which could run code: if you trust it"):
        convert.read(path)
    assert not created.exists()


def test_what_cannot_be_read_is_refused(tmp_path):
    def refused(name, message, content=None):
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message) as error:
            convert.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)

    refused("absent.pt", "no such file or folder; download")
    refused("a.npz", r"expected one of \.pt, \.pth", "x")
    refused("a.pt", "cannot be read as weights, get it anew", "<html>not found</html>")
    refused("a.safetensors", "cannot be read as weights, get it anew", "<html>not found</html>")
    refused("b.pt", r"holds no state dict, nor one as ema", [torch.zeros(1)])
    refused("c.pt", "holds no state dict", {})
    refused("d.pt", r"no state dict, step is a int: save state_dict\(\) alone", {"a": torch.zeros(1), "step": 3})
    (tmp_path / "folder").mkdir()
    refused("folder", "no folder of a diffusers model")
    (tmp_path / "folder" / convert.INDEX).write_text('{"weight_map": {"a": "lost.safetensors"}}')
    refused("folder", "cannot be read as weights, get it anew")


# diffusers


def test_to_diffusers_and_back_is_bit_equal(dit_state):
    theirs = convert.dit_to_diffusers(dit_state)
    assert equal(convert.dit_from_diffusers(theirs, sample_size=8), dit_state)
    assert len({value.data_ptr() for value in theirs.values()}) == len(theirs)
    without = convert.dit_from_diffusers(theirs)
    assert "pos_embed" not in without
    network(without, **LABELS)  # of which it makes the table
    assert equal(convert.dit_from_diffusers(theirs | {"pos_embed.pos_embed": dit_state["pos_embed"]}), dit_state)


def test_it_answers_as_diffusers_does_once_the_frequencies_of_time_agree(tmp_path, dit_state, inputs):
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=7,
        norm_eps=1e-6,
    ).eval()
    theirs.load_state_dict(convert.dit_to_diffusers(dit_state), strict=True)
    theirs.save_pretrained(tmp_path / "transformer")
    state = convert.diffusers_dit(tmp_path)
    assert equal(state, dit_state)
    ours, (x, label), time = network(state, **LABELS), inputs, torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        output = ours(x, time, label)
        assert output.shape == (4, 6, 8, 8) and output.std() > 0.1
        assert (theirs(x, time, label).sample - output).abs().amax(dim=(1, 2, 3))[1:].min() > 1e-2  # at 0 there is none
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        torch.testing.assert_close(theirs(x, time, label).sample, output, atol=1e-5, rtol=1e-5)


def test_what_diffusers_has_not_is_refused(tmp_path, dit_state):
    theirs = convert.dit_to_diffusers(dit_state)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    with pytest.raises(ValueError, match=rf"{name} differs from transformer_blocks\.0.*one t_embedder\.mlp\.2\.bias"):
        convert.dit_from_diffusers(theirs | {name: theirs[name] + 1})
    with pytest.raises(
        ValueError, match=r"DiTTransformer2DModel has pos_embed\.proj\.weight, .*; the weights have .* and"
    ):
        convert.dit_from_diffusers(dit_state)
    normed = dit_state | {"blocks.0.attn.q_norm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"weights have blocks\.0\.attn\.q_norm\.weight \(8,\), which a plain DiT"):
        convert.dit_to_diffusers(normed)
    with pytest.raises(
        ValueError, match=r"a plain DiT .* has y_embedder\.embedding_table\.weight, which the weights lack"
    ):
        convert.dit_to_diffusers({n: v for n, v in dit_state.items() if not n.startswith("y_embedder")})
    with pytest.raises(ValueError, match="not the fixed table"):
        convert.dit_to_diffusers(dit_state | {"pos_embed": dit_state["pos_embed"] + 0.1})
    save_file(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json must tell sample_size"):
        convert.diffusers_dit(tmp_path)
    with pytest.raises(ValueError, match="give the model's folder"):
        convert.diffusers_dit(tmp_path / "diffusion_pytorch_model.safetensors")


# Data at t = 1


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sit_is_turned_to_our_time_and_sign(tmp_path, inputs, learn_sigma):
    x, label = inputs
    state = random_like(DiT(**{**LABELS, "learn_sigma": learn_sigma}).state_dict())
    torch.save({"ema": {**state, "feat_rope.freqs_cos": torch.ones(2)}}, tmp_path / "SiT.pt")
    theirs = network(state, **{**LABELS, "learn_sigma": learn_sigma})
    converted = convert.sit(tmp_path / "SiT.pt")
    ours = network(converted, **{**LABELS, "learn_sigma": learn_sigma})
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    with torch.no_grad():
        v = theirs(x, 1 - t, label)  # x0 - eps, and what SiT cuts off
        f = ours(x, t, label)  # eps - x0
        assert v.std() > 0.1 and not torch.allclose(theirs(x, t, label), v, atol=1e-3)
        torch.testing.assert_close(f[:, :3], -v[:, :3], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(f[:, 3:], v[:, 3:], atol=1e-5, rtol=1e-5)
        halved = network(converted, **{**LABELS, "learn_sigma": False})
        torch.testing.assert_close(halved(x, t, label), -v[:, :3], atol=1e-5, rtol=1e-5)
    torch.save(converted, tmp_path / "back.pt")  # converting twice is nothing
    back = convert.sit(tmp_path / "back.pt")
    assert all(torch.allclose(back[name], state[name], atol=1e-6) for name in state)


def test_jit_is_turned_to_our_time(tmp_path, inputs):
    x, label = inputs
    sizes = {**TINY, "num_classes": 7, "bottleneck": 8, "class_tokens": 2, "class_tokens_from": 1}
    sizes |= {"qk_norm": True, "rope": True, "swiglu": True, "rms_norm": True}
    state = random_like(DiT(**sizes).state_dict())
    buffers = {"feat_rope.freqs_cos": torch.ones(2), "feat_rope_incontext.freqs_sin": torch.ones(2)}
    averaged = {f"net.{name}": value for name, value in (state | buffers).items()}
    torch.save({"model": {}, "model_ema1": averaged}, tmp_path / "jit.pth")
    theirs, ours = network(state, **sizes), network(convert.jit(tmp_path / "jit.pth"), **sizes)
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    with torch.no_grad():
        expected = theirs(x, 1 - t, label)
        assert not torch.allclose(theirs(x, t, label), expected, atol=1e-3)
        torch.testing.assert_close(ours(x, t, label), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("convention", [convert.sit, convert.jit])
def test_another_network_has_no_time_to_reverse(tmp_path, convention):
    torch.save(UNet(**UNET).state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"the weights have no t_embedder\.mlp\.0\.weight, they are of another network"
    ):
        convention(tmp_path / "a.pt")


# ADM


@pytest.mark.parametrize("heads", [{"head_channels": 16}, {"num_heads": 4}])
def test_the_legacy_order_of_attention_is_read(tmp_path, heads):
    state = UNet(**UNET).state_dict()
    legacy = {
        n: v.unflatten(0, (3, 4, -1)).transpose(0, 1).flatten(0, 2) if ".qkv." in n else v for n, v in state.items()
    }
    assert sum(".qkv." in name for name in state) == 8
    torch.save(legacy, tmp_path / "a.pt")
    assert not equal(convert.published(tmp_path / "a.pt"), state)
    assert equal(convert.adm_legacy(tmp_path / "a.pt", **heads), state)


# Positions


def test_a_table_of_positions_at_another_resolution():
    table = sincos_positions(32, 8)
    assert convert.interpolated(table, 8) is table
    larger = convert.interpolated(table, 16)
    places = (torch.arange(16) + 0.5) / 2 - 0.5  # centres of the new in units of the old
    angles = places[:, None] * 10_000 ** -(torch.arange(8) / 8)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    fresh = torch.cat([axis.repeat(16, 1), axis.repeat_interleave(16, dim=0)], dim=1)[None]
    assert larger.shape == fresh.shape == (1, 256, 32)
    difference = (larger - fresh).abs().unflatten(1, (16, 16))
    assert difference[:, 2:-2, 2:-2].max() < 0.06 and difference.max() < 0.3
    assert convert.interpolated(table.half(), 4).dtype == torch.float16
    with pytest.raises(ValueError, match=r"pos_embed \(1, 15, 32\) has 15 tokens, which are no square"):
        convert.interpolated(table[:, :15], 8)


def test_weights_of_another_resolution_load_and_run(dit_state, inputs):
    ours = network(dit_state, **{**LABELS, "input_size": 16})
    x, label = inputs
    with torch.no_grad():
        output = ours(x.repeat(1, 1, 2, 2), torch.zeros(4), label)
    assert output.shape == (4, 6, 16, 16) and output.isfinite().all()


# Fitting


def on_meta(cls, **sizes):
    with torch.device("meta"):
        return cls(**sizes)


def test_a_learned_variance_is_dropped_where_there_is_none(dit_state, inputs):
    x, label = inputs
    time = torch.tensor([0.0, 3, 500, 999])
    with torch.no_grad():
        expected = network(dit_state, **LABELS)(x, time, label)[:, :3]
        output = network(dit_state, **{**LABELS, "learn_sigma": False})(x, time, label)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)

    state = random_like(UNet(**UNET, learn_sigma=True).state_dict())
    both, one = UNet(**UNET, learn_sigma=True), UNet(**UNET)
    for model in (both, one):
        model.load_state_dict(convert.fitted(state, model))
    with torch.no_grad():
        torch.testing.assert_close(one(x, time, label), both(x, time, label)[:, :3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cls", "sizes"), [(DiT, LABELS), (UNet, UNET)])
def test_a_network_that_is_told_where_it_lands_begins_as_one_that_is_not(inputs, cls, sizes):
    x, label = inputs
    time, gap = torch.tensor([0.0, 3, 500, 999]), torch.tensor([0.0, 0.1, 0.5, 1.0])
    bare, told = cls(**sizes), cls(**sizes, lands=True)
    with torch.no_grad():
        told.reset_parameters()
        first = told.gap_embedder.mlp[0].weight
        assert told.gap_embedder.mlp[2].weight.abs().max() == 0 < first.abs().max()
        state = random_like(bare.state_dict())
        bare.load_state_dict(state)
        told.load_state_dict(convert.fitted(state, told))
        assert first.abs().max() > 0
        for wherever in (None, gap):
            assert torch.equal(told(x, time, label, gap=wherever), bare(x, time, label))
        torch.nn.init.normal_(told.gap_embedder.mlp[2].weight)
        said = told(x, time, label, gap=gap)
        assert (said - told(x, time, label)).abs().amax((1, 2, 3))[1:].min() > 1e-4  # it heeds it, once it may
        assert torch.equal(told(x, time, label, gap=0 * gap), told(x, time, label))
    assert equal(convert.fitted(told.state_dict(), told), told.state_dict())


def test_what_does_not_fit_is_refused_with_both_sides_named(dit_state):
    def refused(message, state=dit_state, cls=DiT, **sizes):
        with pytest.raises(ValueError, match=message):
            convert.fitted(state, on_meta(cls, **{**(LABELS if cls is DiT else UNET), **sizes}))

    kept = dict(dit_state)
    assert equal(convert.fitted(dit_state, on_meta(DiT, **LABELS)), dit_state)
    refused("weights have 7 classes, but the network num_classes=10: set it to 7", num_classes=10)
    unet = UNet(**UNET).state_dict()
    refused("weights have 7 classes, but the network num_classes=5: set it to 7", unet, UNet, num_classes=5)
    small = network(dit_state, **{**LABELS, "learn_sigma": False}).state_dict()
    refused(r"no learned variance \(final_layer\.linear\.weight \(12, 32\)\), but .* learn_sigma=true", small)
    refused(r"no learned variance \(out\.2\.weight", unet, UNet, learn_sigma=True)
    refused(r"weights have y_embedder\.embedding_table\.weight \(8, 32\), which the network lacks", num_classes=0)
    three = r"blocks\.2\.attn\.qkv\.weight \(96, 32\), blocks\.2\.attn\.qkv\.bias \(96,\), blocks\.2\.\S+ \(32, 32\)"
    refused(rf"the network has {three} and 7 more, which the weights lack: choose", depth=3)
    refused(r"the weights have (blocks\.1\.\S+ \([\d, ]+\),? ){3}and 7 more, which the network lacks", depth=1)
    refused(r"the network has .*, which the weights lack; the weights have time_embed\.0\.weight", unet)
    refused(r"x_embedder\.proj\.weight: \(32, 3, 2, 2\) in the weights, \(32, 4, 2, 2\) in the network", in_channels=4)
    refused(r"pos_embed: \(1, 16, 32\) in the weights, \(1, 16, 64\) in .* and \d+ more; correct", hidden_size=64)
    assert equal(kept, dit_state)


@pytest.mark.parametrize("name", ["none", "published", "adm_legacy", "diffusers_dit", "sit", "jit"])
def test_configurations_of_init(tmp_path, dit_state, name):
    from dit.train.saved import config_dir

    cfg = OmegaConf.load(config_dir() / "init" / f"{name}.yaml")
    if name == "none":
        assert not cfg
        return
    assert OmegaConf.is_missing(cfg, "path")
    cfg.pop("needs", None)  # what the run must have, which the run checks
    cfg.path = str(tmp_path)
    save_file(dit_state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"sample_size": 8}')
    if name == "diffusers_dit":
        save_file(convert.dit_to_diffusers(dit_state), tmp_path / "diffusion_pytorch_model.safetensors")
    elif name == "adm_legacy":
        cfg.head_channels = 8
    assert instantiate(cfg)().keys() == dit_state.keys()
