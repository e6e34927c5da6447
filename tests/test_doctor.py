import pytest
import torch
from test_conf import dit

from dit.command import doctor
from dit.command.compose import ConfigError, compose
from dit.train.build import Parts
from dit.train.cost import memory, multiply_adds

# G multiply-adds of an image forward at 256 px, and at 512 px; the paper says 118.64 and 524.60 of XL/2.
GMACS = {
    "dit_s_2": (6.06, 31.44),
    "dit_s_4": (1.41, 6.07),
    "dit_s_8": (0.36, 1.43),
    "dit_b_2": (23.01, 106.38),
    "dit_b_4": (5.57, 23.03),
    "dit_b_8": (1.42, 5.59),
    "dit_l_2": (80.70, 360.98),
    "dit_l_4": (19.70, 80.74),
    "dit_l_8": (5.01, 19.73),
    "dit_xl_2": (118.62, 524.54),
    "dit_xl_4": (29.04, 118.66),
    "dit_xl_8": (7.39, 29.09),
}
PIXELS = ["latent=pixels", "data.image_size=16", "data.num_classes=10"]
CAPTION = "data.fields=[label,caption]"
SMALL = [*PIXELS, "model.patch_size=2", "model.hidden_size=96", "model.depth=3", "model.num_heads=4"]


def parts(*overrides):
    cfg = compose("doctor", overrides)
    doctor.check(cfg)
    return Parts(cfg)


@pytest.mark.parametrize("name", GMACS)
@pytest.mark.parametrize("size", [256, 512])
def test_operations_are_the_papers(name, size):
    expected = GMACS[name][size == 512]
    ours = multiply_adds(parts(f"model={name}", f"data.image_size={size}")) / 1e9
    assert abs(ours - expected) <= 0.001 * expected + 0.005  # the table is rounded


@pytest.mark.parametrize(("name", "size", "gmacs"), [("adm_64", 64, 104), ("adm_256", 256, 1120)])  # "Gflops"
def test_operations_of_unets_are_about_the_papers(name, size, gmacs):
    unet = parts(f"model={name}", "latent=pixels", f"data.image_size={size}")
    assert multiply_adds(unet) / 1e9 == pytest.approx(gmacs, rel=0.08)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_are_what_a_real_forward_saves(precision, mode):
    from dit.train.execution import arrange

    recipe = parts(*SMALL, f"trainer.precision={precision}", f"trainer.activation_checkpointing={mode}")
    network = recipe.denoiser().network
    arrange(network, checkpointing=mode)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved = {}

    def pack(tensor):
        if (at := tensor.untyped_storage().data_ptr()) not in own:
            saved[at] = tensor.untyped_storage()  # held, so that no other gets its address
        return tensor

    x, time, label = torch.randn(16, 3, 16, 16), torch.rand(16), torch.zeros(16, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = network(x, time, label=label).float().square().mean()
    loss.backward()
    need = memory(recipe, 16)
    assert need.activations + need.copies == pytest.approx(sum(s.nbytes() for s in saved.values()), rel=0.05)


def test_each_part_of_the_memory():
    need = memory(parts(*SMALL), 16)
    network = parts(*SMALL).denoiser("meta").network
    trained = sum(4 * p.numel() for p in network.parameters() if p.requires_grad)
    assert need.parameters == sum(4 * p.numel() for p in network.parameters())
    assert need.gradients == need.ema == trained
    assert need.optimizer == pytest.approx(2 * trained, rel=0.01)
    assert need.copies == pytest.approx(trained / 2, rel=0.1)
    assert need.total == sum(need)
    assert memory(parts(*SMALL), 32).activations == 2 * need.activations


def test_of_an_adapter_alone_there_are_gradients_states_and_averages():
    recipe = parts(*SMALL, "adapter=lora", "adapter.rank=2", "init=run", "init.path=x")
    need, whole = memory(recipe, 16), memory(parts(*SMALL), 16)
    # In 32 bits, in and out: of three blocks' qkv, proj, fc1, fc2 and modulation, and the last one's.
    trained = 4 * 2 * (3 * (4 + 2 + 5 + 5 + 7) + 3) * 96
    assert need.gradients == need.ema == trained and need.parameters == whole.parameters + trained
    assert need.optimizer == pytest.approx(2 * trained, rel=0.02)
    assert f"of which {trained // 4:,} are trained" in "".join(doctor.network_lines(recipe, 0))


def test_recomputing_keeps_less():
    none, some, most = (
        memory(parts(*SMALL, f"trainer.activation_checkpointing={r}"), 16) for r in ("none", "selective", "full")
    )
    assert most.activations < some.activations < none.activations
    assert most.total < some.total < none.total
    assert most.passing > none.passing  # one block's activations at a time


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=digits"],
        ["experiment=imagenet256_dit_s_2"],
        [
            "model=adm_64",
            "data.image_size=64",
            "latent=pixels",
            "model.cross_attention=true",
            "condition=text",
            CAPTION,
        ],
        ["model=dit_s_8", "condition=text_t5", "model.cross_attention=true", "condition.pooled=true", CAPTION],
        ["model=dit_s_8", "condition=label_superresolution", "trainer.micro_batch_size=3"],
        ["model=dit_s_8", "condition=none", "guidance.scale=1"],
    ],
    ids=" ".join,
)
def test_whatever_the_network_is_told(overrides, capsys):
    cfg = compose("doctor", overrides)
    doctor.check(cfg)
    assert doctor.main(cfg) == 0
    output = capsys.readouterr().out
    assert "multiply-adds" in output and "total" in output and "nan" not in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=dit_xl_3"], "no such option; did you mean dit_xl_"),
        (["data.image_size=100"], "data.image_size=100"),
        (["trainer.batch_size=0"], "trainer.batch_size=0 must be at least 1"),
        (["trainer.precision=16"], "choose one of .*32-true, bf16-mixed"),
        (["model=dit_s_2", "condition=text", CAPTION], "cross_attention"),
    ],
)
def test_mistakes_are_answered(overrides, message):
    with pytest.raises(ConfigError, match=message):
        cfg = compose("doctor", overrides)
        doctor.check(cfg)
        doctor.main(cfg)


def test_the_verb(tmp_path):
    code, output, _ = dit("doctor", "-m", "model=dit_s_8,dit_xl_2", cwd=tmp_path)
    assert code == 0 and "0.36 GMAC" in output and "118.62 GMAC" in output and "675,129,632" in output
    code, output, _ = dit("doctor", "model=dit_xl", cwd=tmp_path)
    assert code == 2 and "did you mean" in output and "Traceback" not in output
    code, output, _ = dit("doctor", "--help", cwd=tmp_path)
    assert code == 0 and "dit doctor model=dit_xl_2" in output
    assert not list(tmp_path.glob("*.*"))
