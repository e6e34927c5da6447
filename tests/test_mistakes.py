"""What users get wrong: misspelt names, values of another kind, and combinations that cannot be."""

import functools
import importlib
import random
import re
from importlib.util import find_spec

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf
from test_conf import dit

from dit.command import compose as composing
from dit.command import train
from dit.command.compose import ConfigError, compose, config_dir, jobs

VERBS = {verb: importlib.import_module(f"dit.command.{verb}") for verb in ("train", "sample", "evaluate", "export")}
RECIPES = [
    ("train", ["experiment=digits"]),
    ("train", ["experiment=digits_unet"]),
    ("train", ["experiment=digits_vae"]),
    ("train", ["experiment=imagenet256_dit_xl_2", "data.path=x"]),
    ("train", ["experiment=imagenet256_jit_b_16", "data.path=x", "trainer=fsdp_tp"]),
    ("sample", ["run=digits"]),
    ("evaluate", ["run=digits"]),
    ("export", ["run=digits", "path=x"]),
]
OPTIONS = {group.name: {path.stem for path in group.glob("*.yaml")} for group in config_dir().iterdir()}
NUMBERS = {"key": 90, "group": 10, "option": 25, "prefix": 15, "+": 10, "++": 10, "~": 10, "kind": 30}  # of mistakes
COMPOSED = functools.cache(composing.hydra_compose)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    """A folder with a run, on which the other verbs work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    cfg = compose("train", ["experiment=digits"])
    (tmp_path / "runs" / "digits" / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))


@pytest.fixture
def composed_once(monkeypatch):
    """All mistakes in a recipe are sought in one composition of it, which takes longer than the search."""
    monkeypatch.setattr(composing, "hydra_compose", lambda verb, overrides: COMPOSED(verb, tuple(overrides)))


def checked(verb, overrides):
    """The configuration of a command, composed and checked as the command does it."""
    if hasattr(VERBS[verb], "prepare"):
        VERBS[verb].prepare(overrides)
    [job] = jobs(overrides)
    cfg = compose(verb, job)
    VERBS[verb].check(cfg)
    return cfg


def mistakes(seed):
    """(verb, overrides, the wrong one, the name that was meant if it is misspelt), of each kind so many."""
    rng = random.Random(seed)
    recipes = [(verb, overrides, checked(verb, overrides)) for verb, overrides in RECIPES]
    for kind, number in NUMBERS.items():
        made = 0
        while made < number:
            verb, overrides, cfg = rng.choice(recipes)
            if found := mistake(kind, cfg, rng):
                made += 1
                yield verb, overrides, *found


def mistake(kind, cfg, rng):
    """An override that is wrong, and the name that was meant; None if by chance it is right."""
    keys = composing._keys(cfg)
    groups = sorted(OPTIONS.keys() & cfg.keys())
    key = rng.choice(keys)
    if kind == "~":
        return f"~{key}", None
    if kind == "kind":
        key = rng.choice([k for k in keys if isinstance(OmegaConf.select(cfg, k), bool | int | float | ListConfig)])
        return f"{key}={of_another_kind(OmegaConf.select(cfg, key), rng)}", None
    if kind == "prefix":
        nodes = [name for name in cfg if isinstance(cfg[name], DictConfig)]
        wrong = f"{rng.choice(nodes)}.{key.rpartition('.')[2]}" if nodes else key
        return None if wrong in keys else (f"{wrong}=1", None)
    if kind in ("group", "option"):
        if not groups:
            return None
        group = rng.choice(groups)
        option = rng.choice([option for option in sorted(OPTIONS[group]) if option[0] in LETTERS])
        wrong = misspelt(group if kind == "group" else option, rng)
        if wrong in (OPTIONS if kind == "group" else OPTIONS[group]):
            return None
        return (f"{wrong}={option}", group) if kind == "group" else (f"{group}={wrong}", option)
    wrong = misspelt(key, rng)
    return None if wrong in (*keys, *OPTIONS) else (f"{kind.replace('key', '')}{wrong}=1", key)


def misspelt(name, rng):
    """One letter left out, doubled, replaced, or in the place of the next."""
    at = rng.choice([i for i, letter in enumerate(name) if letter in LETTERS])
    letter, after = name[at], name[at + 1 :]
    how = rng.choice(["drop", "double", "replace", "swap"])
    if how == "swap" and after:
        return name[:at] + after[0] + letter + after[1:]
    return name[:at] + {"drop": "", "replace": rng.choice(LETTERS)}.get(how, 2 * letter) + after


def of_another_kind(value, rng):
    """What cannot stand for a value."""
    if isinstance(value, bool):
        return rng.choice(["perhaps", "2", "[true]"])
    if isinstance(value, int):
        return rng.choice(["fast", "[1,2]", "1.5", "true"])
    return rng.choice(["fast", "[1,2]", "true"] if isinstance(value, float) else ["fast", "5"])


def test_of_200_mistakes_all_are_caught_and_the_name_that_was_meant_is_offered(a_run, composed_once):
    meant, offered = [], []
    for verb, overrides, wrong, name in mistakes(seed=0):
        with pytest.raises(ConfigError, match=re.escape(wrong)) as caught:
            checked(verb, [*overrides, wrong])
        if name:
            meant.append(f"{wrong}: {name}")
            if f"did you mean {name}" in re.sub(r"(mean \S+?)(\?| or .*)$", r"\1", str(caught.value)):
                offered.append(meant[-1])
    assert len(meant) == 145
    assert len(offered) >= 0.95 * len(meant), sorted({*meant} - {*offered})


KEYS_OF_NO_DEFAULT = [
    ("train", "trainer.micro_batch_size=1.5"),
    ("train", "trainer.micro_batch_size=true"),
    ("train", "trainer.keep_every_steps=1.5"),
    ("train", "trainer.keep_every_steps=[1,2]"),
    ("train", "ema.snapshot_every_steps=often"),
    ("train", "objective.max_weight=true"),
    ("train", "optimizer.betas=[0.9]"),
    ("train", "optimizer.betas=[a,b]"),
    ("train", "optimizer.betas=[0.9,1]"),
    ("sample", "strength=true"),
    ("sample", "interpolate_to=1.5"),
    ("export", "step=1.5"),
    ("export", "ema_std=[1,2]"),
]


@pytest.mark.parametrize(("verb", "wrong"), KEYS_OF_NO_DEFAULT)
def test_what_may_be_null_may_not_be_anything(a_run, composed_once, verb, wrong):
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        checked(verb, [*dict(RECIPES[::-1])[verb], wrong])


GAN = ["experiment=digits_vae", "objective=autoencoding_gan", "objective.perceptual.pretrained=false"]
GAN += ["objective.perceptual.name=test_resnet"]
VAE = ["latent=sd_vae", "latent.name=/nowhere", "data.image_size=64", "data.channels=3"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
TENSOR = ["trainer=fsdp_tp", "trainer.accelerator=cpu", "trainer.devices=2"]
LEARNED = ["sampler=ddpm", "sampler.variance=learned", "model.learn_sigma=true"]
LORA = ["adapter=lora", "init=run", "init.path=x"]
FLOW = ["noise=flow", "prediction=v"]
SHORTCUT = ["noise=flow", "prediction=flow", "objective=shortcut", "objective/teacher=data", "model.lands=true"]
EXTRAS = {
    "experiment=digits_vae": "diffusers",
    "objective=autoencoding_gan": "timm",
    "trainer=zero": "deepspeed",
    "adapter=lora": "peft",
}
IMPOSSIBLE = [  # overrides, and both keys as the message names them
    (["trainer.micro_batch_size=256"], "trainer.micro_batch_size=256", "trainer.batch_size=128"),
    (["trainer.nodes=2"], "trainer.nodes=2", "trainer.strategy=single"),
    ([*SHORTCUT, "sampler=flow_map", "weight=v"], "weight= does nothing", "Shortcut"),
    ([*SHORTCUT, "sampler=flow_map", "trainer.lanes=128"], "trainer.lanes=128", "trainer.batch_size=128"),
    ([*TENSOR, "model.num_heads=1"], "trainer.tensor_parallel_size=2", "model.num_heads=1"),
    ([*TENSOR, *LORA], "trainer.tensor_parallel_size=2", "adapter=none"),
    (["adapter=lora"], "adapter=", "init=none"),
    (["experiment=digits_consistency_lora", "init=none"], "adapter=", "init=none"),
    ([*LORA, "adapter.rank=0"], "adapter.rank=0", "at least 1"),
    ([*LORA, "adapter.targets=[qvk]"], "adapter.targets=[qvk]", "attn.qkv"),
    ([*TENSOR, "model=unet_digits"], "trainer.tensor_parallel_size=2", "model UNet"),
    (["experiment=digits_vae", *TENSOR], "trainer.strategy=fsdp", "model AutoencoderKL"),
    (["experiment=digits_vae", "trainer.compile=true"], "trainer.compile=true", "model AutoencoderKL"),
    (GAN, "objective.adversarial_from=50000", "trainer.max_steps=1200"),
    (["trainer.max_steps=100"], "learning_rate.warmup_steps=100", "trainer.max_steps=100"),
    (["trainer.keep_every_steps=700"], "trainer.keep_every_steps=700", "trainer.checkpoint_every_steps=500"),
    (["data.image_size=10"], "model.patch_size=4", "data.image_size"),
    (["condition.dropout=1", "guidance.scale=2"], "condition.dropout=1:", "guidance.scale=1"),
    ([*VAE, "guidance.clip=1"], "guidance.clip=1", "latent.name=/nowhere"),
    ([*VAE, "data.image_size=60"], "latent.size=7", "data.image_size=60"),
    ([*VAE, "metric=likelihood"], "metric=likelihood", "latent=pixels"),
    (["data.encoded=true"], "data.encoded=true", "latent=pixels"),
    ([*VAE, "data.encoded=true", "condition=superresolution"], "the condition reads the image", "data.encoded=true"),
    (["data.fields=[]", "condition=none"], "metric=classifier", "data.fields=[label]"),
    (["noise=flow"], "prediction=eps", "noise.t_max=0.999"),
    (["noise.zero_terminal_snr=true"], "prediction=eps", "noise.zero_terminal_snr=false"),
    (["noise.beta_start=0.5"], "noise.beta_start=0.5", "noise.beta_end=0.02"),
    ([*FLOW, "times=discrete"], "times=discrete", "Flow has no discrete steps"),
    ([*FLOW, "grid=respaced"], "grid=respaced", "Flow has no discrete steps"),
    ([*FLOW, "objective.bound_weight=1"], "objective.bound_weight=1", "noise.num_steps"),
    (["noise=flow", "prediction=x0", "weight=flow"], "objective.max_weight=null", "weight=none"),
    (["sampler.num_steps=2000"], "sampler.num_steps=2000", "noise.num_steps=1000"),
    (["experiment=digits_vae", "weight=min_snr"], "objective=autoencoding", "weight="),
    (["experiment=digits_vae", "objective=denoising"], "objective.weight", "'weight' not found"),
    (["experiment=digits_vae", "data.encoded=true"], "objective=autoencoding", "data.encoded=true"),
    (["experiment=digits_vae", *VAE], "objective=autoencoding", "latent.name=/nowhere"),
]
KNOWN = [  # those that other tests look at, too
    (["trainer.batch_size=100"], "trainer.lanes=8", "trainer.batch_size=100"),
    (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3"], "trainer.batch_size=128", "3 ranks"),
    ([*DDP, "trainer.lanes=1"], "trainer.lanes=1", "2 ranks"),
    (["trainer.micro_batch_size=4"], "trainer.micro_batch_size=4", "trainer.lanes=8"),
    (["trainer.devices=2"], "trainer.devices=2", "trainer.strategy=single"),
    (["trainer.shard=node"], "trainer.shard=node", "trainer.strategy=single"),
    (["trainer.prefetch_units=2"], "trainer.prefetch_units=2", "trainer.strategy=single"),
    ([*DDP, "trainer.reshard_after_forward=false"], "trainer.reshard_after_forward=false", "trainer.strategy=ddp"),
    (["trainer=fsdp", "trainer.offload=true"], "trainer.offload=true", "trainer=fsdp"),
    ([*DDP, "trainer.tensor_parallel_size=2"], "trainer.tensor_parallel_size=2", "trainer.strategy=ddp"),
    ([*TENSOR, "trainer.devices=3"], "trainer.tensor_parallel_size=2", "trainer.devices=3"),
    (["trainer=zero1", "objective=uncertain"], "trainer.strategy=zero1", "the objective"),
    ([*GAN, "objective.adversarial_from=0", "trainer=zero2"], "trainer.strategy=zero2", "the objective"),
    (["experiment=digits_vae", *LORA], "adapter=", "objective=autoencoding"),
    (["model.patch_size=3"], "model.patch_size=3", "input_size=8"),
    (["model.num_heads=5"], "model.num_heads=5", "hidden_size=64"),
    (["model.rope=true", "model.num_heads=32"], "model.rope=true", "model.num_heads=32"),
    (["model.class_tokens=1", "model.class_tokens_from=4"], "model.class_tokens_from=4", "model.depth=4"),
    (["model.class_tokens=4", "condition=none"], "model.class_tokens=4", "condition=label"),
    (["model=unet_digits", "data.image_size=9"], "model.input_size=9", "model.channel_mult"),
    (["model=unet_digits", "model.num_heads=2"], "model.num_heads=2", "model.head_channels=16"),
    (["model=autoencoder_digits", "condition=none"], "model is an autoencoder", "objective=autoencoding"),
    (["condition=text"], "model.cross_attention=false", "condition=text"),
    (["condition=text", "model=dit_digits_text"], "the condition reads caption", "data.fields=[label,caption]"),
    (["condition.num_classes=5"], "condition.num_classes=5", "data.num_classes=10"),
    (["condition=superresolution", "condition.factor=3"], "condition.factor=3", "data.image_size=8"),
    (["condition=superresolution", "guidance.scale=2"], "condition=superresolution", "guidance.scale=1"),
    (["condition=none", "guidance.scale=2"], "condition=none", "guidance.scale=1"),
    (["condition.dropout=0", "guidance.scale=2"], "condition.dropout=0:", "guidance.scale=1"),
    (["guidance.channels=2"], "guidance.channels=2", "latent.channels=1"),
    (["guidance.interval=[2,3]"], "guidance.interval=[2, 3]", "t_max=1"),
    ([*VAE, "data.channels=1"], "latent.in_channels=3", "data.channels=1"),
    (["latent.size=16"], "latent.size=16", "data.image_size=8"),
    (["model.in_channels=4"], "model.in_channels=4", "latent.channels=1"),
    (["data.encoded=true", "data.crop=random"], "data.encoded=true", "data.crop=random"),
    (["data.weights=[1]"], "data.weights=[1]", "data.order=resampled"),
    (["noise=edm", "prediction=edm", "grid.sigma_min=100"], "grid.sigma_min=100", "sigma / alpha, 80"),
    (["objective.bound_weight=1"], "objective.bound_weight=1", "model.learn_sigma=true"),
    (LEARNED, "sampler.variance=learned", "objective.bound_weight=1"),
    (["sampler.variance=large"], "sampler.variance=large", "sampler.eta=1"),
    (["grid=respaced", "sampler.num_steps=2000"], "sampler.num_steps=2000", "noise.num_steps=1000"),
    (["noise=none"], "noise=none", "objective=autoencoding"),
    (["experiment=digits_vae", "sampler=ddim"], "objective=autoencoding", "sampler=none"),
    (["experiment=digits_vae", "condition=label"], "objective=autoencoding", "condition=none"),
    (["experiment=digits_vae", "model=dit_digits"], "objective=autoencoding", "DiT"),
    (["metric=psnr"], "metric=psnr", "condition=superresolution"),
    (["data.held_out=null"], "data.held_out=null", "metric=none"),
    (["init=sit", "init.path=x", "noise=cosine"], "init.path=x", "noise=flow"),
]


@pytest.mark.parametrize(
    ("overrides", "one", "other"), [*IMPOSSIBLE, *(pytest.param(*row, marks=pytest.mark.slow) for row in KNOWN)]
)
def test_what_cannot_be_together_is_refused_by_both_names(
    tmp_path, digits_dir, composed_once, monkeypatch, overrides, one, other
):
    for override, package in EXTRAS.items():
        if any(given.startswith(override) for given in overrides) and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")

    def begins(*_):
        raise AssertionError("nothing was found, and training would begin")

    monkeypatch.setattr("dit.train.run.Run.prepare", begins)
    monkeypatch.setattr("dit.train.launch.launch", begins)
    recipe = [] if overrides[0].startswith("experiment=") else ["experiment=digits"]
    paths = [f"runs_dir={tmp_path}/runs", f"data_dir={digits_dir}", "logger=none"]
    with pytest.raises(ConfigError) as caught:
        train.main(checked("train", [*recipe, *paths, *overrides]))
    assert one in str(caught.value) and other in str(caught.value), caught.value
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    ["trainer.max_stpes=5", "nosie=cosine", "+trainer.max_step=5", "model.depth=1.5", "trainer.keep_every_steps=7"],
)
def test_a_mistake_ends_the_command_in_five_seconds(tmp_path, wrong):
    code, output, _ = dit("train", "experiment=digits", wrong, cwd=tmp_path)  # the first is slower, from a cold disk
    seconds = min(dit("train", "experiment=digits", wrong, cwd=tmp_path)[2] for _ in range(2))
    assert (code, wrong in output, "Traceback" in output) == (2, True, False), output
    assert list(tmp_path.iterdir()) == []
    assert seconds < 5
