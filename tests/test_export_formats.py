"""Every format of `dit export` draws what the run draws, offline, and holds no pickle."""

import copy
import io
import json
import pickletools
import re
import socket
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noted import EXTRACTOR, note
from omegaconf import OmegaConf

import dit
from dit.command import export as command
from dit.command.compose import ConfigError, compose
from dit.data.image import encode_png
from dit.noise.denoiser import Denoiser
from dit.train.build import Parts
from dit.train.exporting import Exporting
from dit.weights import export
from dit.weights.convert import dit_to_diffusers
from dit.weights.manifest import DamagedError

diffusers = pytest.importorskip("diffusers")
SMALL = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "metric=none", "logger=none"]
LABELS = [0, 3, 7]
FLOAT32, BFLOAT16 = 1e-5, 2e-2
IN_RANGE = 5  # the largest value of what is drawn of data, which have unit variance


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No internet, whoever asks."""

    def refuse(*_, **__):
        raise OSError("the tests are offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny VAE of grey images, 2 channels at stride 2, as `experiment=digits_vae` leaves one, with a shift."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    options = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "norm_num_groups": 4}
    shift = {"scaling_factor": 0.8, "shift_factor": 0.3}
    diffusers.AutoencoderKL(block_out_channels=(8, 8), **blocks, **options, **shift).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tmp_path, vae):
    """What a run of an experiment would be after training: its configuration, and weights, which here are random."""

    def of(*overrides, experiment="digits_latent", few_step=None):
        latent = [f"latent.name={vae}"] if experiment == "digits_latent" else []
        cfg = compose("train", [f"experiment={experiment}", *SMALL, *latent, *overrides])
        parts = Parts(cfg)
        generator = torch.Generator().manual_seed(1)
        state = parts.denoiser().network.state_dict()
        weights = {
            name: value if name == "pos_embed" else 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in state.items()
        }
        return SimpleNamespace(cfg=cfg, weights=weights, few_step=few_step, folder=tmp_path / "run")

    return of


def written(run, path, kind, dtype=torch.float32, batch_size=None, whose="ema", **options):
    """The folder that `dit export` writes of a run."""
    weights = {name: value.to(dtype) for name, value in run.weights.items()}
    about = {"format": kind, "precision": str(dtype), "weights": whose, "step": 7, "parameters": 1}
    exporting = Exporting(run.folder, copy.deepcopy(run.cfg), weights, about, run.few_step, **options)
    export.commit(path, lambda to: exporting.write(to, batch_size))
    return path


def denoiser_of(run, dtype=torch.float32):
    denoiser = Parts(run.cfg).denoiser().eval()
    denoiser.network.load_state_dict({name: value.to(dtype).float() for name, value in run.weights.items()})
    return denoiser


def drawn(run, denoiser=None, num_steps=None, x=None, generator=None):
    """What the run's own sampler draws, before it is decoded; begun with noise of unit variance at t_max."""
    parts = Parts(run.cfg)
    pipeline = parts.pipeline(denoiser or denoiser_of(run), parts.latent(), num_steps)
    x = start(run) if x is None else x
    sampler, sigma = pipeline.sampler, parts.schedule(pipeline.times[0]).sigma
    pipeline.sampler = lambda *args, **options: sampler(
        *args, **options | ({"generator": generator} if generator else {})
    )
    asked = {"label": LABELS} if "label" in parts.condition.asks else {}
    return torch.cat(list(pipeline.latents(asked, len(x), noise=(x.double() / sigma).to(x))))


def start(run, seed=5):
    """Noise as DiTPipeline draws it."""
    shape = Parts(run.cfg).latent().shape
    return torch.randn(len(LABELS), *shape, generator=torch.Generator().manual_seed(seed))


def theirs(path, num_steps, scale=1.0, seed=5):
    """What a stock DiTPipeline draws, before it is decoded, in our units; and the pictures."""
    pipeline = diffusers.DiTPipeline.from_pretrained(path)
    assert type(pipeline) is diffusers.DiTPipeline
    pipeline.set_progress_bar_config(disable=True)
    seen, decode = [], pipeline.vae.decode
    pipeline.vae.decode = lambda z: seen.append(z) or decode(z)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        LABELS, guidance_scale=scale, generator=generator, num_inference_steps=num_steps, output_type="pt"
    ).images
    return seen[0] * pipeline.vae.config.scaling_factor, images


