import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from PIL import Image
from tiny_encoders import clip

import dit
from dit.command import evaluate, sample
from dit.command.compose import ConfigError, compose
from dit.data.image import encode_png
from dit.model.dit import DiT
from dit.train.judged import alike
from dit.train.run import Run

torch._inductor.config.cpp_cache_precompile_headers = True  # compiling takes minutes here

VARIED = {
    "plain": [],
    "weaker": ["trainer.max_steps=1"],
    "edm": ["noise=edm", "prediction=edm", "sampler.num_steps=3"],
    "unconditional": ["condition=none", "noise=flow", "prediction=flow"],
    "text": [
        *("condition=text", "condition.name=CLIP", "condition.width=64", "condition.max_length=12"),
        *("condition.pooled=true", "model=dit_digits_text", "data.fields=[label,caption]"),
    ],
    "superres": ["condition=superresolution", "condition.factor=2", "trainer.max_steps=60"],
    "inpaint": ["condition=label_inpainting"],
    "power": ["ema=power", "optimizer.lr=0.1"],
    "learned": ["model.learn_sigma=true", "objective.bound_weight=1", "sampler=ddpm", "sampler.variance=learned"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_dir):
    """Tiny runs of several kinds."""
    folder = tmp_path_factory.mktemp("sample") / "runs"
    clip(folder.parent / "clip")
    for name, more in VARIED.items():
        more = [option.replace("CLIP", str(folder.parent / "clip")) for option in more]
        overrides = [
            *("experiment=digits", f"run={name}", f"runs_dir={folder}", f"data_dir={digits_dir}", "metric=none"),
            *("logger=none", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "trainer.max_steps=3"),
            *("data.num_workers=0", "sampler.num_steps=5", "learning_rate.warmup_steps=0", *more),
        ]
        run = Run(compose("train", overrides))
        assert run.fit() is None
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture, masks for it, and things that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (folder / "image.png").write_bytes(encode_png(pixels))
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, 4:] = 255
    (folder / "mask.png").write_bytes(encode_png(mask))
    (folder / "black.png").write_bytes(encode_png(0 * mask))
    (folder / "wide.png").write_bytes(encode_png(mask.repeat(1, 1, 2)))
    (folder / "low.png").write_bytes(encode_png(pixels[:, :4, :4]))
    (folder / "other_low.png").write_bytes(encode_png(pixels[:, 4:, 4:]))
    (folder / "text.png").write_text("no picture")
    return folder


def run_verb(verb, runs, *overrides):
    """Run a verb as the command line does; its configuration."""
    overrides = [f"runs_dir={runs}", "accelerator=cpu", *overrides]
    verb.prepare(overrides)
    cfg = compose(verb.__name__.rpartition(".")[2], overrides)
    verb.check(cfg)
    assert verb.main(cfg) == 0
    return cfg


def draw(runs, *overrides):
    """What `dit sample` writes."""
    cfg = run_verb(sample, runs, *overrides)
    return Path(cfg.out) if cfg.out else runs / cfg.run / "samples" / f"seed-{cfg.seed}.png"


