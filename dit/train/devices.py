"""On what a run executes: settled from what its configuration leaves open and what the machine has."""

import copy
import os

import torch
from omegaconf import DictConfig

from dit.train.layout import Layout, layout_on
from dit.train.strategy import Strategy
from dit.train.world import World

MOST_PER_CORE = 4  # processes, of which each has a network


def settled(cfg: DictConfig) -> DictConfig:
    """A configuration with trainer.accelerator and trainer.precision decided.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    cfg, there = copy.deepcopy(cfg), torch.cuda.is_available()
    options = cfg.trainer
    if options.accelerator == "auto":
        options.accelerator = "gpu" if there or options.dry_run else "cpu"
    if options.accelerator == "gpu" and not there and not options.dry_run:
        raise ValueError("trainer.accelerator=gpu, but torch sees no GPU: choose trainer.accelerator=cpu")
    if options.precision == "auto":
        options.precision = "bf16-mixed" if options.accelerator == "gpu" else "32-true"
    return cfg


def num_processes(options: DictConfig) -> int:
    """How many processes a node has, one a device.

    Args:
        options: the node `trainer`, settled.
    """
    if options.devices != "auto":
        number: int = options.devices
        return number
    return torch.cuda.device_count() if options.accelerator == "gpu" else 1


def check_launch(options: DictConfig, number: int) -> Layout:
    """How so many processes on this machine alone share the work, if that is what is asked for.

    Raises:
        ValueError: if not.
    """
    if options.nodes not in ("auto", 1):
        raise ValueError(f"trainer.nodes={options.nodes} must be started on each of them, by srun or torchrun")
    if options.accelerator == "cpu" and number > (most := MOST_PER_CORE * (os.cpu_count() or 1)):
        raise ValueError(f"trainer.devices={number}, but this machine has {os.cpu_count()} cores: take at most {most}")
    if options.accelerator == "gpu" and number > (there := torch.cuda.device_count()):
        raise ValueError(f"trainer.devices={number}, but this machine has {there} GPUs: take at most {there}")
    return layout_on(options, 1, number)


def layout_of(options: DictConfig, world: World) -> Layout:
    """How the processes there are share the work.

    Args:
        options: the node `trainer`, settled.
        world: the processes.

    Raises:
        ValueError: if they are not those that are asked for, or cannot share it so.
    """
    layout = layout_on(options, world.num_nodes, world.local_size)
    if options.nodes not in ("auto", world.num_nodes):
        way_out = "start it on them by srun or torchrun" if options.nodes > world.num_nodes else "leave it at auto"
        raise ValueError(f"trainer.nodes={options.nodes}, but it was started on {world.num_nodes}: {way_out}")
    if options.devices not in ("auto", world.local_size):
        raise ValueError(
            f"trainer.devices={options.devices}, but {world.local_size} processes were started on this node: start as "
            "many, or leave trainer.devices=auto"
        )
    if options.accelerator == "gpu" and world.local_size > torch.cuda.device_count():
        raise ValueError(
            f"{world.local_size} processes on a node, each of which sees {torch.cuda.device_count()} GPUs: start one "
            "for each GPU, and let each see all of the node (srun --gpus-per-node, not --gpus-per-task)"
        )
    return layout


def strategy_of(options: DictConfig) -> type[Strategy]:
    """The strategy that trainer.strategy names."""
    if options.strategy == "fsdp":
        from dit.train.sharded import Sharded

        return Sharded
    if options.strategy.startswith("zero"):
        from dit.train.zero import Zero

        return Zero
    return Strategy