def apart(a, b):
    """The greatest difference; relative to the largest value where that is no datum's.

    A random network of eps draws values of some 500, which float32 itself rounds by 3e-5.
    """
    assert a.shape == b.shape and a.std() > 0.1
    largest = b.abs().max().item()
    return (a - b).abs().max().item() / (largest if largest > IN_RANGE else 1)


def pickles(path):
    """The files of a folder, and what is in archives among them, that hold a pickle."""
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        inside = {file.name: file.read_bytes()}
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                inside = {f"{file.name}/{name}": archive.read(name) for name in archive.namelist()}
        for name, data in inside.items():
            named = name.endswith((".pkl", ".pickle", ".bin", ".ckpt"))
            if named or zipfile.is_zipfile(io.BytesIO(data)) or (data[:1] == b"\x80" and _is_pickle(data)):
                yield name


def _is_pickle(data):
    try:
        return any(operation.name == "STOP" for operation, _, _ in pickletools.genops(data))
    except Exception:
        return False


def test_the_search_finds_pickles(tmp_path):
    import pickle

    (tmp_path / "a.json").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert len(list(pickles(tmp_path))) >= 2


# native


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("digits", []),
        ("digits", ["guidance.scale=2", "sampler=dpmpp"]),
        ("digits_teacher", ["sampler=heun"]),
        ("digits_latent", ["guidance.scale=2"]),
        ("digits_unet", ["model.model_channels=16"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_draws_what_the_run_does(trained, tmp_path, experiment, overrides, dtype):
    small = ["metric=none", "logger=none"]
    overrides = [*overrides, "sampler.num_steps=4"]
    run = (
        trained(*overrides, experiment=experiment) if experiment != "digits_unet" else unet(tmp_path, small, overrides)
    )
    path = written(run, tmp_path / "out", "native", dtype)
    model = dit.load(path)
    x = start(run)
    sigma = Parts(run.cfg).schedule(Parts(run.cfg).grid(Parts(run.cfg).schedule)[0]).sigma
    noise = (x.double() / sigma).to(x)
    found = model.latents(label=LABELS, noise=noise)
    assert apart(found, drawn(run, denoiser_of(run, dtype))) <= FLOAT32
    assert dtype == torch.float32 or apart(found, drawn(run)) <= BFLOAT16
    images = model.sample(label=LABELS, seed=3)
    assert images.dtype == torch.uint8 and images.shape == (3, 1, 8, 8) and not list(pickles(path))
    assert torch.equal(images[:2], model.sample(label=LABELS[:2], seed=3))
    assert torch.equal(model.sample(2, label=3, seed=3), model.sample(label=[3, 3], seed=3))


def unet(tmp_path, small, overrides):
    cfg = compose("train", ["experiment=digits_unet", *small, *overrides])
    generator = torch.Generator().manual_seed(1)
    state = Parts(cfg).denoiser().network.state_dict()
    weights = {name: 0.05 * torch.randn(v.shape, generator=generator) for name, v in state.items()}
    return SimpleNamespace(cfg=cfg, weights=weights, few_step=None, folder=tmp_path / "run")


def test_large_weights_are_several_files(trained, tmp_path):
    run = trained(experiment="digits")
    path = written(run, tmp_path / "out", "native", most_bytes=100_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"].keys() == run.weights.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in run.weights.values())
    assert all(file.stat().st_size < 1.2e5 + 4 * 32 * 192 for file in path.glob("*.safetensors"))
    whole = written(run, tmp_path / "whole", "native")
    assert torch.equal(dit.load(path).sample(label=LABELS), dit.load(whole).sample(label=LABELS))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "README.md", "manifest.json", "vae/config.json"])
@pytest.mark.parametrize("how", ["missing", "changed"])
def test_a_damaged_export_is_refused(trained, tmp_path, file, how):
    path = written(trained("sampler.num_steps=1"), tmp_path / "runs" / "out", "native")
    if how == "missing":
        (path / file).unlink()
    else:
        data = bytearray((path / file).read_bytes())
        data[-3] ^= 1
        (path / file).write_bytes(data)
    with pytest.raises((DamagedError, ValueError), match=r"out.* (anew|again)") as error:
        dit.load(path)
    if file != "config.json" or how == "missing":
        assert error.value.exit_code == 4
    command = [sys.executable, "-m", "dit", "sample", f"runs_dir={tmp_path}/runs", "run=out", "num_images=1"]
    if file == "model.safetensors":
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 4 and "out" in done.stderr and "Traceback" not in done.stderr


WRONG_LABELS = ["a", 10, -2, 0.5, True, None]
WRONG_NUMBERS = [
    *[("num_steps", value) for value in (2.5, 0, -1, "x")],
    *[("num_images", value) for value in (2.5, 0, -1, True)],
    *[("guidance", value) for value in ("x", -1, float("nan"), float("inf"))],
    *[("seed", value) for value in (-1, 0.5, None)],
    ("batch_size", 0),
]
NAN = torch.full((1, 1, 8, 8), float("nan"))
LARGE = torch.full((1, 1, 8, 8), 1e300, dtype=torch.float64)
WRONG_NOISE = [torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8, dtype=torch.int), 1]


