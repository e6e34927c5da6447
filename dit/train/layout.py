"""How devices share the work of a run: what its configuration says, and whether that can be."""

from typing import NamedTuple

import torch
from omegaconf import DictConfig

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
ASSUMED_GPUS = 8  # of a node, where the configuration does not say and none is here


class Layout(NamedTuple):
    """How GPUs share the work.

    FSDP2 shards over all ranks (`world`), or within each node, where the nodes are replicas (`node`).
    """

    strategy: str = "single"
    nodes: int = 1
    gpus: int = 1  # of a node
    shard: str = "world"
    tensor_parallel: int = 1
    offload: bool = False  # ZeRO's optimizer is in the memory of the CPU

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.gpus

    @property
    def data_parallel(self) -> int:
        """The ranks among which a batch is divided."""
        return self.world // self.tensor_parallel

    @property
    def shards(self) -> int:
        """The ranks among which FSDP2 divides each parameter, after tensor parallelism."""
        if self.strategy != "fsdp":
            return 1
        return self.data_parallel if self.shard == "world" else self.gpus // self.tensor_parallel

    @property
    def name(self) -> str:
        """As in conf/trainer, with `hsdp` for sharding within nodes."""
        name = "hsdp" if self.strategy == "fsdp" and self.shard == "node" else self.strategy
        return name + (f"+tp{self.tensor_parallel}" if self.tensor_parallel > 1 else "")


def assumed_layout(trainer: DictConfig) -> tuple[Layout, str]:
    """What a configuration's trainer says, and in words what had to be assumed.

    Raises:
        ValueError: if two values do not fit together, with the way out.
    """
    nodes, gpus, assumed = trainer.nodes, trainer.devices, []
    if gpus == "auto":
        gpus = 1
        if trainer.strategy != "single":
            here = torch.cuda.device_count() if trainer.accelerator != "cpu" else 0
            gpus = here or ASSUMED_GPUS
            assumed.append(f"trainer.devices=auto: {f'{here} GPUs are here' if here else f'{gpus} assumed'}")
    if nodes == "auto":
        nodes = 1
        if trainer.strategy != "single":
            assumed.append("trainer.nodes=auto: 1 assumed")
    for key, value in {"nodes": nodes, "devices": gpus, "tensor_parallel_size": trainer.tensor_parallel_size}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"trainer.{key}={value} must be a whole number, at least 1")
    return layout_on(trainer, nodes, gpus), "; ".join(assumed)


def layout_on(trainer: DictConfig, nodes: int, gpus: int) -> Layout:
    """What a configuration's trainer says, on so many devices.

    Raises:
        ValueError: if two values do not fit together, with the way out.
    """
    layout = Layout(trainer.strategy, nodes, gpus, trainer.shard, trainer.tensor_parallel_size, trainer.offload)
    check(layout)
    return layout


def check(layout: Layout) -> None:
    """See that its values fit together.

    Raises:
        ValueError: naming two that do not, with the way out.
    """
    parallel = layout.tensor_parallel
    if layout.strategy not in STRATEGIES:
        raise ValueError(f"trainer.strategy={layout.strategy}: choose one of {', '.join(STRATEGIES)}")
    if layout.shard not in ("world", "node"):
        raise ValueError(f"trainer.shard={layout.shard}: choose one of world, node")
    if min(layout.nodes, layout.gpus, parallel) < 1:
        raise ValueError(
            f"trainer.nodes={layout.nodes}, trainer.devices={layout.gpus} and trainer.tensor_parallel_size={parallel} "
            "must be at least 1"
        )
    if layout.strategy == "single" and layout.world > 1:
        raise ValueError(
            f"trainer.nodes={layout.nodes} with trainer.devices={layout.gpus}, but trainer.strategy=single: choose "
            "trainer=ddp or trainer=fsdp"
        )
    if parallel > 1 and layout.strategy != "fsdp":
        raise ValueError(
            f"trainer.tensor_parallel_size={parallel} needs trainer=fsdp_tp, not trainer.strategy={layout.strategy}"
        )
    if layout.gpus % parallel:
        raise ValueError(f"trainer.tensor_parallel_size={parallel} must divide trainer.devices={layout.gpus}")
    if layout.shard == "node" and layout.strategy != "fsdp":
        raise ValueError(f"trainer.shard=node goes with trainer=fsdp, not trainer.strategy={layout.strategy}")
    if layout.offload and not layout.strategy.startswith("zero"):
        raise ValueError(f"trainer.offload=true needs zero1, zero2 or zero3, not trainer.strategy={layout.strategy}")


def divided(layout: Layout, batch: int, micro_batch: int | None, lanes: int | None = None) -> tuple[int, int]:
    """Images that a GPU sees at a time, and in how many parts it sees its share of the batch, each of whole lanes.

    Raises:
        ValueError: if they do not divide it, with the way out.
    """
    ranks = layout.data_parallel
    if micro_batch and micro_batch > batch:
        raise ValueError(
            f"trainer.micro_batch_size={micro_batch} is more than trainer.batch_size={batch}: take less, or null"
        )
    share, rest = divmod(batch, ranks)
    if rest or not share:
        raise ValueError(f"trainer.batch_size={batch} must be a multiple of the {ranks} ranks that share a batch")
    if lanes and (batch % lanes or lanes % ranks):
        allowed = [n for n in range(ranks, batch + 1, ranks) if batch % n == 0]
        raise ValueError(
            f"trainer.lanes={lanes} must divide trainer.batch_size={batch} and be a multiple of its {ranks} ranks: "
            f"choose one of {allowed}"
        )
    images = min(micro_batch or share, share)
    most = lanes // ranks if lanes else share  # parts of a rank's share, each of whole lanes
    allowed = [n for n in range(share, 0, -1) if share % n == 0 and most % (share // n) == 0]
    if images not in allowed:
        of = f"the {share} images of each of {ranks} ranks, " if ranks > 1 else ""
        raise ValueError(
            f"trainer.micro_batch_size={images} must divide {of}trainer.batch_size={batch} into whole lanes "
            f"(trainer.lanes={lanes or 'any'}): choose one of {allowed}, or for a new run more lanes"
        )
    return images, share // images
