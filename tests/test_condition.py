import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoders import clip, t5

from dit.command.compose import compose
from dit.condition.encoder import TextEncoder
from dit.condition.inpainting import Inpainting
from dit.condition.label import Label
from dit.condition.several import Several
from dit.condition.superresolution import SuperResolution
from dit.condition.text import Text
from dit.condition.unconditional import Unconditional
from dit.data.image import encode_png
from dit.data.writer import write_shards
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.sampler.pipeline import Pipeline
from dit.train.build import Parts, build
from dit.train.run import Run

CAPTIONED = "data.fields=[label,caption]"
CAPTIONS = ["a seven", "an eight", "", "a seven"]


def draw(n, step=0):
    return Draw(0, step, range(n), n)


def same(images, generator):
    """The encoder of pixels."""
    return images


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Tiny random encoders in the library's own format, by kind."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoders")
    clip(folder / "clip")
    t5(folder / "t5")
    return {"clip": str(folder / "clip"), "t5": str(folder / "t5")}


def test_labels_and_their_dropout():
    label = Label(10, dropout=0.3)
    cond = label({"label": torch.arange(10)}, draw(10), same)
    dropped = label.augment(cond, draw(10))["label"]
    u = draw(10).uniform("drop")
    assert torch.equal(dropped, torch.where(u < 0.3, 10, torch.arange(10))) and (dropped == 10).any()
    assert label.null(cond)["label"].tolist() == [10] * 10
    with pytest.raises(ValueError, match="from 0 to 9"):
        label({"label": [10]}, draw(1), same)
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        Label(10, dropout=1.5)
    with pytest.raises(ValueError, match=r"condition\.dropout=0"):
        Label(10, dropout=0).null({})


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_captions_are_encoded_padded_and_masked(encoders, kind):
    text = Text(encoders[kind], width=64, max_length=12, pooled=True)
    cond = text({"caption": CAPTIONS}, draw(4), same)
    assert cond["text"].shape == (4, 12, 64) and cond["pooled"].shape == (4, 64)
    assert cond["text_mask"].sum(1)[2] == 0 and cond["pooled"][2].abs().max() == 0  # an empty caption says nothing
    assert torch.equal(cond["text"][0], cond["text"][3]) and not torch.equal(cond["text"][0], cond["text"][1])
    alone = text({"caption": CAPTIONS[1:2]}, draw(1), same)
    there = alone["text_mask"][0]
    torch.testing.assert_close(alone["text"][0][there], cond["text"][1][there])
    assert not any(p.requires_grad for p in text.encoder.model.parameters())
    long = text({"caption": ["a seven and an eight and a nine"]}, draw(1), same)
    assert long["text_mask"].all()
    with pytest.raises(ValueError, match="caption=7: give a text, like caption='a seven'"):
        text({"caption": [7]}, draw(1), same)