def test_what_is_asked_of_a_model_and_cannot_be(trained, tmp_path):
    model = dit.load(written(trained("sampler.num_steps=2", experiment="digits"), tmp_path / "out", "native"))
    for asked, message in [
        ({}, "label is what this is told"),
        ({"label": [0], "caption": ["a"]}, "caption: this is told label"),
        ({"label": [0, 1], "num_images": 3}, "different numbers of images are asked for: 2, 3"),
        ({"label": []}, r"label=\[\] asks for nothing"),
        ({"label": 0, "noise_level": 0.1}, "noise_level: this is told label"),
        *[({"label": label}, f"{re.escape(str([label]))}: give whole numbers from 0 to 9") for label in WRONG_LABELS],
        *[({"label": 0, name: value}, f"{name}={value!r}: give a") for name, value in WRONG_NUMBERS],
        *[({"label": 0, "noise": noise}, r"noise=.*: give torch.randn\(1, 1, 8, 8\)") for noise in WRONG_NOISE],
        *[
            ({"label": 0, "noise": noise}, "noise= is not finite everywhere: give torch.randn")
            for noise in (NAN, LARGE)
        ],
        ({"label": 0, "guidance": 1e38}, r"drawn with num_steps=2, guidance=1e\+38 is not finite: give a smaller"),
    ]:
        for draw in (model.sample, model.latents):
            with pytest.raises(ValueError, match=message):
                draw(**asked)
    with pytest.raises(ValueError, match="no such run"):
        dit.load(tmp_path / "nowhere")
    guided, other = model.sample(label=LABELS, guidance=3.0), model.sample(label=LABELS, num_steps=5)
    assert not torch.equal(guided, model.sample(label=LABELS)) and not torch.equal(guided, other)


def test_what_is_asked_of_a_model_in_other_types(trained, tmp_path):
    model = dit.load(written(trained("sampler.num_steps=2", experiment="digits"), tmp_path / "out", "native"))
    noise = torch.randn(2, 1, 8, 8).bfloat16()
    for label in (np.array([0, 1]), range(2), (np.int64(0), 1), np.array([0, 1], dtype=np.uint8), torch.arange(2)):
        for same in (noise, noise.float(), noise.double()):
            assert torch.equal(model.latents(label=label, noise=same), model.latents(label=[0, 1], noise=noise))
    with pytest.raises(ValueError, match=r"label=\[0\.5\]: give whole numbers"):
        model.sample(label=np.array([0.5]))


