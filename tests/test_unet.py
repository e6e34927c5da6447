import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from dit.command.compose import compose
from dit.model.unet import AttentionBlock, CrossAttentionBlock, UNet
from dit.weights.convert import new_attention_order

# Of the published code, class-conditional, with the flags of its README.
PARAMETERS = {64: 295_904_454, 128: 421_529_606, 256: 553_838_086, 512: 558_997_638}
TINY = {"input_size": 8, "in_channels": 3, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
TINY |= {"attention_resolutions": [4], "head_channels": 16}
TEXT = {"cross_attention": True, "text_width": 12}


def randomized(model):
    """No layer zero, so that every one is seen in the output."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.3)
    return model.eval()


def inputs(batch=2, size=8, dtype=torch.float32):
    """X (B, 3, H, W) and time (B,)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype), torch.linspace(0, 999, batch, dtype=dtype)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_the_published_ones(size):
    sources = ["data=shards", "data.path=x", f"data.image_size={size}", "latent=pixels"]
    cfg = compose("train", ["run=x", *sources, f"model=adm_{size}"])
    with torch.device("meta"):
        model = instantiate(cfg.model)(num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize(("name", "least", "most"), [("digits", 0.3e6, 0.6e6), ("cifar", 61e6, 62e6)])
def test_small_sizes_are_what_their_yaml_says(name, least, most):
    size = {"digits": 8, "cifar": 32}[name]
    sources = ["data=shards", "data.path=x", f"data.image_size={size}", "latent=pixels"]
    cfg = compose("train", ["run=x", *sources, f"model=unet_{name}"])
    with torch.device("meta"):
        model = instantiate(cfg.model)(num_classes=10)
    assert least < sum(p.numel() for p in model.parameters()) < most
    assert model.out_channels == 3 and not model.learn_sigma


def conv(name, channels, out_channels, *kernel):
    return {f"{name}.weight": (out_channels, channels, *kernel), f"{name}.bias": (out_channels,)}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def residual(name, channels, out_channels):
    first = norm(f"{name}.in_layers.0", channels) | conv(f"{name}.in_layers.2", channels, out_channels, 3, 3)
    second = norm(f"{name}.out_layers.0", out_channels)
    second |= conv(f"{name}.out_layers.3", out_channels, out_channels, 3, 3)
    skip = conv(f"{name}.skip_connection", channels, out_channels, 1, 1) if channels != out_channels else {}
    return first | conv(f"{name}.emb_layers.1", 128, 2 * out_channels) | second | skip


def attention(name, channels):
    qkv = conv(f"{name}.qkv", channels, 3 * channels, 1)
    return norm(f"{name}.norm", channels) | qkv | conv(f"{name}.proj_out", channels, channels, 1)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_names_and_shapes_are_the_published_ones(resblock_updown):
    model = UNet(**TINY, num_classes=7, learn_sigma=True, resblock_updown=resblock_updown)
    expected = conv("time_embed.0", 32, 128) | conv("time_embed.2", 128, 128) | {"label_emb.weight": (7, 128)}
    expected |= conv("input_blocks.0.0", 3, 32, 3, 3)
    expected |= residual("input_blocks.1.0", 32, 32)
    expected |= residual("input_blocks.3.0", 32, 64) | attention("input_blocks.3.1", 64)
    expected |= residual("middle_block.0", 64, 64) | attention("middle_block.1", 64)
    expected |= residual("middle_block.2", 64, 64)
    expected |= residual("output_blocks.0.0", 64 + 64, 64) | attention("output_blocks.0.1", 64)
    expected |= residual("output_blocks.1.0", 64 + 32, 64) | attention("output_blocks.1.1", 64)
    expected |= residual("output_blocks.2.0", 64 + 32, 32) | residual("output_blocks.3.0", 32 + 32, 32)
    expected |= norm("out.0", 32) | conv("out.2", 32, 6, 3, 3)
    if resblock_updown:
        expected |= residual("input_blocks.2.0", 32, 32) | residual("output_blocks.1.2", 64, 64)
    else:
        expected |= conv("input_blocks.2.0.op", 32, 32, 3, 3) | conv("output_blocks.1.2.conv", 64, 64, 3, 3)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected


def diffusers_state(state):
    """Our weights of TINY with 2 residual blocks, under the names that diffusers gives them."""
    prefixes = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "input_blocks.1.0": "down_blocks.0.resnets.0",
        "input_blocks.2.0": "down_blocks.0.resnets.1",
        "input_blocks.3.0": "down_blocks.0.downsamplers.0",
        "input_blocks.4.0": "down_blocks.1.resnets.0",
        "input_blocks.4.1": "down_blocks.1.attentions.0",
        "input_blocks.5.0": "down_blocks.1.resnets.1",
        "input_blocks.5.1": "down_blocks.1.attentions.1",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        **{f"output_blocks.{i}.0": f"up_blocks.{i // 3}.resnets.{i % 3}" for i in range(6)},
        **{f"output_blocks.{i}.1": f"up_blocks.0.attentions.{i}" for i in range(3)},
        "output_blocks.2.2": "up_blocks.0.upsamplers.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    parts = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
    parts |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "proj_out": "to_out.0"}
    parts |= {"op": "conv", "conv": "conv"}
    renamed = {}
    for name, value in state.items():
        prefix = next(p for p in prefixes if name.startswith(f"{p}."))
        part, _, kind = name.removeprefix(f"{prefix}.").rpartition(".")
        if part == "qkv":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{prefixes[prefix]}.to_{letter}.{kind}"] = third.squeeze(-1)
        else:
            middle = f".{parts[part]}" if part else ""
            value = value.squeeze(-1) if part == "proj_out" else value
            renamed[f"{prefixes[prefix]}{middle}.{kind}"] = value
    return renamed


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_output_is_that_of_diffusers(resblock_updown):
    from diffusers import UNet2DModel

    ours = randomized(UNet(**TINY | {"num_res_blocks": 2}, num_classes=7, resblock_updown=resblock_updown))
    resample = "resnet" if resblock_updown else "conv"
    theirs = UNet2DModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D" if resblock_updown else "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D" if resblock_updown else "UpBlock2D"),
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=16,
        attn_norm_num_groups=32,
        num_class_embeds=7,
    ).eval()
    theirs.load_state_dict(diffusers_state(ours.state_dict()))
    (x, time), label = inputs(), torch.tensor([3, 6])
    with torch.no_grad():
        expected = theirs(x, time, class_labels=label).sample
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x, time, label), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [{"head_channels": 16}, {"num_heads": 2}])
def test_the_legacy_order_of_attention_is_converted(heads):
    block = AttentionBlock(64, 64 // 16 if "head_channels" in heads else 2)
    legacy = randomized(block).state_dict()
    x = torch.randn(2, 64, 3, 5)
    with torch.no_grad():
        qkv = F.conv1d(block.norm(x).flatten(2), legacy["qkv.weight"], legacy["qkv.bias"])  # (B, heads 3 c, N)
        head_outputs = []
        for head in qkv.chunk(block.num_heads, dim=1):
            q, k, v = head.chunk(3, dim=1)  # 3 x (B, c, N)
            weight = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=-1)  # (B, N, N)
            head_outputs.append(v @ weight.transpose(1, 2))
        expected = x + block.proj_out(torch.cat(head_outputs, dim=1)).view_as(x)
        assert not torch.allclose(block(x), expected, atol=1e-3)
        state = new_attention_order({f"middle_block.1.{name}": p for name, p in legacy.items()}, **heads)
        block.load_state_dict({name.removeprefix("middle_block.1."): p for name, p in state.items()})
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [{}, {"head_channels": 64, "num_heads": 4}, {"head_channels": 7}, {"num_heads": 5}])
def test_a_conversion_without_the_right_heads_is_refused(heads):
    with pytest.raises(ValueError, match=r"give one of the two|does not divide the width 64 of a\.qkv\.bias"):
        new_attention_order({"a.qkv.bias": torch.zeros(192)}, **heads)


