"""On what a run executes: settled from what its configuration leaves open and what the machine has."""

import copy

import torch
from omegaconf import DictConfig

from dit.train.strategy import Strategy
from dit.train.world import World


def settled(cfg: DictConfig) -> DictConfig:
    """A configuration with trainer.accelerator and trainer.precision decided.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    cfg, there = copy.deepcopy(cfg), torch.cuda.is_available()
    options = cfg.trainer
    if options.accelerator == "auto":
        options.accelerator = "gpu" if there else "cpu"
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


def check_launch(options: DictConfig) -> None:
    """See whether processes on this machine alone are what is asked for.

    Raises:
        ValueError: if not.
    """
    if options.nodes not in ("auto", 1):
        raise ValueError(f"trainer.nodes={options.nodes} must be started on each of them, by srun or torchrun")


def check(options: DictConfig, world: World) -> None:
    """See whether the configuration and the processes there are agree.

    Args:
        options: the node `trainer`, settled.
        world: the processes.

    Raises:
        ValueError: if not, naming both.
    """
    if options.nodes not in ("auto", world.num_nodes):
        way_out = "start it on them by srun or torchrun" if options.nodes > world.num_nodes else "leave it at auto"
        raise ValueError(f"trainer.nodes={options.nodes}, but it was started on {world.num_nodes}: {way_out}")
    if options.devices not in ("auto", world.local_size):
        raise ValueError(
            f"trainer.devices={options.devices}, but {world.local_size} processes were started on this node: start as "
            "many, or leave trainer.devices=auto"
        )
    if options.accelerator == "gpu" and world.local_size > torch.cuda.device_count():
        raise ValueError(f"{world.local_size} processes on a node with {torch.cuda.device_count()} GPUs: start as many")
    if options.strategy == "single" and world.size > 1:
        raise ValueError(
            f"trainer.strategy=single is for one device, but {world.size} processes were started: choose trainer=ddp or "
            "trainer=fsdp"
        )
    tensor = options.tensor_parallel_size
    if tensor > 1 and options.strategy != "fsdp":
        raise ValueError(f"trainer.tensor_parallel_size={tensor} goes with trainer=fsdp_tp, not {options.strategy}")
    if world.local_size % tensor:
        raise ValueError(
            f"trainer.tensor_parallel_size={tensor} does not divide the {world.local_size} devices of a node: blocks are "
            "divided among devices of one node"
        )
    if options.shard == "node" and options.strategy != "fsdp":
        raise ValueError(f"trainer.shard=node goes with trainer=fsdp, not {options.strategy}")


def num_micro_batches(options: DictConfig, data_size: int) -> int:
    """In how many parts a process's share of the global batch passes the network, each of whole lanes.

    Args:
        options: the node `trainer`.
        data_size: among how many processes the global batch is divided.

    Raises:
        ValueError: if it cannot be divided so.
    """
    batch, lanes = options.batch_size, options.lanes
    if batch % lanes:
        raise ValueError(f"trainer.batch_size={batch} must be a multiple of trainer.lanes={lanes}")
    if lanes % data_size:
        raise ValueError(
            f"trainer.lanes={lanes} cannot be divided among {data_size} devices: take as many as divide it, or for a new "
            f"run lanes that are a multiple, like trainer.lanes={lanes * data_size}"
        )
    batch, lanes = batch // data_size, lanes // data_size
    micro = min(options.micro_batch_size or batch, batch)
    if batch % micro or lanes % (batch // micro):
        allowed = [batch // n for n in range(1, lanes + 1) if lanes % n == 0]
        each = f"a device's {batch} of trainer.batch_size={options.batch_size}" if data_size > 1 else ""
        raise ValueError(
            f"trainer.micro_batch_size={micro} must divide {each or f'trainer.batch_size={batch}'} into whole lanes "
            f"(trainer.lanes={options.lanes}): choose one of {allowed}"
        )
    return batch // micro


def strategy_of(options: DictConfig) -> type[Strategy]:
    """The strategy that trainer.strategy names."""
    if options.strategy == "fsdp":
        from dit.train.sharded import Sharded

        return Sharded
    if options.strategy.startswith("zero"):
        from dit.train.zero import Zero

        return Zero
    return Strategy