def test_a_picture_is_for_all_or_for_each(trained, tmp_path):
    run = trained("sampler.num_steps=2", experiment="digits_superres")
    model = dit.load(written(run, tmp_path / "out", "native"))
    low = torch.randint(256, (1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.sample(3, low_resolution=low), model.sample(low_resolution=low.repeat(3, 1, 1, 1)))
    assert torch.equal(model.sample(3, low_resolution=low), model.sample(3, low_resolution=low.numpy()))
    with pytest.raises(ValueError, match=r"noise_level='x': give a number of at least 0, like noise_level=0\.1"):
        model.sample(low_resolution=low, noise_level="x")


def test_two_lines_start_within_five_seconds(trained, tmp_path):
    path = written(trained("sampler.num_steps=1", experiment="digits"), tmp_path / "out", "native")
    code = f"import dit; model = dit.load({str(path)!r})\nimport time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 5


# diffusers

STOCK = [
    (["noise=linear", "prediction=eps", "sampler=ddim", "sampler.num_steps=20"], "DDIMScheduler"),
    (
        ["noise=linear", "prediction=eps", "sampler=ddim", "sampler.num_steps=50", "model.learn_sigma=true"],
        "DDIMScheduler",
    ),
    (["sampler=ddim", "sampler.num_steps=10"], "DDIMScheduler"),
    (["noise=scaled_linear", "noise.zero_terminal_snr=true", "sampler=ddim", "sampler.num_steps=10"], "DDIMScheduler"),
    (["noise=sigmoid", "sampler=dpmpp", "sampler.num_steps=20"], "DPMSolverMultistepScheduler"),
    (["sampler=unipc", "sampler.num_steps=10"], "UniPCMultistepScheduler"),
    (["sampler=ddim", "sampler.num_steps=125", "model.closed_frequencies=true"], "DDIMScheduler"),
    (["noise=flow", "prediction=flow", "sampler=euler", "sampler.num_steps=7"], "FlowMapEulerDiscreteScheduler"),
    (["noise=flow", "prediction=flow", "sampler=euler", "grid=shifted"], "FlowMapEulerDiscreteScheduler"),
]


@pytest.mark.parametrize(("overrides", "name"), STOCK)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_stock_pipeline_draws_what_the_run_does(trained, tmp_path, overrides, name, scale):
    run = trained(*overrides, f"guidance.scale={scale}")
    path = written(run, tmp_path / "out", "diffusers")
    assert {file.name for file in path.iterdir()} == {
        *("model_index.json", "transformer", "scheduler", "vae", "config.json", "README.md", "manifest.json"),
    }
    latents, images = theirs(path, run.cfg.sampler.num_steps, scale)
    ours = drawn(run)
    shift = Parts(run.cfg).latent().shift
    assert shift > 0.1  # is in the VAE
    assert apart(latents, ours) <= FLOAT32
    decoded = (Parts(run.cfg).latent().decode(ours) / 2 + 0.5).clamp(0, 1)
    assert (decoded - images).abs().max() <= FLOAT32
    scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == name and not list(pickles(path))
    card = (path / "README.md").read_text()
    assert f"guidance_scale={scale:g}, num_inference_steps={run.cfg.sampler.num_steps})" in card and "exact in" in card


@pytest.mark.parametrize("closed", ["false", "true"])
def test_a_stock_pipeline_of_half_the_bytes(trained, tmp_path, closed):
    """Theirs has its table of positions in float32, and a fitted embedder of time is rounded once more."""
    run = trained("sampler=ddim", "sampler.num_steps=10", f"model.closed_frequencies={closed}")
    path = written(run, tmp_path / "out", "diffusers", torch.bfloat16)
    whole = written(run, tmp_path / "whole", "diffusers")
    half, full = ((p / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size for p in (path, whole))
    assert half < 0.6 * full
    latents, _ = theirs(path, 10)
    assert apart(latents, drawn(run, denoiser_of(run, torch.bfloat16))) <= BFLOAT16


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["noise=linear", "prediction=eps", "sampler=ddpm", "grid=respaced"], "DDPMScheduler"),
        (["sampler=ddpm", "sampler.variance=large", "grid=respaced"], "DDPMScheduler"),
        (["sampler=ddpm"], "DDPMScheduler"),
        (["sampler=dpmpp_sde"], "DPMSolverMultistepScheduler"),
    ],
)
def test_a_stock_pipeline_of_a_sampler_that_draws_noise(trained, tmp_path, overrides, name):
    """Which is the same where it is given the same; when guided it draws for two halves."""
    run = trained(*overrides, "sampler.num_steps=20")
    path = written(run, tmp_path / "out", "diffusers")
    torch.manual_seed(9)
    latents, _ = theirs(path, 20)
    assert apart(latents, drawn(run, generator=torch.Generator().manual_seed(9))) <= FLOAT32
    assert json.loads((path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == name


def few(method, sampler, steps):
    return {"method": method, "sampler": sampler, "steps": steps, "guidance": 1.0}


STUDENTS = [
    (["prediction=v", "sampler=consistency"], few("consistency", "consistency", None), (1, 2, 4), "LCMScheduler"),
    (["noise=linear", "prediction=eps", "sampler=ddim"], few("progressive", "ancestral", [1, 2, 4]), (1, 2, 4), "DDIM"),
    (["noise=flow", "prediction=flow", "sampler=euler"], few("reflow", None, None), (1, 2, 4), "FlowMapEuler"),
    (["noise=flow", "prediction=flow", "sampler=consistency"], few("dmd", "consistency", [1]), (1,), "FlowMapEuler"),
]


@pytest.mark.parametrize(("overrides", "few_step", "steps", "name"), STUDENTS)
def test_students_with_their_stock_scheduler(trained, tmp_path, overrides, few_step, steps, name):
    run = trained(*overrides, "sampler.num_steps=1", few_step=few_step)
    path = written(run, tmp_path / "out", "diffusers")
    scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"].startswith(name)
    for n in steps:
        torch.manual_seed(9)
        latents, _ = theirs(path, n)
        ours = drawn(run, num_steps=n, generator=torch.Generator().manual_seed(9))
        assert apart(latents, ours) <= FLOAT32, n


@pytest.mark.parametrize(
    ("experiment", "overrides", "why"),
    [
        ("digits", [], "not pixels"),
        ("digits", ["noise=edm", "prediction=edm", "sampler=heun"], "not pixels"),
        ("digits_latent", ["sampler=ddim", "sampler.num_steps=250"], "model.closed_frequencies=true"),
        ("digits_latent", ["model.qk_norm=true"], "q_norm"),
        ("digits_latent", ["model.rope=true"], "plain DiT"),
        ("digits_latent", ["noise=edm", "prediction=edm", "sampler=heun"], "no scheduler for noise=edm"),
        ("digits_latent", ["sampler=heun"], "no scheduler for sampler=heun"),
        ("digits_latent", ["sampler=ddim", "sampler.num_steps=7"], "which do not divide 1000"),
        ("digits_latent", ["guidance.scale=2", "guidance.rescale=0.7"], "classifier_free alone"),
        ("digits_latent", ["sampler=ddpm", "sampler.variance=large", "sampler.num_steps=4"], "variance=large"),
        ("digits_latent", ["sampler=ddpm", "sampler.eta=0.5", "sampler.num_steps=4"], "eta=0.5"),
    ],
)
def test_what_diffusers_has_no_parts_for_has_a_pipeline_of_ours(trained, tmp_path, capsys, experiment, overrides, why):
    steps = [] if any("num_steps" in override for override in overrides) else ["sampler.num_steps=4"]
    run = trained(*overrides, *steps, experiment=experiment)
    path = written(run, tmp_path / "out", "diffusers")
    assert why in capsys.readouterr().out
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, trust_remote_code=True)
    x = start(run)
    parts = Parts(run.cfg)
    noise = (x.double() / parts.schedule(parts.grid(parts.schedule)[0]).sigma).to(x)
    found = pipeline(LABELS, latents=noise, output_type="latent").images
    if run.cfg.sampler.get("eta", 0) == 0:
        assert apart(found, drawn(run)) <= FLOAT32
    [first, *_] = pipeline(LABELS, seed=2).images
    assert first.size == (8, 8) and not list(pickles(path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(path)


@pytest.mark.parametrize("overrides", [STOCK[0][0], STOCK[7][0]])
def test_dit_loads_its_diffusers_folder_again(trained, tmp_path, overrides):
    run = trained(*overrides, "guidance.scale=2")
    path = written(run, tmp_path / "out", "diffusers")
    parts = Parts(run.cfg)
    x = start(run)
    noise = (x.double() / parts.schedule(torch.tensor(parts.schedule.t_max, dtype=torch.float64)).sigma).to(x)
    assert apart(dit.load(path).latents(label=LABELS, noise=noise), drawn(run)) <= FLOAT32


# programs


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [("digits", []), ("digits_teacher", ["model.rope=true", "model.qk_norm=true"]), ("digits_latent", [])],
)
def test_a_program_draws_what_the_run_does(trained, tmp_path, experiment, overrides, batch_size):
    run = trained(*overrides, "sampler.num_steps=4", experiment=experiment)
    path = written(run, tmp_path / "out", "pt2", batch_size=batch_size)
    assert not list(pickles(path))
    with pytest.raises(ValueError, match=r"a program, which torch\.export\.load reads, .* with format=native"):
        dit.load(path)
    network = torch.export.load(path / "network.pt2").module()
    ours = Parts(run.cfg).denoiser()
    assert apart(drawn(run, denoiser=Shell(network, ours)), drawn(run)) <= FLOAT32
    x = torch.randn(1, *Parts(run.cfg).latent().shape)
    if batch_size is None:
        assert network(x, torch.zeros(1), label=torch.zeros(1, dtype=torch.long)).shape[0] == 1
    else:
        with pytest.raises(Exception, match=r"(?i)guard|shape|size"):
            network(x, torch.zeros(1), label=torch.zeros(1, dtype=torch.long))


class Shell(Denoiser):
    """A denoiser of another network."""

    def __init__(self, network, like):
        super().__init__(torch.nn.Identity(), like.schedule, like.prediction)
        self.register_parameter("place", torch.nn.Parameter(torch.zeros(1)))
        self.network = network


@pytest.mark.parametrize("batch_size", [None, 3])
def test_onnx_draws_what_the_run_does(trained, tmp_path, batch_size):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = trained("sampler.num_steps=4", "noise=cosine", "prediction=v", experiment="digits")
    path = written(run, tmp_path / "out", "onnx", batch_size=batch_size)
    session = onnxruntime.InferenceSession(path / "network.onnx")

    class Network(torch.nn.Module):
        def forward(self, x, time, label):
            [f] = session.run(None, {"x": x.numpy(), "time": time.numpy(), "label": label.numpy()})
            return torch.from_numpy(f)

    assert apart(drawn(run, denoiser=Shell(Network(), Parts(run.cfg).denoiser())), drawn(run)) <= FLOAT32
    assert not list(pickles(path))


def test_the_card_says_what_matters(trained, tmp_path):
    run = trained("sampler.num_steps=4", "guidance.scale=2", experiment="digits")
    run.folder.mkdir()
    settings = {"step": 7, "metric": {"bits": {}}, "extractors": {"bits": EXTRACTOR}}
    settings["reference"] = {"training_images": "89ab", "rows": 9}
    settings |= {
        group: OmegaConf.to_container(run.cfg[group], resolve=True) for group in ("sampler", "grid", "guidance")
    }
    records = [note(run.folder, {"bits": 3.5}, **settings)]
    guided = {"_target_": "dit.sampler.guidance.ClassifierFree", "_partial_": True, "scale": 7.0, "interval": None}
    records += [note(run.folder, {"bits": 9.5}, **{**settings, "guidance": guided})]
    note(run.folder, {"bits": 1.5}, **{**settings, "step": 6})  # of other weights
    (run.folder / "samples").mkdir()
    pictures = {name: encode_png(torch.full((1, 2, 2), 9 * i, dtype=torch.uint8)) for i, name in enumerate("5a9")}
    for name, picture in {**pictures, "6": b""}.items():  # nothing is a picture, and a is no step
        (run.folder / "samples" / f"step-{name:0>8}.png").write_bytes(picture)
    path = written(run, tmp_path / "out", "native", licence="apache-2.0")
    card = (path / "README.md").read_text()
    for said in ("license: apache-2.0", "samples.png", "7 steps of"):
        assert said in card
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("| ")]
    tables = [line for line in lines if len(line) > 2 and "---" not in line]
    [columns, *rows] = tables
    rows = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [(row["bits"], row["guidance"], row["guided by"]) for row in rows] == [
        ("3.5", "2", "ClassifierFree rescale=0"),
        ("9.5", "7", "ClassifierFree"),
    ]
    named = "ancestral with eta 0 (DDIM, Euler)"
    assert f"| sampler | {named}, 4 steps, grid evenly |" in card
    same = {"weights": "ema", "step": "7", "samples": "20", "sampler": f"{named} variance=small", "steps": "4"}
    seen = {"extractor": "small-64-0 (01234567)", "reference": "training_images=89ab rows=9", "grid": "evenly"}
    assert all((same | seen).items() <= row.items() for row in rows)
    kept = json.loads((path / "config.json").read_text())["evaluations"]
    assert [record["figures"] for record in kept] == [{"bits": 3.5}, {"bits": 9.5}]
    assert kept == records and "_target_" not in card
    assert "| function evaluations | 8 |" in card and "ClassifierFree of scale 2" in card and "digits/train" in card
    assert (path / "samples.png").read_bytes() == pictures["5"]
    other = written(run, tmp_path / "other", "native", whose="model")  # which drew none of the pictures
    assert "not stated" in (other / "README.md").read_text() and not (other / "samples.png").exists()


@pytest.mark.parametrize("convention", ["published", "diffusers_dit"])
def test_published_weights_are_exported_and_sampled(trained, tmp_path, convention):
    """In files of either kind; an experiment says what they are of."""
    whole = [override for override in SMALL if not override.startswith("model.")]
    run = trained("model.hidden_size=64", "model.depth=4", "model.num_heads=4", *whole, experiment="digits")
    published = tmp_path / "DiT-S.pt"
    if convention == "published":
        torch.save({"ema": run.weights}, published)
    else:
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=1,
            num_layers=4,
            sample_size=8,
            patch_size=4,
            num_embeds_ada_norm=10,
        )
        model.load_state_dict(dit_to_diffusers(run.weights))
        model.save_pretrained(published / "transformer")
    overrides = ["run=dit_s", f"published={published}", "recipe=digits", f"convention={convention}"]
    cfg = compose("export", [*overrides, f"path={tmp_path}/exports/dit_s"])
    command.check(cfg)
    assert command.main(cfg) == 0
    x = start(run)
    found = dit.load(tmp_path / "exports" / "dit_s").latents(label=LABELS, noise=(x.double() / 0.99998).to(x))
    assert apart(found, drawn(run)) <= 1e-3  # 0.99998 is rounded
    about = (tmp_path / "exports" / "dit_s" / "config.json").read_text()
    assert str(tmp_path) not in about and '"published": "DiT-S.pt"' in about
    with pytest.raises(ConfigError, match="leave weights=, step= and ema_std= out"):
        command.check(compose("export", [*overrides, f"path={tmp_path}/other", "step=3"]))
    with pytest.raises(ConfigError, match=r"DiT-S.pt: give the experiment with its network, like recipe="):
        command.check(compose("export", [*overrides, f"path={tmp_path}/other", "recipe=null"]))
    with pytest.raises(ConfigError, match="convention=run: choose one of"):
        command.check(compose("export", [*overrides, f"path={tmp_path}/other", "convention=run"]))
    for given in ("recipe=digits", "convention=sit"):
        with pytest.raises(ConfigError, match=f"{given} is that of published weights: give published="):
            command.check(compose("export", ["run=x", f"path={tmp_path}/other", given]))


def test_push_uploads_what_was_written(tmp_path):
    from dit.weights.push import push

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            assert (repo, private, exist_ok) == ("me/digits", True, True)

        def upload_folder(self, repo_id, folder_path):
            return f"https://hub/{repo_id} of {folder_path}"

    assert push(tmp_path, "me/digits", Hub()) == f"https://hub/me/digits of {tmp_path}"
    with pytest.raises(ValueError, match=r"push=me/digits: the hub did not take .* log in with"):
        push(tmp_path, "me/digits", SimpleNamespace(create_repo=lambda *_, **__: 1 / 0))