def test_output_is_exactly_zero_at_step_0_even_if_born_on_meta():
    with torch.device("meta"):
        model = UNet(**TINY, **TEXT, num_classes=7, pooled_width=5, image_channels=2)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.label_emb.weight.std().item() == pytest.approx(1, rel=0.1)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    told = {"label": torch.tensor([0, 7]), "text": torch.randn(2, 3, 12), "text_mask": mask}
    told |= {"pooled": torch.randn(2, 5), "image": torch.randn(2, 2, 8, 8)}
    assert model(*inputs(), **told).abs().max() == 0
    torch.nn.init.ones_(model.out[2].weight)
    output = model(*inputs(), **told)
    assert output.isfinite().all() and output.abs().max() > 0


def test_each_branch_begins_as_the_identity():
    torch.manual_seed(0)
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    model = UNet(**TINY, **TEXT)
    text, mask = torch.randn(2, 3, 128), torch.ones(2, 3, dtype=torch.bool)
    for block in model.modules():
        if isinstance(block, UNet.units) and not isinstance(block, AttentionBlock | CrossAttentionBlock):
            assert block.out_layers[3].weight.abs().max() == 0 < block.in_layers[2].weight.abs().max()
    for block in model.middle_block[1:3]:
        assert torch.equal(block(x, emb, text, mask), x)