def drawn(path, number, zoom=6):
    """The pixels of the images of one row, (N, 8, 8)."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture)).long()
    gap = 8 * zoom + max(1, 8 * zoom // 24)
    return torch.stack([pixels[: 8 * zoom : zoom, i * gap : i * gap + 8 * zoom : zoom] for i in range(number)])


SAMPLERS = ["ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp", "dpmpp_sde", "unipc"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_command_writes_the_same_bytes(runs, sampler, tmp_path):
    command = ("run=plain", f"sampler={sampler}", "sampler.num_steps=5", "guidance.scale=2", "labels=[0,1,2,3]")
    first, second, other = (
        draw(runs, *command, "num_images=16", f"seed={seed}", f"out={tmp_path}/{i}.png").read_bytes()
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == second != other
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.size == (4 * 48 + 3 * 2, 4 * 48 + 3 * 2)  # a column a class


def test_a_run_draws_as_it_was_configured_unless_told_otherwise(runs):
    sample.prepare([f"runs_dir={runs}", "run=edm"])
    cfg = compose("sample", [f"runs_dir={runs}", "run=edm"])
    assert cfg.sampler.num_steps == 3 and cfg.grid._target_.endswith("karras")
    cfg = compose("sample", [f"runs_dir={runs}", "run=edm", "sampler=ddpm", "grid=evenly"])
    assert cfg.sampler.num_steps == 250 and cfg.grid._target_.endswith("evenly")


def test_compiled_it_draws_the_same(runs, tmp_path):
    """By `dit.load`, `dit sample` and `dit evaluate`, which says so."""
    label, out = [i % 10 for i in range(20)], tmp_path / "all.jsonl"
    guided = ("run=plain", "guidance.scale=2")
    judging = ("metric=fid", "extractor=small", "num_samples=20", f"out={out}")
    latents, pixels = [], []
    for compile in (False, True):
        before = torch._dynamo.utils.counters["frames"]["ok"]
        latents.append(dit.load(runs / "plain", compile=compile).latents(label=label, guidance=2.0))
        words = ["compile=true"] if compile else []
        picture = draw(runs, *guided, *words, "num_images=20", f"out={tmp_path}/{compile}.png")
        pixels.append(drawn(picture, 10))
        run_verb(evaluate, runs, *guided, *words, *judging)
        assert (torch._dynamo.utils.counters["frames"]["ok"] > before) == compile
    assert (latents[1] - latents[0]).abs().max() <= 1e-5 * latents[0].abs().max()
    assert (pixels[1] - pixels[0]).abs().max() <= 1  # what lies between two levels
    plain, compiled = (json.loads(line) for line in out.read_text().splitlines())
    assert compiled["settings"] == plain["settings"] | {"compile": True}
    assert alike(compiled["settings"]) == alike(plain["settings"])
    assert compiled["figures"] == pytest.approx(plain["figures"], rel=1e-3)


def test_what_cannot_be_compiled(runs, monkeypatch):
    with pytest.raises(ConfigError, match="compile=max: expected true or false"):
        draw(runs, "run=plain", "compile=max")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda_graphs=true needs a GPU"):
            draw(runs, "run=plain", "cuda_graphs=true")
    with pytest.raises(ValueError, match="compile='max': give True or False"):
        dit.load(runs / "plain", compile="max")
    monkeypatch.setattr(DiT, "units", ())
    with pytest.raises(ConfigError, match=r"^compile=true: model DiT names no units to compile"):
        draw(runs, "run=plain", "compile=true")
    with pytest.raises(ValueError, match=r"^compile=true: model DiT names no units to compile"):
        dit.load(runs / "plain", compile=True)


def test_in_bfloat16_it_draws_nearly_the_same(runs, tmp_path):
    """What autocast makes of the float32 weights, by `dit.load`, `dit sample` and `dit evaluate`, which says so."""
    label, out = [i % 10 for i in range(20)], tmp_path / "all.jsonl"
    guided = ("run=power", "guidance.scale=2")
    wide, narrow, compiled = (
        dit.load(runs / "power", **options)
        for options in ({}, {"precision": "bfloat16"}, {"precision": "bfloat16", "compile": True})
    )
    exact, rounded = (model.latents(label=label, guidance=2.0) for model in (wide, narrow))
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded, wide.latents(label=label, guidance=2.0))
    again = compiled.latents(label=label, guidance=2.0)
    assert (again - rounded).abs().max() < 0.05 * exact.abs().max()
    draw(runs, *guided, "precision=bfloat16", "num_images=20", f"out={tmp_path}/narrow.png")
    assert torch.equal(drawn(tmp_path / "narrow.png", 10), narrow.sample(label=label, guidance=2.0)[:10, 0].long())
    for precision in ("float32", "bfloat16"):
        judging = ("metric=fid", "extractor=small", "num_samples=20", f"out={out}")
        run_verb(evaluate, runs, *guided, f"precision={precision}", *judging)
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert told[1]["settings"] == told[0]["settings"] | {"precision": "bfloat16"}  # of the same weights
    assert told[1]["figures"] == pytest.approx(told[0]["figures"], rel=0.05)
    assert told[1]["figures"] != told[0]["figures"]


@pytest.mark.parametrize(
    "options",
    [
        ["run=edm", "guidance.scale=2"],
        ["run=text", "prompt=a seven"],
        ["run=plain", "guidance=autoguidance", "guidance.weak.run=weaker"],
        ["run=plain", "sampler=unipc", "compile=true"],
    ],
)
def test_bfloat16_goes_with_the_rest(runs, options, tmp_path):
    exact, rounded = (
        drawn(draw(runs, *options, f"precision={precision}", f"out={tmp_path}/{precision}.png", "num_images=10"), 10)
        for precision in ("float32", "bfloat16")
    )
    assert (rounded - exact).abs().float().mean() < 5


def test_there_is_no_other_precision(runs):
    with pytest.raises(ConfigError, match="precision=float16: choose one of float32, bfloat16"):
        draw(runs, "run=plain", "precision=float16")
    with pytest.raises(ValueError, match="precision='half': choose one of float32, bfloat16"):
        dit.load(runs / "plain", precision="half")


def test_raw_and_averaged_weights_differ(runs, tmp_path):
    pictures = [
        draw(runs, "run=plain", f"weights={w}", f"out={tmp_path}/{w}.png").read_bytes() for w in ("ema", "model")
    ]
    assert pictures[0] != pictures[1]


def test_every_average_of_a_run_draws(runs, tmp_path):
    pictures = {
        draw(runs, "run=power", f"weights={w}", f"out={tmp_path}/{w}.png").read_bytes()
        for w in ("ema", "ema_long", "model")
    }
    assert len(pictures) == 3
    with pytest.raises(ConfigError, match="weights=best: choose one of ema, ema_long, model"):
        draw(runs, "run=power", "weights=best")


@pytest.mark.parametrize(
    "options",
    [
        ["guidance=autoguidance", "guidance.weak.run=weaker"],
        ["guidance=autoguidance", "guidance.weak.run=plain", "guidance.weak.step=3", "guidance.weak.weights=ema"],
        ["guidance.scale=30", "guidance.interval=[0.2,0.8]"],
        ["guidance.scale=3", "guidance.rescale=0.7"],
        ["guidance.scale=3", "guidance.clip=1"],
        ["guidance.scale=3", "guidance.dynamic_clip=0.95"],
        ["guidance=dit_parity", "guidance.channels=1", "guidance.scale=3"],
        ["grid=quadratic"],
        ["grid=karras"],
        ["grid=log_snr"],
        ["grid=respaced"],
        ["grid=shifted"],
    ],
    ids=str,
)
def test_every_guidance_and_grid_draws_and_matters(runs, tmp_path, options):
    plain = draw(runs, "run=plain", "weights=model", f"out={tmp_path}/plain.png").read_bytes()
    assert draw(runs, "run=plain", "weights=model", *options, f"out={tmp_path}/a.png").read_bytes() != plain


def test_an_unconditional_run_and_a_learned_variance_draw(runs, tmp_path):
    assert draw(runs, "run=unconditional", "num_images=3", f"out={tmp_path}/u.png").exists()
    with pytest.raises(ConfigError, match=r"labels=\[1\]: run=unconditional is unconditional; leave labels out"):
        draw(runs, "run=unconditional", "labels=[1]")
    with pytest.raises(ConfigError, match="an unconditional model cannot be guided"):
        draw(runs, "run=unconditional", "guidance.scale=2")
    learned = draw(runs, "run=learned", f"out={tmp_path}/l.png").read_bytes()
    assert learned != draw(runs, "run=learned", "sampler.variance=small", f"out={tmp_path}/s.png").read_bytes()


def test_prompts_are_told_and_negative_ones_led_away_from(runs, tmp_path):
    def bytes_of(*options):
        return draw(runs, "run=text", "num_images=4", "weights=model", *options, f"out={tmp_path}/a.png").read_bytes()

    seven, scale = "prompt=a seven", "guidance.scale=3"
    assert bytes_of(seven) == bytes_of("prompt=[a seven]") != bytes_of("prompt=a one") != bytes_of()
    assert bytes_of("prompt=[a seven,a one]") != bytes_of(seven)
    guided = bytes_of(seven, scale)
    assert guided != bytes_of(seven) and bytes_of(seven, scale, "negative_prompt=''") == guided  # nothing told
    assert bytes_of(seven, scale, "negative_prompt=a one") != guided
    # away from what is asked for, guidance leads nowhere
    assert bytes_of(seven, scale, "negative_prompt=a seven") == bytes_of(seven)


def test_a_super_resolution_run_enlarges_a_picture(runs, pictures, tmp_path):
    command = ("run=superres", "num_images=2", "weights=model", f"out={tmp_path}/a.png")
    low = draw(runs, *command, f"image={pictures}/low.png").read_bytes()
    assert draw(runs, *command, f"image={pictures}/low.png", "noise_level=0.2").read_bytes() != low
    assert draw(runs, *command, f"image={pictures}/other_low.png").read_bytes() != low


def test_a_run_trained_to_draw_in_holes_is_told_the_picture(runs, pictures, tmp_path):
    command = ("run=inpaint", "num_images=2", "labels=[1,2]", f"out={tmp_path}/a.png", f"mask={pictures}/mask.png")
    images = drawn(draw(runs, *command, f"image={pictures}/image.png"), 2)
    with Image.open(pictures / "image.png") as file:
        image = torch.from_numpy(np.array(file)).long()
    assert torch.equal(images[:, :, :4], image[:, :4].expand(2, 8, 4)) and not torch.equal(images[0], images[1])


def test_strength(runs, pictures, tmp_path):
    """0 returns the picture, 1 forgets it."""
    command = ("run=plain", "labels=[3]", "num_images=2", f"out={tmp_path}/a.png")
    with Image.open(pictures / "image.png") as file:
        image = torch.from_numpy(np.array(file)).long()
    edit = f"image={pictures}/image.png"
    wide = ("labels=[3,3]",)
    assert torch.equal(drawn(draw(runs, *command, *wide, edit, "strength=0"), 2), image.expand(2, 8, 8))
    forgotten = draw(runs, *command, edit, "strength=1").read_bytes()
    assert forgotten == draw(runs, *command).read_bytes()
    assert draw(runs, *command, edit).read_bytes() != forgotten


@pytest.mark.parametrize("more", [[], ["resample=3"], ["sampler=dpmpp"], ["sampler=ddpm", "strength=0.7"]], ids=str)
def test_inpainting_keeps_the_known_pixels_exactly(runs, pictures, tmp_path, more):
    with Image.open(pictures / "image.png") as file:
        image = torch.from_numpy(np.array(file)).long()
    edit = (f"image={pictures}/image.png", f"mask={pictures}/mask.png", "sampler.num_steps=5", "labels=[1,2]")
    images = drawn(draw(runs, "run=plain", "num_images=2", f"out={tmp_path}/a.png", *edit, *more), 2)
    assert torch.equal(images[:, :, :4], image[:, :4].expand(2, 8, 4))
    assert not torch.equal(images[0, :, 4:], image[:, 4:]) and not torch.equal(images[0], images[1])


def test_outpainting_draws_the_margins(runs, pictures, tmp_path):
    command = ("run=plain", "num_images=2", "labels=[1,2]", f"out={tmp_path}/a.png")
    images = drawn(draw(runs, *command, f"image={pictures}/image.png", "outpaint=[2,2,2,2]"), 2)
    assert torch.equal(images[0, 2:6, 2:6], images[1, 2:6, 2:6]) and not torch.equal(images[0], images[1])
    assert images[0, 2:6, 2:6].float().std() > 0


def test_variation_and_interpolation_begin_at_the_seeds_first_image(runs, tmp_path):
    command = ("run=plain", "num_images=4", "labels=[1,1,1,1]", f"out={tmp_path}/a.png", "weights=model")
    plain, other = (drawn(draw(runs, *command, f"seed={seed}"), 1) for seed in (0, 5))
    between = drawn(draw(runs, *command, "interpolate_to=5"), 4)
    assert (between[0] - plain[0]).abs().max() <= 1 and (between[3] - other[0]).abs().max() <= 1
    near, far = (drawn(draw(runs, *command, f"variation={share}"), 4).float() for share in (0.3, 0.9))
    assert (near - plain[0]).abs().mean() < (far - plain[0]).abs().mean()
    assert not torch.equal(near[0], near[1])
    assert (drawn(draw(runs, *command, "variation=0"), 4) - plain[0]).abs().max() <= 1


@pytest.mark.parametrize("text", ["{{{", "a: 1", "\x89"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken/config\.yaml is damaged"):
        sample.prepare([f"runs_dir={tmp_path}", "run=broken"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "whose weights"),
        (["run=nope"], "no such run; runs in .*: edm, inpaint, learned, plain"),
        (["run=plain", "labels=[10]"], "give whole numbers from 0 to 9"),
        (["run=plain", "labels=[]"], "give whole numbers"),
        (["run=plain", "prompt=a seven"], "prompt=a seven: run=plain is told label, but no caption; leave prompt out"),
        (["run=plain", "negative_prompt=a one"], "run=plain is told no caption"),
        (["run=text", "negative_prompt=a one"], "works by guidance: give guidance.scale=3"),
        (["run=text", "prompt=[]"], "give a caption, like"),
        (["run=text", "prompt=[[a],[b]]"], "prompt=.*: give a caption, or a list of them"),
        (["run=text", "prompt=true"], "prompt=True: give a caption"),
        (["run=text", "negative_prompt=[a,b]"], "negative_prompt=.*: give a caption"),
        (
            ["run=text", "negative_prompt=a", "guidance=autoguidance", "guidance.weak.run=text"],
            "works by guidance=classifier_free alone",
        ),
        (
            ["run=superres", "image=PICTURES/low.png", "noise_level=0.9"],
            "noise_level=0.9 is more than it was",
        ),
        (["run=text", "labels=[1]"], "run=text is told caption, but no label"),
        (["run=plain", "noise_level=0.1"], "is for a super-resolution model"),
        (["run=superres", "noise_level=1.5"], r"noise_level=1.5 must lie in \[0, 1\]"),
        (["run=superres"], "run=superres enlarges pictures: give image=<path>"),
        (["run=superres", "image=PICTURES/image.png"], "8 x 8 pixels, but this model enlarges 4 x 4 to 8 x 8"),
        (["run=superres", "image=PICTURES/wide.png"], "16 x 8 pixels: this run enlarges squares"),
        (["run=superres", "image=PICTURES/low.png", "strength=0.5"], "enlarges image=<path>, and edits none"),
        (["run=superres", "image=PICTURES/low.png", "guidance.scale=2"], "cannot be left out"),
        (["run=inpaint"], "draws in a hole: give image=<path>, and mask=<path>"),
        (["run=inpaint", "image=PICTURES/image.png"], "draws in a hole"),
        (["run=plain", "labels=cat"], "give whole numbers"),
        (["run=plain", "num_images=0"], "num_images=0 must be at least 1"),
        (["run=plain", "sampler.num_steps=0"], "must be at least 1"),
        (["run=plain", "sampler=dimm"], "did you mean ddim"),
        (["run=plain", "guidance.scale=-1"], "guidance.scale=-1"),
        (["run=plain", "weights=best"], "choose one of ema, model"),
        (["run=plain", "sampler.eta=2"], "eta=2"),
        (["run=plain", "out=config.yaml"], r"out=config\.yaml: the picture is a PNG"),
        (["run=plain", "out=/proc/x.png"], r"out=/proc/x\.png cannot be written"),
        (["run=plain", "strength=0.5"], "give image=<path>"),
        (["run=plain", "image=/nowhere.png"], r"image=/nowhere\.png cannot be read"),
        (["run=plain", "image=PICTURES/text.png"], r"text\.png cannot be read"),
        (["run=plain", "image=PICTURES/image.png", "strength=1.5"], r"strength=1\.5"),
        (["run=plain", "image=PICTURES/image.png", "strength=-1"], "strength=-1"),
        (["run=plain", "image=PICTURES/image.png", "strength=half"], "strength=half must be a number"),
        (
            ["run=plain", "image=PICTURES/image.png", "mask=PICTURES/wide.png"],
            r"has \(16, 8\) pixels, but .* has \(8, 8\)",
        ),
        (["run=plain", "image=PICTURES/image.png", "outpaint=[1,2]"], "four margins"),
        (["run=plain", "image=PICTURES/image.png", "outpaint=[4,0,4,0]"], "leave room"),
        (["run=plain", "image=PICTURES/image.png", "outpaint=3"], "four margins"),
        (["run=plain", "image=PICTURES/image.png", "resample=2"], "resample=2 is for mask"),
        (["run=plain", "image=PICTURES/image.png", "mask=PICTURES/mask.png", "outpaint=[1,1,1,1]"], "not both"),
        (["run=plain", "image=1"], "image=1 must be the path"),
        (["run=plain", "image=PICTURES/image.png", "out=PICTURES/image.png"], "would overwrite"),
        (["run=plain", "image=PICTURES/image.png", "mask=PICTURES/black.png"], "nothing in mask=.* is white"),
        (["run=plain", "interpolate_to=1.5"], "interpolate_to=1.5 must be a whole number"),
        (["run=plain", "grid=karras", "grid.rho=1e-300"], "grid.rho=1e-300 must lie"),
        (["run=plain", "sampler.num_steps=10000000"], "at most 100,000"),
        (["run=plain", "variation=2"], r"variation=2 must lie in"),
        (["run=plain", "variation=0.1", "interpolate_to=2"], "not both"),
        (["run=plain", "guidance=autoguidance", "guidance.weak.run=edm"], "another schedule"),
        (
            ["run=plain", "guidance=autoguidance", "guidance.weak.run=weaker", "guidance.weak.step=9"],
            "no checkpoint of step 9",
        ),
        (["run=plain", "guidance=autoguidance"], r"guidance\.weak\.run is not set"),
        (["run=edm", "grid=respaced"], "choose grid=evenly"),
    ],
)
def test_mistakes_are_answered(runs, pictures, overrides, message):
    with pytest.raises(ConfigError, match=message):
        draw(runs, *(override.replace("PICTURES", str(pictures)) for override in overrides))


def judged(runs, *overrides):
    """What `dit evaluate` writes."""
    cfg = run_verb(evaluate, runs, *overrides)
    return json.loads((runs / cfg.run / "evaluation.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("run", ["plain", "edm", "unconditional", "learned"])
def test_likelihood_of_a_run(runs, run):
    steps = ("metric.likelihood.num_steps=10", "metric.likelihood.num_bound_steps=20")
    record = judged(runs, f"run={run}", "metric=likelihood", *steps, "num_samples=30")
    figures = record["figures"]
    assert 0 < figures["bits_per_dim"] < 100 and 0 < figures["bits_per_dim_bound"] < 1e5
    assert figures["bits_per_dim_error"] > 0 and record["settings"]["step"] == 3
    assert record["settings"]["metric"]["likelihood"]["num_steps"] == 10


def test_wrong_figures_leave_nothing(runs):
    for option in ("num_steps=0", "num_probes=0", "num_bound_steps=-1"):
        with pytest.raises(ConfigError, match=rf"metric\.likelihood\.{option} must be at least 1"):
            judged(runs, "run=weaker", "metric=likelihood", f"metric.likelihood.{option}", "num_samples=20")
    assert not (runs / "weaker" / "evaluation.jsonl").exists()


def test_a_run_without_a_metric_asks_for_one(runs):
    with pytest.raises(ConfigError, match="there is no metric for run=plain: choose one"):
        judged(runs, "run=plain")
