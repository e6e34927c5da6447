"""What the tests share."""

import os

os.environ["WANDB_MODE"] = "offline"  # whoever runs the tests may be logged in
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other are slow on a machine that is busy

import pytest
import torch

from dit.command.compose import compose

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data folder with the digits packed in it."""
    from dit.data.digits import pack

    folder = tmp_path_factory.mktemp("data")
    pack(folder / "digits" / "train", folder / "digits" / "held_out")
    return folder


@pytest.fixture
def tiny(tmp_path, digits_dir):
    """Overrides of a digits run that takes seconds."""

    def overrides(*more):
        return [
            "experiment=digits",
            f"runs_dir={tmp_path}/runs",
            f"data_dir={digits_dir}",
            "metric=none",
            "learning_rate=constant",  # a cosine's end is part of the run
            "logger=none",
            "model.hidden_size=16",
            "model.depth=1",
            "model.num_heads=2",
            "trainer.max_steps=12",
            "trainer.batch_size=32",
            "trainer.log_every_steps=1",
            "trainer.preview_every_steps=100",
            "trainer.checkpoint_every_steps=5",
            "sampler.num_steps=2",
            "data.num_workers=0",
            *more,
        ]

    return overrides


@pytest.fixture
def config(tiny):
    """The composed configuration of such a run."""
    return lambda *more: compose("train", tiny(*more))
