"""Products in float8, emulated: what they change, and what they leave as it is. On a GPU they are not yet run."""

import json
from pathlib import Path

import pytest
import torch
from together import weights
from torch import nn

from dit.command.compose import compose
from dit.model.dit import DiT
from dit.train import float8
from dit.train.checked import checked
from dit.train.devices import settled
from dit.train.layout import Layout
from dit.train.run import Run

pytest.importorskip("torchao")


def network(**options):
    """One whose weights are far from zero, the same each time."""
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 64, "depth": 3, "num_heads": 4}
    made, generator = DiT(**sizes, **options), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.1, generator=generator)
    return made


def answered(made, images=5):
    """Its output, and the gradient of its weights; 80 tokens, and images that are no multiple of 16."""
    generator = torch.Generator().manual_seed(1)
    output = made(torch.randn(images, 1, 8, 8, generator=generator), torch.arange(images) * 100.0)
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


@pytest.mark.parametrize("swiglu", [False, True])
def test_it_rounds_as_float8_does_and_names_stay(swiglu):
    """Three bits of mantissa: a number is off by 2.5 % or so, and so are products, in three blocks twice that."""
    plain, rounded = network(swiglu=swiglu, mlp_ratio=3.0), network(swiglu=swiglu, mlp_ratio=3.0)
    float8.convert(rounded, emulate=True)
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    kinds = {type(layer).__name__ for block in rounded.blocks for layer in (block.attn.qkv, *block.mlp.children())}
    assert kinds == {"Float8Linear"} and type(rounded.blocks[0].adaLN_modulation[1]) is nn.Linear
    for ours, theirs in zip(answered(rounded), answered(plain), strict=True):
        assert 0.01 < (ours - theirs).norm() / theirs.norm() < 0.1


def test_narrow_layers_are_left_as_they_are():
    made = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=512, depth=1, num_heads=4)
    with pytest.raises(ValueError, match=r"float8=tensorwise: DiT has no trained layer .* at least 1024 features"):
        float8.convert(made, emulate=False)
    with torch.device("meta"):
        made = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=1152, depth=1, num_heads=16)
    float8.convert(made, emulate=False)
    assert {
        name for name, layer in made.named_modules() if type(layer) is not nn.Linear and hasattr(layer, "config")
    } == {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def test_a_run_has_nearly_the_losses_of_float32_and_the_same_checkpoint(config):
    learns = ["optimizer.lr=1e-2", "trainer.max_steps=40"]

    def of(run, *more):
        cfg = config(f"run={run}", *learns, *more)
        assert Run(cfg).fit() is None
        lines = (Path(cfg.runs_dir) / cfg.run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], weights(cfg)

    (plain, kept), (rounded, same) = of("plain"), of("rounded", "trainer.float8=emulate")
    assert plain != rounded and rounded == pytest.approx(plain, rel=5e-3) and plain[-1] < 0.9 * plain[0]
    layouts = [{group: {n: v.shape for n, v in held[group].items()} for group in held} for held in (kept, same)]
    assert layouts[0] == layouts[1]
    with pytest.raises(ValueError, match=r"trainer\.float8=none, was emulate"):
        Run(config("run=rounded", *learns))


MEANFLOW = ["experiment=digits_meanflow", "objective/derivative=jvp"]
MIXED = ["trainer.float8=tensorwise", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.float8=tensorwise", "trainer.accelerator=cpu"],
            "needs a GPU, but trainer.accelerator=cpu: take .*emulate",
        ),
        ([*MIXED, "trainer.precision=32-true"], "for trainer.precision=bf16-mixed, not 32-true"),
        (MIXED, "give trainer.compile=true, too"),
        ([*MIXED, "trainer.compile=true"], "no trained layer"),  # of the digits' width
        (["trainer.float8=emulate", "trainer=zero2"], "does not go with trainer.strategy=zero2: choose trainer=ddp"),
        (["trainer.float8=emulate", "trainer=fsdp_tp"], "does not go with trainer.tensor_parallel_size=2"),
        (["trainer.float8=emulate", "model=unet_digits"], "UNet has no trained layer"),
        (
            ["trainer.float8=emulate", "objective/teacher=data", *MEANFLOW],
            "does not reach through trainer.float8=emulate",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    experiment = [] if MEANFLOW[0] in overrides else ["experiment=digits"]
    cfg = settled(compose("train", [*experiment, *overrides, "trainer.dry_run=true"]))
    with pytest.raises(ValueError, match=message):
        checked(cfg, Layout())


def test_older_gpus_and_a_missing_library_are_named(monkeypatch):
    options = compose("train", ["experiment=digits", *MIXED, "trainer.compile=true"]).trainer
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs torchao: pip install 'ditforge\[float8\]'"):
        float8.check(options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or more, but A100 has 8\.0: take"):
        float8.check(options)