def test_the_encoder_is_the_librarys(encoders):
    import transformers

    encoded = TextEncoder(encoders["clip"], 64, 12)(["a seven"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoders["clip"])
    tokens = tokenizer(["a seven"], return_tensors="pt")
    model = transformers.CLIPTextModel.from_pretrained(encoders["clip"]).eval()
    output = model(**tokens)
    number = tokens.input_ids.shape[1]
    torch.testing.assert_close(encoded.text[:, :number], output.last_hidden_state)
    torch.testing.assert_close(encoded.pooled, output.pooler_output)


def test_the_encoder_stays_in_float32_within_autocast(encoders):
    text = Text(encoders["clip"], width=64, max_length=12)
    plain = text({"caption": CAPTIONS}, draw(4), same)["text"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text({"caption": CAPTIONS}, draw(4), same)["text"], plain)


def test_a_negative_prompt_replaces_the_caption_and_leaves_out_the_rest(encoders):
    text = Text(encoders["clip"], width=64, max_length=12)
    both = Several(label=Label(10), text=text)
    assert both.part({"caption": ["a one"]}, draw(1), same).keys() == {"text", "text_mask"}
    assert both.part({"caption": ["a one"], "label": [1]}, draw(1), same).keys() == {"label", "text", "text_mask"}
    cfg = compose("train", ["experiment=digits", "sampler.num_steps=2", "guidance.scale=3"])
    parts, seen = Parts(cfg), {}

    def network(x, time, **cond):
        seen.update(cond)
        return x

    denoiser = Denoiser(torch.nn.Linear(1, 1), parts.schedule, parts.prediction)
    denoiser.network.forward = network
    pipeline = Pipeline(denoiser, both, parts.latent(), parts._guidance, parts._sampler, parts.grid)
    pipeline({"caption": ["a two"] * 2, "label": [1, 2]}, 2, avoid={"caption": ["a one"]})
    assert seen["label"].tolist() == [1, 2, 10, 10]
    other = text({"caption": ["a one"]}, draw(1), same)["text"]
    assert torch.equal(seen["text"][2:], other.expand(2, -1, -1)) and not torch.equal(
        seen["text"][:2], seen["text"][2:]
    )


def test_precomputed_embeddings_say_the_same_and_need_no_encoder(encoders):
    text = Text(encoders["clip"], width=64, max_length=12, pooled=True)
    online = text({"caption": CAPTIONS[:2]}, draw(2), same)
    shards = Text("no/encoder", width=64, max_length=12, pooled=True, precomputed=True)
    shards.check(None)
    assert shards.fields == ("text", "pooled")
    rows = np.empty(2, dtype=object)
    for i in range(2):
        rows[i] = online["text"][i][online["text_mask"][i]].half()
    cond = shards({"text": rows, "pooled": [row.half() for row in online["pooled"]]}, draw(2), same)
    assert torch.equal(cond["text_mask"], online["text_mask"])
    torch.testing.assert_close(
        cond["text"] * cond["text_mask"][..., None], online["text"] * online["text_mask"][..., None], atol=2e-3, rtol=0
    )
    with pytest.raises(ValueError, match=r"\(5, 32\), but condition\.width=64"):
        shards({"text": [torch.zeros(5, 32)], "pooled": [torch.zeros(64)]}, draw(1), same)
    with pytest.raises(ValueError, match=r"at most 12"):
        shards({"text": [torch.zeros(13, 64)], "pooled": [torch.zeros(64)]}, draw(1), same)
    with pytest.raises(ValueError, match="pooled embeddings of width 32"):
        shards({"text": [torch.zeros(5, 64)], "pooled": [torch.zeros(32)]}, draw(1), same)


def test_captions_are_dropped_and_left_out(encoders):
    text = Text(encoders["clip"], width=64, max_length=12, pooled=True, dropout=0.5)
    cond = text({"caption": ["a seven"] * 40}, draw(40), same) | {"label": torch.arange(40)}
    told = text.augment(cond, draw(40))
    kept = draw(40).uniform("drop text") >= 0.5
    assert torch.equal(told["text_mask"].any(1), kept) and torch.equal(told["pooled"].abs().sum(1) > 0, kept)
    null = text.null(cond)
    assert not null["text_mask"].any() and not null["pooled"].any() and torch.equal(null["label"], cond["label"])
    with pytest.raises(ValueError, match=r"condition\.dropout=0"):
        Text("x", width=64, max_length=12, dropout=0).null({})


def test_what_is_wrong_with_an_encoder_is_said(encoders, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"condition\.width=768, but the embeddings of .* have 64"):
        Text(encoders["clip"], width=768, max_length=12).check(None)
    with pytest.raises(ValueError, match=r"condition\.name=no/such-encoder is neither a folder .* offline"):
        Text("no/such-encoder", width=64, max_length=12).check(None)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 64}')
    with pytest.raises(ValueError, match=r"condition\.max_length=20, but .* reads at most 16 tokens"):
        Text(encoders["clip"], width=64, max_length=20).check(None)
    (tmp_path / "bare").mkdir()
    shutil.copy(Path(encoders["clip"]) / "config.json", tmp_path / "bare")
    with pytest.raises(ValueError, match="neither a folder with a text encoder and its tokenizer"):
        Text(str(tmp_path / "bare"), width=64, max_length=12).check(None)
    shutil.copytree(encoders["clip"], tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(ValueError, match="its tokenizer lacks its vocabulary"):
        Text(str(tmp_path / "mute"), width=64, max_length=12).check(None)
    shutil.copytree(encoders["clip"], tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="neither a folder with a text encoder"):
        Text(str(tmp_path / "cut"), width=64, max_length=12).check(None)
    with pytest.raises(ValueError, match="there is no such folder"):
        Text(str(tmp_path / "nowhere"), width=64, max_length=12).check(None)
    with pytest.raises(ValueError, match="is a bert model: give a CLIP or T5 one"):
        _ = Text(str(tmp_path), width=64, max_length=12).encoder
    with pytest.raises(ValueError, match=r"condition\.max_length=0"):
        Text("x", width=64, max_length=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'ditforge\[text\]'"):
        Text(encoders["clip"], width=64, max_length=12).check(None)


def test_low_resolution_is_averaged_enlarged_and_noised():
    condition = SuperResolution(channels=1, image_size=8, factor=2, max_noise=0.5)
    assert condition.sizes == {"image_channels": 2}
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    asked = condition.asked({"image": images}, draw(40))
    assert asked["low_resolution"].shape == (40, 1, 4, 4)
    assert asked["low_resolution"][0, 0, 0, 0] == images[0, 0, :2, :2].float().mean().round()
    cond = condition(asked, draw(40), same)
    large = torch.nn.functional.interpolate(asked["low_resolution"].float() / 127.5 - 1, size=(8, 8), mode="bicubic")
    torch.testing.assert_close(cond["image"][:, :1], large.clamp(-1, 1))
    assert not cond["image"][:, 1].any()
    noised = condition.augment(cond, draw(40))["image"]
    level = draw(40).uniform("noise level") * 0.5
    torch.testing.assert_close(noised[:, 1], level[:, None, None].expand(40, 8, 8))
    rest = (noised[:, :1] - (1 - level**2).sqrt()[:, None, None, None] * cond["image"][:, :1]).flatten(1)
    assert (rest.std(1) / level).mean().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(condition.augment(cond, draw(40, step=1))["image"], noised)
    asked_noise = condition({**asked, "noise_level": 0.25}, draw(40), same)["image"]
    assert (asked_noise[:, 1] == 0.25).all()
    with pytest.raises(ValueError, match="3 x 3 pixels, but this model enlarges 4 x 4 to 8 x 8"):
        condition({"low_resolution": torch.zeros(1, 1, 3, 3, dtype=torch.uint8)}, draw(1), same)
    with pytest.raises(ValueError, match=r"low_resolution=torch.float32 \(1, 1, 4, 4\): give .* torch.uint8 \(N, C, h"):
        condition({"low_resolution": torch.zeros(1, 1, 4, 4)}, draw(1), same)
    with pytest.raises(ValueError, match=r"condition\.factor=3 must divide .*: choose one of \[2, 4, 8\]"):
        SuperResolution(channels=1, image_size=8, factor=3)
    with pytest.raises(ValueError, match=r"max_noise=1"):
        SuperResolution(channels=1, image_size=8, factor=2, max_noise=1.0)
    with pytest.raises(ValueError, match="cannot be left out"):
        condition.null({})


def test_holes_hide_what_is_to_be_drawn():
    condition = Inpainting(channels=1, image_size=8)
    images = torch.randint(1, 256, (500, 1, 8, 8), dtype=torch.uint8)
    asked = condition.asked({"image": images}, draw(500))
    mask = asked["mask"]
    assert mask.shape == (500, 8, 8) and mask.flatten(1).any(1).all()
    share = mask.flatten(1).all(1).float().mean().item()
    assert share == pytest.approx(1 / 16, abs=0.05)  # whole pictures: each edge is the picture's with probability 1/2
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows[:, :, None] & columns[:, None])  # rectangles
    cond = condition(asked, draw(500), same)["image"]
    assert torch.equal(cond[:, 1].bool(), mask)
    torch.testing.assert_close(cond[:, 0][~mask], (images.float() / 127.5 - 1)[:, 0][~mask])
    assert not cond[:, 0][mask].any()
    latent = condition(asked, draw(500), lambda x, generator: torch.nn.functional.avg_pool2d(x, 2))["image"]
    assert latent.shape == (500, 2, 4, 4)  # a cell of a latent is drawn where any of its pixels is
    assert torch.equal(latent[:, 1].bool(), mask.view(500, 4, 2, 4, 2).any(4).any(2))
    with pytest.raises(ValueError, match="mask of 4 x 4 pixels, but this model draws 8 x 8"):
        condition({"image": images, "mask": mask[:, :4, :4]}, draw(500), same)
    with pytest.raises(ValueError, match=r"mask='a.png': give pictures as a tensor, torch.bool \(N, H, W\)"):
        condition({"image": images, "mask": "a.png"}, draw(500), same)


def test_several_conditions_say_all_and_leave_out_what_may_be():
    both = Several(label=Label(10, dropout=0.5), picture=Inpainting(channels=1, image_size=8))
    assert both.sizes == {"num_classes": 10, "image_channels": 2}
    assert both.fields == ("label", "image") and both.asks == ("label", "image", "mask")
    batch = {"image": torch.zeros(20, 1, 8, 8, dtype=torch.uint8), "label": torch.arange(20) % 10}
    cond = both(both.asked(batch, draw(20)), draw(20), same)
    assert cond.keys() == {"label", "image"}
    null = both.null(cond)
    assert (null["label"] == 10).all() and torch.equal(null["image"], cond["image"])
    told = both.augment(cond, draw(20))
    assert (told["label"] == 10).any() and torch.equal(told["image"], cond["image"])
    with pytest.raises(ValueError, match=r"condition\.dropout=0"):
        Several(label=Label(10, dropout=0)).null({})
    with pytest.raises(ValueError, match="image_channels"):
        Several(a=Inpainting(1, 8), b=SuperResolution(1, 8, 2))
    with pytest.raises(ValueError, match="none is given"):
        Several()


def test_nothing_is_said():
    assert Unconditional()({"label": [1]}, draw(1), same) == {} == Unconditional().sizes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["condition=text", "condition.name=x", CAPTIONED], "gives text of width 768"),
        (["model=dit_digits_text"], "gives no text: the two go together"),
        (["model=unet_digits", "model.cross_attention=true"], "gives no text"),
        (["condition=label_superresolution", "data.image_size=6"], r"condition\.factor=4"),
        (["condition=text", "model=dit_digits_text", "data.fields=[label]"], r"data\.fields=\[label,caption\]"),
        (["condition=text", "model=dit_digits_text", CAPTIONED, "model.cross_attention=false"], "the two go together"),
        (["condition=superresolution", "condition.factor=3"], r"condition\.factor=3"),
        (["data.fields=[label,cpation]"], "there is no cpation; choose of label, caption, text, pooled"),
        (["model=unet_digits", "model.head_channels=7"], r"model\.head_channels=7 does not divide"),
        (["model=dit_digits_modern", "model.num_heads=32"], r"model\.rope=true needs heads of a multiple of 4"),
        (["model.class_tokens=4", "condition=none"], r"model\.class_tokens=4, but no class is told"),
        (
            ["model=dit_digits", "condition.num_classes=7"],
            r"condition\.num_classes=7 differs from data\.num_classes=10",
        ),
    ],
)
def test_conditions_and_models_that_do_not_fit_are_refused(overrides, message):
    cfg = compose("train", ["experiment=digits", *overrides])
    with pytest.raises(ValueError, match=message):
        build(cfg.data)
        Parts(cfg)


