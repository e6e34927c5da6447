"""Which process of how many this is, and how devices are asked for."""

import contextlib
import os
import time

import pytest
import torch

from dit.command.compose import compose
from dit.command.train import check
from dit.train import devices
from dit.train.launch import launch
from dit.train.run import Run
from dit.train.world import World

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *SLURM):
        monkeypatch.delenv(name, raising=False)


def of(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    world = World()
    return (world.rank, world.size, world.local_rank, world.local_size, world.num_nodes, world.is_first)


def test_without_a_launcher_there_is_one(monkeypatch):
    assert of(monkeypatch, {}) == (0, 1, 0, 1, 1, True)
    assert not World().launched


def test_torchrun_is_followed(monkeypatch):
    env = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert of(monkeypatch, env) == (9, 16, 1, 8, 2, False)


def test_srun_is_followed_but_not_the_batch_script_around_it(monkeypatch):
    assert of(monkeypatch, SLURM) == (5, 8, 1, 4, 2, False)
    assert World()._address == ("gpu07", str(15000 + 123456 % 10000))
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert World()._address[0] == "10.0.0.1"
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert World().size == 1


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "abc"},
        {**SLURM, "SLURM_PROCID": ""},
        {**SLURM, "SLURM_STEP_NUM_NODES": "0"},
        {"SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, env):
    with pytest.raises(ValueError, match="launcher's environment"):
        of(monkeypatch, env)


MISTAKES = [
    (["trainer.devices=2"], "trainer.devices=2, but trainer.strategy=single is for one"),
    (["trainer=ddp", "trainer.devices=two"], "trainer.devices=two must be a whole number, at least 1, or auto"),
    (["trainer=ddp", "trainer.nodes=0"], "trainer.nodes=0 must be a whole number"),
    (["trainer=ddp", "trainer.offload=true"], "trainer.offload=true goes with trainer=zero1"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_devices_are_asked_for_in_words_that_make_sense(tiny, overrides, message):
    with pytest.raises(ValueError, match=message):
        check(compose("train", tiny(*overrides)))


FOREIGN = [
    (["trainer=cpu"], "trainer.strategy=single"),
    (["trainer=ddp", "trainer.devices=4"], "trainer.devices=4, but 2 processes were started on this node"),
    (
        ["trainer=ddp", "trainer.nodes=2"],
        "trainer.nodes=2, but it was started on 1: start it on them by srun or torchrun",
    ),
    (
        ["trainer=ddp", "trainer.lanes=1"],
        "trainer.lanes=1 must divide trainer.batch_size=32 and be a multiple of its 2",
    ),
    (["trainer=fsdp_tp", "model.num_heads=1"], "trainer.tensor_parallel_size=2 does not divide model.num_heads=1"),
    (["trainer=ddp", "trainer.tensor_parallel_size=2"], "tensor_parallel_size=2 needs trainer=fsdp_tp"),
    (
        ["trainer=ddp", "trainer.micro_batch_size=3"],
        r"must divide the 16 images of each of 2 ranks.*choose one of \[16, 8",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), FOREIGN)
def test_what_two_processes_cannot_do_is_said_before_they_meet(monkeypatch, config, overrides, message):
    of(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=message):
        Run(config("run=x", *overrides))
    assert not torch.distributed.is_initialized()


def test_several_nodes_want_a_launcher(config):
    cfg = devices.settled(config("run=x", "trainer=ddp", "trainer.nodes=2", "trainer.devices=2"))
    with pytest.raises(ValueError, match="must be started on each of them, by srun or torchrun"):
        devices.check_launch(cfg.trainer, 2)


def test_more_processes_than_a_machine_bears_are_refused(config):
    cfg = devices.settled(config("run=x", "trainer=ddp", "trainer.devices=1000"))
    with pytest.raises(ValueError, match=r"trainer.devices=1000, but this machine has \d+ cores: take at most"):
        devices.check_launch(cfg.trainer, 1000)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_several_optimizers_are_refused_under_zero(digits_dir, tmp_path, strategy, dry):
    """Of a discriminator here."""
    overrides = ["experiment=digits_vae", "objective=autoencoding_gan", f"trainer={strategy}", "trainer.devices=1"]
    overrides += [f"runs_dir={tmp_path}", f"data_dir={digits_dir}", f"trainer.dry_run={str(dry).lower()}"]
    tiny = ["objective.perceptual.pretrained=false", "objective.perceptual.name=test_resnet"]
    cfg = compose("train", [*overrides, *tiny])
    with pytest.raises(ValueError, match="another for its discriminator; choose trainer=ddp or trainer=fsdp"):
        if dry:
            from dit.command.dry_run import report

            report(cfg)
        else:
            Run(cfg)
    assert not list(tmp_path.iterdir())


def test_what_an_objective_learns_itself_is_refused_under_zero(config):
    with pytest.raises(ValueError, match="learns some of its own; choose trainer=ddp"):
        Run(config("run=x", "trainer=zero2", "trainer.devices=1", "objective=uncertain"))


def test_networks_without_units_are_not_sharded(digits_dir, tmp_path):
    overrides = ["experiment=digits_vae", "trainer=fsdp", "trainer.devices=1", f"runs_dir={tmp_path}"]
    with pytest.raises(ValueError, match="AutoencoderKL names no units to shard; choose trainer=ddp"):
        Run(compose("train", [*overrides, f"data_dir={digits_dir}"]))


def fails(folder):
    """Rank 1 fails at once, rank 0 would take a minute."""
    (folder / os.environ["RANK"]).touch()
    if os.environ["RANK"] == "1":
        return 3
    time.sleep(60)
    return 0


def once(folder):
    """Only rank 0 writes; what it raises ends both."""
    world = World()
    world.join("cpu")
    assert world.once(lambda: 7 if world.is_first else 1 / 0) == 7
    assert (world.most(world.rank), world.total(world.rank + 1)) == (1, 3)
    assert float(world.mean(torch.tensor(float(world.rank)))) == 0.5
    try:
        world.once(lambda: [][1])
    except SystemExit as stopped:
        return stopped.code  # 1, in rank 1
    except IndexError:
        return 1  # in rank 0
    return 0


def test_the_first_process_that_fails_ends_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dit.train.launch.GRACE_SECONDS", 1.0)
    began = time.monotonic()
    assert launch(fails, tmp_path, 2) == 3
    assert time.monotonic() - began < 40
    assert "ending rank 0, which still waits" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_what_the_first_process_finds_is_known_to_all(tmp_path):
    assert launch(once, tmp_path, 2) == 1


def finds(folder):
    """What rank 1 alone finds, it says."""
    from dit.command.compose import ConfigError, exit_code_of

    world = World()
    world.join("cpu")

    def work():
        if world.rank:
            raise ConfigError("no such folder here")
        time.sleep(3)
        return 0

    with (folder / str(world.rank)).open("w") as file, contextlib.redirect_stderr(file):
        return exit_code_of(work)


def test_what_one_process_finds_alone_is_said(tmp_path):
    assert launch(finds, tmp_path, 2) == 2
    assert (tmp_path / "1").read_text() == "dit: rank 1: no such folder here\n"


def test_a_mistake_that_is_found_late_leaves_no_connection(config):
    with pytest.raises(ValueError, match="Invalid beta"):
        Run(config("run=x", "trainer=fsdp", "trainer.devices=1", "trainer.accelerator=cpu", "optimizer.betas=[2,3]"))
    assert not torch.distributed.is_initialized()
