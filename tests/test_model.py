from functools import partial

import pytest
import torch
from hydra.utils import instantiate

from dit.command.compose import compose
from dit.model.dit import DiT
from dit.model.layers import rotary_positions, rotated
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.noise.prediction import eps
from dit.noise.times import discrete
from dit.noise.vp import linear
from dit.noise.weight import mean_square
from dit.objective.denoising import Denoising
from dit.objective.objective import Batch

# As the published training script logs them, the fixed table of positions included (256 px: 32 x 32 x 4 latents).
PARAMETERS = {
    "s_2": (32_963_360, 32_865_056),
    "s_4": (32_945_024, 32_920_448),
    "s_8": (33_148_160, 33_142_016),
    "b_2": (130_512_416, 130_315_808),
    "b_4": (130_475_648, 130_426_496),
    "b_8": (130_881_536, 130_869_248),
    "l_2": (458_102_816, 457_840_672),
    "l_4": (458_053_760, 457_988_224),
    "l_8": (458_594_816, 458_578_432),
    "xl_2": (675_129_632, 674_834_720),
    "xl_4": (675_074_432, 675_000_704),
    "xl_8": (675_683_072, 675_664_640),
}
TINY = {"input_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4}


def network(name):
    """A published size on the meta device, composed as users do."""
    cfg = compose("train", ["run=x", "data=shards", "data.path=x", "latent=sd_vae", f"model=dit_{name}"])
    with torch.device("meta"):
        return instantiate(cfg.model)(num_classes=1000)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    model = network(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (sum(p.numel() for p in model.parameters()), trainable) == PARAMETERS[name]


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(p.shape) for name, p in network("xl_2").state_dict().items()}
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.0.attn.proj.bias": (1152,),
        "blocks.0.mlp.fc1.weight": (4608, 1152),
        "blocks.0.mlp.fc2.weight": (1152, 4608),
        "blocks.0.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    assert expected.items() <= shapes.items()
    assert len(shapes) == 12 + 28 * 10


def test_output_is_exactly_zero_at_step_0_and_the_first_loss_about_one():
    torch.manual_seed(0)
    model = DiT(**TINY, num_classes=10)
    x = torch.randn(64, 3, 8, 8)
    label = torch.arange(64) % 10
    assert model(x, torch.arange(64.0), label).abs().max() == 0
    batch = Batch(x, {"label": label}, Draw(0, 0, range(8), 64))
    [(name, loss)] = Denoising(discrete, partial(mean_square, prediction=eps)).phases(
        Denoiser(model, linear(), eps), batch, 0
    )
    assert name == "denoiser"
    assert loss.item() == pytest.approx(1, abs=0.05)


def test_initialization_is_the_published_one():
    torch.manual_seed(0)
    model = DiT(**TINY | {"hidden_size": 256}, num_classes=10)
    for block in model.blocks:
        assert block.adaLN_modulation[1].weight.abs().max() == 0
        bound = (6 / (256 + 3 * 256)) ** 0.5  # Xavier of the fused matrix
        assert block.attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = (6 / (3 * 4 + 256)) ** 0.5  # of the flattened patch
    assert model.x_embedder.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_position_table_has_the_column_first_and_sines_first():
    table = DiT(**TINY, num_classes=10).pos_embed[0]
    row, column, side, quarter = 2, 3, 4, 8
    frequencies = 10_000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    parts = [
        (column * frequencies).sin(),
        (column * frequencies).cos(),
        (row * frequencies).sin(),
        (row * frequencies).cos(),
    ]
    torch.testing.assert_close(table[row * side + column], torch.cat(parts).float())


def test_time_embedding_has_cosines_first():
    from dit.model.layers import sinusoid

    embedding = sinusoid(torch.tensor([999.0]), 256)[0]
    assert embedding[0].item() == pytest.approx(torch.tensor(999.0).cos().item(), abs=1e-4)
    assert embedding[128].item() == pytest.approx(torch.tensor(999.0).sin().item(), abs=1e-4)


def test_without_classes_it_is_unconditional():
    model = DiT(**TINY, num_classes=0)
    assert model(torch.randn(2, 3, 8, 8), torch.ones(2)).shape == (2, 3, 8, 8)
    assert not any(name.startswith("y_embedder") for name in model.state_dict())


def test_unpatchify_undoes_patches():
    model = DiT(**TINY, num_classes=10)
    image = torch.arange(3 * 8 * 8.0).view(1, 3, 8, 8)
    patches = image.view(1, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 16, 12)  # (B, N, p p C)
    assert torch.equal(model.unpatchify(patches), image)


def test_learned_variance_doubles_the_channels_and_the_denoiser_reads_the_first_half():
    model = DiT(**TINY, num_classes=10, learn_sigma=True)
    x, label = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    assert model(x, torch.ones(2), label).shape == (2, 6, 8, 8)
    denoiser = Denoiser(model, linear(), eps)
    output = denoiser.output(x, torch.tensor(0.5), label=label)
    assert output.f.shape == output.variance.shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=32"),
        ({"patch_size": 3}, "patch_size=3 does not divide input_size=8"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"hidden_size": 6, "num_heads": 2}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiT(**TINY | change, num_classes=10)


SWITCHES = ("qk_norm", "rope", "swiglu", "rms_norm", "shared_adaln")
TOLD = {"num_classes": 10, "text_width": 12, "pooled_width": 6, "image_channels": 2, "cross_attention": True}


def shaken(model):
    """The model with random numbers in place of its zeros."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.2)
    return model


def told(batch=3):
    """Something of everything that TOLD announces."""
    torch.manual_seed(1)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])[:batch]
    text = {"text": torch.randn(batch, 5, 12), "text_mask": mask, "pooled": torch.randn(batch, 6)}
    return text | {"label": torch.tensor([1, 2, 10])[:batch], "image": torch.randn(batch, 2, 8, 8)}


@pytest.mark.parametrize("switches", [{name: True} for name in SWITCHES] + [dict.fromkeys(SWITCHES, True)])
def test_every_switch_begins_at_zero_runs_and_can_be_made_on_meta(switches):
    torch.manual_seed(0)
    model = DiT(**TINY, **TOLD, **switches, bottleneck=8, class_tokens=3, class_tokens_from=1)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([1.0, 500.0, 0.3])
    assert model(x, t, **told()).abs().max() == 0
    shaken(model)
    out = model(x, t, **told())
    assert out.shape == x.shape and out.isfinite().all() and out.abs().max() > 0
    torch.testing.assert_close(
        model.double()(x.double(), t.double(), **doubled(told())).float(), out, atol=1e-4, rtol=1e-3
    )
    with torch.device("meta"):
        later = DiT(**TINY, **TOLD, **switches, bottleneck=8, class_tokens=3, class_tokens_from=1)
    later = later.to_empty(device="cpu")
    for tensor in [*later.parameters(), *later.buffers()]:
        tensor.data.fill_(float("nan"))
    later.reset_parameters()
    assert later(x, t, **told()).abs().max() == 0


def doubled(cond):
    return {name: value.double() if value.is_floating_point() else value for name, value in cond.items()}


def test_a_text_without_tokens_says_nothing_and_padding_is_not_read():
    model = shaken(DiT(**TINY, **TOLD))
    x, t, cond = torch.randn(3, 3, 8, 8), torch.ones(3), told()
    out = model(x, t, **cond)
    other = cond["text"].clone()
    other[~cond["text_mask"]] = 7.0
    assert torch.equal(model(x, t, **cond | {"text": other}), out)
    other = cond["text"].clone()
    other[1, 0] += 1
    changed = (model(x, t, **cond | {"text": other}) - out).flatten(1).abs().max(1).values > 1e-4
    assert changed.tolist() == [False, True, False]


def test_what_is_told_must_have_the_size_it_was_built_for():
    model = DiT(**TINY, **TOLD)
    for change, message in [
        ({"text": torch.randn(3, 5, 7)}, "text: a width of 7, but the network was built to be told a width of 12"),
        ({"pooled": torch.randn(3, 7)}, "pooled: a width of 7"),
        ({"image": torch.randn(3, 2, 4, 4)}, r"\(2, 4, 4\) beside x of \(3, 8, 8\).* told \(2, 8, 8\)"),
        ({"image": None}, "no picture beside x"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(torch.randn(3, 3, 8, 8), torch.ones(3), **told() | change)


def test_rotation_depends_on_differences_of_rows_and_columns_only():
    cos, sin = rotary_positions(8, side=5)
    q, k = torch.randn(2, 8)

    def logit(a, b):
        return (rotated(q.expand(25, 8), (cos, sin))[a] * rotated(k.expand(25, 8), (cos, sin))[b]).sum()

    torch.testing.assert_close(logit(0, 7), logit(6, 13))  # one row and two columns on
    torch.testing.assert_close(logit(3, 13), logit(11, 21))  # two rows on
    assert abs(logit(0, 7) - logit(0, 11)) > 1e-3  # rows are not columns
    extra = rotary_positions(8, side=5, num_extra=2)
    assert (extra[0, :2] == 1).all() and not extra[1, :2].any() and torch.equal(extra[:, 2:], torch.stack([cos, sin]))


def test_the_text_model_is_pixarts():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 32}
    theirs = diffusers.PixArtTransformer2DModel(
        **sizes,
        in_channels=3,
        out_channels=6,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
        norm_eps=1e-6,
        interpolation_scale=1.0,
    ).eval()
    state = {name: torch.randn_like(value) * 0.2 for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = DiT(**TINY, learn_sigma=True, shared_adaln=True, cross_attention=True, text_width=12)
    names = {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": ["adaln_single.emb.timestep_embedder.linear_1"],
        "t_embedder.mlp.2": ["adaln_single.emb.timestep_embedder.linear_2"],
        "t_block.1": ["adaln_single.linear"],
        "text_embedder.mlp.0": ["caption_projection.linear_1"],
        "text_embedder.mlp.2": ["caption_projection.linear_2"],
        "final_layer.linear": ["proj_out"],
    }
    tables = {"final_layer.scale_shift_table": "scale_shift_table"}
    for i in range(2):
        block, attention = f"blocks.{i}", f"transformer_blocks.{i}.attn"
        names[f"{block}.attn.qkv"] = [f"{attention}1.to_{n}" for n in "qkv"]
        names[f"{block}.attn.proj"] = [f"{attention}1.to_out.0"]
        names[f"{block}.cross_attn.q_linear"] = [f"{attention}2.to_q"]
        names[f"{block}.cross_attn.kv_linear"] = [f"{attention}2.to_{n}" for n in "kv"]
        names[f"{block}.cross_attn.proj"] = [f"{attention}2.to_out.0"]
        names[f"{block}.mlp.fc1"] = [f"transformer_blocks.{i}.ff.net.0.proj"]
        names[f"{block}.mlp.fc2"] = [f"transformer_blocks.{i}.ff.net.2"]
        tables[f"{block}.scale_shift_table"] = f"transformer_blocks.{i}.scale_shift_table"
    mapped = {a: state[b] for a, b in tables.items()}
    for a, parts in names.items():
        for kind in ("weight", "bias"):
            mapped[f"{a}.{kind}"] = torch.cat([state[f"{b}.{kind}"] for b in parts])
    missing, unexpected = ours.load_state_dict(mapped, strict=False)
    assert set(missing) == {"pos_embed", "text_embedder.nothing"} and not unexpected
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 999.0]), torch.randn(2, 5, 12)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    expected = theirs(x, text, timestep=t, encoder_attention_mask=mask.float()).sample
    torch.testing.assert_close(ours(x, t, text=text, text_mask=mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [
        ("sit_xl_2", ["latent=sd_vae"], 675_129_632),
        ("lightning_dit_xl_1", ["latent=sd_vae", "latent.stride=16", "latent.channels=32"], 675_000_000),
        ("jit_b_16", ["latent=pixels"], 131_000_000),
        ("jit_l_16", ["latent=pixels"], 459_000_000),
        ("jit_h_16", ["latent=pixels"], 953_000_000),
        ("jit_b_32", ["latent=pixels", "data.image_size=512"], 133_000_000),
    ],
)
def test_the_successors_have_their_published_sizes(name, size, parameters):
    cfg = compose("train", ["run=x", "data=shards", "data.path=x", *size, f"model={name}"])
    with torch.device("meta"):
        model = instantiate(cfg.model)(num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