def test_the_label_past_the_last_is_no_class():
    model = randomized(UNet(**TINY, num_classes=7))
    bare = UNet(**TINY).eval()
    bare.load_state_dict({name: p for name, p in model.state_dict().items() if name != "label_emb.weight"})
    x, time = inputs()
    with torch.no_grad():
        none, third = model(x, time, torch.tensor([7, 3]))
        assert torch.allclose(none, bare(x, time)[0], atol=1e-6)
        assert not torch.allclose(third, bare(x, time)[1], atol=1e-3)


def test_text_is_read_where_the_mask_says_so():
    model = randomized(UNet(**TINY, **TEXT))
    text, other = torch.randn(2, 2, 5, 12)
    mask = torch.tensor([[True, True, False, False, False], [True, False, True, False, False]])
    nothing = torch.zeros_like(mask)
    with torch.no_grad():
        output = model(*inputs(), text=text, text_mask=mask)
        assert not torch.allclose(output, model(*inputs(), text=other, text_mask=mask), atol=1e-3)
        changed = torch.where(mask[:, :, None], text, other)
        torch.testing.assert_close(model(*inputs(), text=changed, text_mask=mask), output)
        order = torch.tensor([0, 1, 2, 4, 3])
        torch.testing.assert_close(model(*inputs(), text=text[:, order], text_mask=mask), output)
        empty = model(*inputs(), text=text, text_mask=nothing)
        assert empty.isfinite().all() and not torch.allclose(empty, output, atol=1e-3)
        torch.testing.assert_close(model(*inputs(), text=other, text_mask=nothing), empty)


def test_pooled_text_and_image_are_read():
    model = randomized(UNet(**TINY, pooled_width=5, image_channels=2))
    pooled, image = torch.randn(2, 5), torch.randn(2, 2, 8, 8)
    output = model(*inputs(), pooled=pooled, image=image)
    assert output.shape == (2, 3, 8, 8)
    assert not torch.allclose(output, model(*inputs(), pooled=-pooled, image=image), atol=1e-3)
    assert not torch.allclose(output, model(*inputs(), pooled=pooled, image=-image), atol=1e-3)


def test_learned_variance_doubles_the_channels():
    model = UNet(**TINY, learn_sigma=True)
    assert model(*inputs()).shape == (2, model.out_channels, 8, 8) == (2, 6, 8, 8)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_half_and_double_precision_agree(resblock_updown):
    model = randomized(UNet(**TINY, **TEXT, num_classes=7, resblock_updown=resblock_updown))
    told = {"label": torch.tensor([1, 7]), "text": torch.randn(2, 3, 12)}
    told["text_mask"] = torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        expected = model(*inputs(), **told)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(*inputs(), **told)
        told["text"] = told["text"].double()
        double = model.double()(*inputs(dtype=torch.float64), **told)
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=1e-4)