def test_embeddings_in_shards_train_a_run_without_an_encoder(config, tmp_path):
    def files(i):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(i).normal(size=(1 + i % 5, 24)).astype(np.float16))
        png = encode_png(torch.full((1, 8, 8), i, dtype=torch.uint8))
        return {"png": png, "cls": b"%d" % (i % 10), "text.npy": file.getvalue()}

    write_shards(tmp_path / "shards", (files(i) for i in range(64)), 8)
    overrides = ["run=shards", "data=shards", f"data.path={tmp_path}/shards", "data.image_size=8"]
    overrides += ["data.channels=1", "data.num_classes=10"]
    overrides += ["condition=text", "condition.name=no/encoder", "condition.width=24", "condition.max_length=6"]
    overrides += ["condition.precomputed=true", "model.cross_attention=true", "trainer.max_steps=3"]
    with pytest.raises(ValueError, match=r"data\.fields=\[label,text\]"):
        Run(config(*overrides))
    run = Run(config(*overrides, "data.fields=[label,text]", "trainer.preview_every_steps=3"))
    assert run.fit() is None
    assert list((run.folder / "samples").glob("*.png"))
    with pytest.raises(ValueError, match=r"embeddings of shape \(\d+, 24\), but condition\.width=32"):
        Run(config(*overrides, "run=wider", "condition.width=32", "data.fields=[label,text]"))
