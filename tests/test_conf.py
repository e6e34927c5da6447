import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dit.command.compose import ConfigError, compose, config_dir, jobs
from dit.command.train import check

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
GROUPS = {
    f"{path.parent.relative_to(config_dir())}={path.stem}"
    for path in config_dir().glob("*/*.yaml")
    if path.parent.name != "experiment"
}


def dit(*arguments, cwd=None):
    """Run the command; (exit code, output, seconds)."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "dit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - began


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_is_headed(experiment):
    needs_data = [] if experiment.startswith("digits") else ["data.path=x"]
    cfg = compose("train", [f"experiment={experiment}", *needs_data])
    check(cfg)
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.run == experiment
    head = (config_dir() / "experiment" / f"{experiment}.yaml").read_text()
    assert f"# dit train experiment={experiment}" in head
    assert "ot yet run" in head or "ccuracy" in head or "PSNR" in head


BASES = {"model=dit", "model=unet", "model=jit", "model=lightning_dit", "trainer=base"}


@pytest.mark.parametrize("choice", sorted(GROUPS - BASES))
def test_every_option_of_every_group_composes(choice):
    more = {f"data={name}": ["data.path=x"] for name in ("shards", "latents", "pairs", "webdataset")}
    more["extractor=timm"] = ["extractor.model=x"]
    more["guidance=autoguidance"] = ["guidance.weak.run=x"]
    more["learning_rate=stages"] = more["ema=before"] = ["objective=progressive", "objective.teacher.run=x"]
    if choice.startswith("init=") and choice != "init=none":
        more[choice] = ["init.path=x"]
    if choice.removeprefix("objective=") in (
        "consistency",
        "continuous_consistency",
        "guidance_distillation",
        "dmd",
        "dmd_gan",
        "ladd",
        "meanflow",
        "progressive",
        "shortcut",
    ):
        more[choice] = ["objective.teacher.run=x"]
    compose("train", ["experiment=digits", choice, *more.get(choice, [])])


def test_the_canonical_recipe():
    cfg = compose("train", ["experiment=imagenet256_dit_xl_2", "data.path=x"])
    assert (cfg.objective.bound_weight, cfg.model.learn_sigma, cfg.sampler.variance) == (1, True, "learned")
    assert cfg.grid._target_.endswith("respaced") and cfg.sampler.num_steps == 250
    assert cfg.optimizer._target_ == "torch.optim.AdamW" and cfg.optimizer.lr == 1e-4
    assert (cfg.optimizer.weight_decay, list(cfg.optimizer.betas)) == (0, [0.9, 0.999])
    assert (cfg.ema.decay, cfg.trainer.batch_size, cfg.trainer.max_steps) == (0.9999, 256, 400_000)
    assert (cfg.trainer.max_grad_norm, cfg.learning_rate.warmup_steps, cfg.condition.dropout) == (None, 0, 0.1)
    assert (cfg.noise.beta_start, cfg.noise.beta_end, cfg.latent.scale, cfg.latent.size) == (1e-4, 0.02, 0.18215, 32)
    assert cfg.times._target_.endswith("discrete") and cfg.data.flip


def test_a_schedule_brings_its_times_unless_told_otherwise():
    def targets(*overrides):
        cfg = compose("train", ["experiment=digits", *overrides])
        return cfg.times._target_.split(".")[-1], cfg.grid._target_.split(".")[-1]

    assert targets() == ("discrete", "evenly")
    assert targets("noise=edm") == ("log_normal", "karras")
    assert targets("noise=flow") == ("uniform", "evenly")
    assert targets("noise=edm", "times=logit_normal") == ("logit_normal", "karras")


WRONG = {
    "nosie=cosine": "nosie=cosine: there is no key nosie; did you mean noise",
    "model.dpeth=3": r"model.dpeth=3: there is no key model.dpeth; did you mean model.depth",
    "noise=cosin": "noise=cosin: no such option; did you mean cosine?",
    "optimizer.lr=fast": "optimizer.lr=fast: expected a number, like optimizer.lr=0.004",
    "optimizer.lr=-1": "optimizer.lr=-1 must be greater than 0",
    "trainer.max_steps=0": "trainer.max_steps=0 must be at least 1",
    "trainer.max_steps=1.5": "expected a whole number",
    "sampler.num_steps=0": "sampler.num_steps=0 must be at least 1",
    "+model.foo=1": "+model.foo=1: there is no key model.foo",
    "++foo=1": "there is no key foo",
    "~model.depth": "keys cannot be deleted",
    "~model": "a group is chosen, not added or deleted",
    "model=5": "model=5: no such option",
    "model.hidden_size=null": "expected a whole number",
    "data.flip=perhaps": "expected true or false",
    "seed=1,2": "add -m",
    "foo": "cannot read 'foo'",
    "run=../elsewhere": "a run's name is a folder's name",
    "run=-x": "after a letter or digit",
    "run=ünï": "quote special characters",
    "optimizer.lr=nan": "expected a finite number",
    "trainer.max_steps=99999999999999999999999": "at most",
    "run=a..b": "no '..'",
    "run=": "a run's name is a folder's name",
    "resume=perhaps": "resume=perhaps: choose one of auto, never",
    "trainer.strategy=dpp": "trainer.strategy=dpp: choose one of single, ddp",
    "trainer.precision=8": "choose one of auto, 32-true",
    "trainer.micro_batch_size=foo": "trainer.micro_batch_size=foo must be a whole number",
    "guidance.clip=foo": "guidance.clip=foo must be a number",
    "optimizer.betas=5": "expected a list, like optimizer.betas=",
    "run=${nope}": "nope",
}


@pytest.mark.parametrize("override", WRONG)
def test_mistakes_are_answered_without_torch(override):
    with pytest.raises(ConfigError, match=WRONG[override].replace("+", r"\+").replace("?", r"\?").replace("$", r"\$")):
        [overrides] = jobs(["experiment=digits", override])
        check(compose("train", overrides))


def test_a_missing_name_is_asked_for():
    with pytest.raises(ConfigError, match="run is not set: give run=<value>"):
        compose("train", [])
    with pytest.raises(ConfigError, match=r"data.path is not set"):
        compose("train", ["experiment=digits", "data=shards"])


MISTAKES = [
    (["nosie=cosine"], "did you mean noise"),
    (["noise=flow", "prediction=eps"], "noise.t_max=0.999"),
    (["data=shards", "data.path=/nowhere", "metric=none"], "/nowhere does not exist"),
    (["runs_dir=/proc/runs"], "/proc/runs"),
]
MORE = [
    (["model.num_heads=5"], "num_heads=5 does not divide hidden_size=64: choose one of [1, 2, 4, 8, 16, 32, 64]"),
    (
        ["model.patch_size=3"],
        "does not divide input_size=8 (latent.size, of data.image_size): choose one of [1, 2, 4, 8]",
    ),
    (["model.in_channels=4"], "model.in_channels=4 differs from latent.channels=1"),
    (["noise.zero_terminal_snr=true"], "choose another prediction (v works everywhere)"),
    (["noise=flow", "prediction=v", "grid=respaced"], "choose grid=evenly"),
    (["objective.bound_weight=1"], "model.learn_sigma=true"),
    (["objective.spread=even"], "choose one of independent, stratified, low_discrepancy"),
    (["weight=min_snr", "weight.gamma=-1"], "weight.gamma=-1"),
    (["condition.dropout=0", "guidance.scale=2"], "condition.dropout=0"),
    (["condition=none", "guidance.scale=2"], "an unconditional model cannot be guided"),
    (["guidance.interval=[0.9,0.1]"], "two rising times"),
    (["sampler=ddpm", "sampler.variance=learned"], "model.learn_sigma=true"),
    (["guidance=autoguidance", "guidance.weak.run=nope"], "run=nope: no such run"),
    (["trainer.micro_batch_size=100"], "choose one of [128, 64, 32, 16]"),
    (["optimizer.betas=[2,3]"], "optimizer.betas=[2,3] must be two numbers, from 0 to less than 1"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), [*MISTAKES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)]
)
def test_mistakes_end_with_exit_code_2_and_leave_nothing(tmp_path, overrides, message):
    code, output, seconds = dit("train", "experiment=digits", *overrides, cwd=tmp_path)
    assert (code, message in output) == (2, True), output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []
    assert seconds < 30  # 5 on an idle machine; tests share theirs


def test_a_corrupt_shard_ends_with_exit_code_2(tmp_path, digits_dir):
    import shutil

    shutil.copytree(digits_dir, tmp_path / "data")
    shard = tmp_path / "data" / "digits" / "train" / "000003.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    code, output, _ = dit("train", "experiment=digits", cwd=tmp_path)
    assert code == 2 and "000003.tar is corrupt" in output
    assert not (tmp_path / "runs").exists()


def test_help_is_fast_and_names_the_verbs():
    fastest = min(dit("--help")[2] for _ in range(3))
    code, output, _ = dit("--help")
    assert code == 0 and "train" in output and "sample" in output
    assert fastest < 0.5
    check = "import sys; from dit.__main__ import main; sys.argv = ['dit', '--help']\ntry: main()\n"
    check += "except SystemExit: sys.exit(any(name in sys.modules for name in ('torch', 'hydra', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", check], stdout=subprocess.DEVNULL).returncode == 0


def test_verbs_are_checked():
    assert dit()[0] == 2
    code, output, _ = dit("trian")
    assert code == 2 and "there is no verb trian; choose one of pack, index, encode, train, submit, sample" in output
    assert dit("--version")[0] == 0


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate", "schedule"])
def test_a_verbs_help_shows_examples_and_keys(verb):
    code, output, _ = dit(verb, "--help")
    assert code == 0 and f"dit {verb} " in output and "seed: 0" in output


def test_cfg_prints_what_would_run(tmp_path):
    code, output, _ = dit("train", "experiment=digits", "noise=cosine", "--cfg", "job", cwd=tmp_path)
    assert code == 0
    assert OmegaConf.create(output).noise._target_ == "dit.noise.vp.cosine"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ones_own_adds_options(tmp_path):
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text("defaults: [ddim]\nnum_steps: 7\n")
    code, output, _ = dit("train", "--config-dir", str(tmp_path), "experiment=digits", "sampler=mine", "--cfg", "job")
    assert code == 0 and "num_steps: 7" in output


def test_the_wheel_brings_conf(tmp_path):
    pytest.importorskip("hatchling")
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    import zipfile

    [wheel] = tmp_path.glob("ditforge-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"dit/conf/train.yaml", "dit/conf/model/dit_xl_2.yaml", "dit/slurm/train.sbatch", "dit/__main__.py"} <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code, output, _ = dit("train", "experiment=digits", "--cfg", "job", cwd=tmp_path / "installed")
    assert code == 0 and "run: digits" in output


def test_text_is_taken_as_it_is():
    from dit.command import sample
    from dit.command.compose import quoted

    sample.prepare(None)
    for text in ("it's a seven", "a, b", "a=b", 'the "best" one', "{x}", "a seven"):
        [override] = [quoted(f"prompt={text}", ("prompt",))]
        assert OmegaConf.create({"prompt": compose("sample", [override, "run=x"]).prompt}).prompt == text
    assert quoted("prompt=[a one,a two]", ("prompt",)) == "prompt=[a one,a two]"
    assert quoted("seed=1", ("prompt",)) == "seed=1"


@pytest.mark.parametrize(("path", "of"), [("flow", "edm"), ("flow", "linear"), ("edm", "flow"), ("cosine", "flow")])
def test_a_path_has_times_of_its_own_whatever_the_network_knows(path, of):
    matched = ["experiment=digits", "noise=matched", f"noise@noise.path={path}", f"noise@noise.of={of}"]
    there, plain = (compose("train", words) for words in (matched, ["experiment=digits", f"noise={path}"]))
    assert there.times == plain.times and there.grid == plain.grid
    assert compose("train", [*matched, "grid=quadratic"]).grid._target_.endswith("quadratic")