def test_every_parameter_has_a_gradient_and_units_hold_most_of_them():
    model = randomized(UNet(**TINY, **TEXT, num_classes=7, pooled_width=5, image_channels=2))
    told = {"label": torch.tensor([1, 7]), "text": torch.randn(2, 3, 12), "pooled": torch.randn(2, 5)}
    told |= {"text_mask": torch.tensor([[True] * 3, [False] * 3]), "image": torch.randn(2, 2, 8, 8)}
    model(*inputs(), **told).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    units = [module for module in model.modules() if isinstance(module, UNet.units)]
    held = sum(parameter.numel() for unit in units for parameter in unit.parameters())
    assert held > 0.9 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_units_compile_without_graph_breaks():
    model = randomized(UNet(**TINY, **TEXT))
    told = {"text": torch.randn(2, 3, 12), "text_mask": torch.ones(2, 3, dtype=torch.bool)}
    several = torch._dynamo.config.patch(recompile_limit=64)  # one for each shape: 8 are too few for a U-Net
    with torch.no_grad(), several:
        expected = model(*inputs(), **told)
        for module in model.modules():
            if isinstance(module, UNet.units):
                module.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(*inputs(), **told), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 0}, "model.input_size=0 must be at least 1"),
        ({"in_channels": 0}, "model.in_channels=0 must be at least 1"),
        ({"model_channels": -32}, "model.model_channels=-32 must be at least 1"),
        ({"num_res_blocks": 0}, "model.num_res_blocks=0 must be at least 1"),
        ({"num_classes": -1}, "model.num_classes=-1 must be at least 0"),
        ({"image_channels": -1}, "model.image_channels=-1 must be at least 0"),
        ({"model_channels": 33}, "model.model_channels=33 must be even"),
        ({"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
        ({"channel_mult": []}, "model.channel_mult=.. has no level"),
        ({"channel_mult": [1, 0]}, "0 times model.model_channels=32 must be whole and positive"),
        ({"channel_mult": [0.7, 1]}, "0.7 times model.model_channels=32 must be whole"),
        (
            {"input_size": 12, "channel_mult": [1, 1, 1, 1]},
            "model.input_size=12 .* by 8, .* model.channel_mult at most 3",
        ),
        ({"attention_resolutions": [16, 4]}, r"model.attention_resolutions=\[16, 4\]: .* of 16, choose from \[8, 4\]"),
        (
            {"head_channels": 24},
            r"model.head_channels=24 does not divide .* \[64\]: choose one of \[1, 2, 4, 8, 16, 32, 64\]",
        ),
        ({"head_channels": 0}, "model.head_channels=0 does not divide"),
        ({"head_channels": None, "num_heads": 3}, "model.num_heads=3 does not divide"),
        ({"num_heads": 3}, "model.head_channels=16 and model.num_heads=3: give one of the two"),
        ({"head_channels": None}, "model.head_channels=null and model.num_heads=null: give one of the two"),
        ({"cross_attention": True}, "condition gives no text, but model.cross_attention=true"),
        ({"text_width": 12}, "condition gives text of width 12, but model.cross_attention=false"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        UNet(**TINY | change)


def test_what_is_of_another_size_than_announced_is_refused():
    model = UNet(**TINY, **TEXT, pooled_width=5, image_channels=2)
    told = {"text": torch.randn(2, 3, 12), "text_mask": torch.ones(2, 3, dtype=torch.bool)}
    told |= {"pooled": torch.randn(2, 5), "image": torch.randn(2, 2, 8, 8)}
    for change, message in [
        ({"image": torch.randn(2, 2, 4, 4)}, r"\(2, 4, 4\) beside x of \(3, 8, 8\).* told \(2, 8, 8\)"),
        ({"image": torch.randn(2, 3, 8, 8)}, r"told \(2, 8, 8\)"),
        ({"text": torch.randn(2, 3, 7)}, "text: a width of 7, but the network was built to be told a width of 12"),
        ({"pooled": torch.randn(2, 7)}, "pooled: a width of 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*inputs(), **told | change)
