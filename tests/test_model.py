from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from dit.command.compose import compose
from dit.model.dit import DiT
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
MACS = {"s_8": 0.36e9, "b_4": 5.57e9, "xl_2": 118.62e9}
TINY = {"input_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4}


def network(name):
    """A published size on the meta device, composed as users do."""
    cfg = compose("train", ["run=x", "data=webdataset", "data.path=x", "latent=sd_vae", f"model=dit_{name}"])
    with torch.device("meta"):
        return instantiate(cfg.model)(num_classes=1000)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    model = network(name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (sum(p.numel() for p in model.parameters()), trainable) == PARAMETERS[name]


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds_are_the_papers(name):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(name)(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert counter.get_total_flops() / 2 == pytest.approx(MACS[name], rel=0.015)  # the table is rounded


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
