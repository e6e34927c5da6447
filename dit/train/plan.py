"""What a training step needs of each of many GPUs, predicted on a laptop: memory, communication and time.

Memory is counted with the shapes that the first rank holds, the real optimizer and the real average. Communication is
that of NCCL's rings. Times follow from data sheets and from `EFFICIENCY` and `OVERLAP`, which are assumptions.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from dit.train.build import Parts
from dit.train.cost import SPLIT, Memory, Passes, multiply_adds, passes, shard, split, states
from dit.train.hardware import Hardware
from dit.train.layout import Layout, check, divided
from dit.train.strategy import BUCKET_BYTES
from dit.train.tensor_parallel import units_of
from dit.train.zero import AHEAD, BUCKET, LIVE, PERSISTENT

# Until they are measured on the machine in question:
EFFICIENCY = 0.4  # of the peak that matrix products reach, everything around them counted in
OVERLAP = 0.8  # of the time of computing in which communication can hide, where a strategy lets it


REST = "the rest"  # what is in no unit


class Unit(NamedTuple):
    """Parameters that FSDP2 gathers together."""

    name: str
    number: int  # of such units
    parameters: int  # of one
    held: int  # of these by the first rank, as much as by any
    reduced: int  # those that are trained, as they are reduced
    padded: int  # as they are gathered: the first rank's part, times the number of ranks


class Traffic(NamedTuple):
    """Bytes that each GPU sends in a step, while it receives as many."""

    kind: str
    inside: float  # to GPUs of its node
    between: float  # to other nodes
    hidden: bool  # whether it can go on while the GPU computes

    def seconds(self, hardware: Hardware) -> float:
        """Over both at once."""
        return max(self.inside / hardware.inside, self.between / hardware.between)


class Plan(NamedTuple):
    """What is predicted of a step, for each GPU."""

    layout: Layout
    batch: int  # images of all GPUs
    images: int  # at a time
    num_micro_batches: int
    memory: Memory
    host_bytes: int  # in the memory of the CPU, for each GPU
    units: list[Unit]
    traffic: list[Traffic]
    flops: float
    update_bytes: int  # read and written by optimizer and average

    def seconds(self, hardware: Hardware, precision: str, efficiency: float, overlap: float) -> dict[str, float]:
        """Of a step: compute + update + exposed, the communication that does not hide.

        compute = flops / (peak * efficiency); update = its bytes over the GPU's memory rate; of what can hide, what
        takes longer than overlap * compute does not.
        """
        peak = hardware.bf16 if precision == "bf16-mixed" else hardware.float32
        compute = self.flops / (peak * efficiency)
        hides = sum(t.seconds(hardware) for t in self.traffic if t.hidden)
        waits = sum(t.seconds(hardware) for t in self.traffic if not t.hidden)
        exposed = waits + max(0.0, hides - overlap * compute)
        update = self.update_bytes / hardware.memory_rate
        return {
            "compute": compute,
            "update": update,
            "communication": hides + waits,
            "exposed": exposed,
            "step": compute + update + exposed,
        }


class Planner:
    """Predicts for one recipe and any number of layouts; what they share is counted once.

    trainer.precision, trainer.activation_checkpointing and what FSDP2 gathers when are the recipe's. Not counted are a
    VAE's own needs, parts of the objective that are trained, what trainer.compile and trainer.float8 save, and the
    operations that frozen layers save backward.

    Args:
        parts: of the recipe.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        self.mixed = parts.cfg.trainer.precision == "bf16-mixed"
        self.averages_on_cpu = parts.cfg.ema.get("device") == "cpu"
        self.multiply_adds = multiply_adds(parts)
        self._states = cache(partial(states, parts))
        self._split = cache(partial(split, parts))
        self._measured: dict[int, tuple[int, Passes]] = {}  # by tensor parallelism: of so many images

    def __call__(self, layout: Layout, batch: int, micro_batch: int | None = None) -> Plan:
        """For a global batch, of which each GPU sees at most `micro_batch` images at a time.

        Raises:
            ValueError: if the batch, or the network, cannot be divided so.
        """
        check(layout)
        images, number = divided(layout, batch, micro_batch)
        memory, host, units, traffic = getattr(self, f"_{layout.strategy}")(layout, images, number)
        held = memory.parameters + memory.optimizer + (0 if self.averages_on_cpu else memory.ema)
        passes_ = 4 if self.parts.cfg.trainer.activation_checkpointing == "full" else 3  # forward, and twice backward
        return Plan(
            layout=layout,
            batch=batch,
            images=images,
            num_micro_batches=number,
            memory=memory,
            host_bytes=host,
            units=units,
            traffic=[t for t in traffic if t.inside + t.between],
            flops=2 * self.multiply_adds * passes_ * batch / layout.world,
            update_bytes=2 * held + memory.gradients,
        )

    def units(self, layout: Layout) -> list[Unit]:
        """Of FSDP2: each unit of the network, and the rest together."""
        network = self._split(layout.tensor_parallel)
        inside = {name: type(m).__name__ for name, m in network.named_modules() if isinstance(m, network.units)}
        sizes: dict[str, list[Any]] = {}
        for name, p in network.named_parameters():
            owners = [owner for owner in inside if name.startswith(f"{owner}.")]
            sizes.setdefault(max(owners, key=len, default=""), []).append(p)
        found: Counter[tuple[Any, ...]] = Counter()
        for owner, parameters in sizes.items():
            held = [_count(shard(p.shape, layout.shards)) for p in parameters]
            found[
                inside.get(owner, REST),
                sum(p.numel() for p in parameters),
                sum(held),
                layout.shards * sum(h for h, p in zip(held, parameters, strict=True) if p.requires_grad),
                layout.shards * sum(held),
            ] += 1
        return [Unit(name, number, *rest) for (name, *rest), number in found.items()]

    def _passes(self, images: int, tensor_parallel: int) -> Passes:
        """Counted, which takes seconds, or in proportion to those that were."""
        if tensor_parallel not in self._measured:
            self._measured[tensor_parallel] = images, passes(self.parts, images, tensor_parallel)
        counted, (copies, activations, passing) = self._measured[tensor_parallel]
        return Passes(copies, activations * images // counted, passing * images // counted)

    def _kept(self, values: Mapping[str, int], images: int, layout: Layout) -> tuple[Memory, int]:
        """With what the passes need; and the bytes of the averages if they are in the CPU's memory."""
        memory = Memory(**values, **self._passes(images, layout.tensor_parallel)._asdict())
        return (memory._replace(ema=0), memory.ema) if self.averages_on_cpu else (memory, 0)

    def _numbers(self, shards: int = 1) -> tuple[int, int]:
        """Of all parameters and of those that are trained, on the first of so many ranks that share each as a row."""
        parameters = list(self._split(1).parameters())
        counts = [(_count(shard(p.shape, shards, flat=True)), p.requires_grad) for p in parameters]
        return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)

    def _single(self, layout: Layout, images: int, number: int) -> tuple[Any, ...]:
        memory, host = self._kept(self._states()._asdict(), images, layout)
        return memory, host, [], []

    def _ddp(self, layout: Layout, images: int, number: int) -> tuple[Any, ...]:
        """Gradients are averaged in float32, once, when they are complete: a bucket at a time, activations gone."""
        trained = 4 * self._numbers()[1]
        bucket = min(trained, BUCKET_BYTES + 4 * max(p.numel() for p in self._split(1).parameters()))
        memory, host = self._kept(self._states()._asdict(), images, layout)
        copied = bucket - memory.copies - memory.activations - memory.passing if layout.world > 1 else 0
        memory = memory._replace(gathered=max(0, copied))
        return memory, host, [], [ring("all-reduce", trained, layout.world, layout.gpus, hidden=False)]

    def _fsdp(self, layout: Layout, images: int, number: int) -> tuple[Any, ...]:
        """Each unit, and the rest, is gathered forward and again backward, where gradients are reduced in float32.

        With bf16-mixed units are gathered in bfloat16, the rest in float32. While a unit computes backward there are:
        its parameters, the next one's as they arrive, its gradients, and in float32 those of the unit before, on their
        way (torch's `FSDPParamGroup`); and the rest, with gradients. With trainer.prefetch_units as many arrive. With
        trainer.reshard_after_forward=false all are gathered once, and there is most when the last one of them is, with
        the messages by which it and the one before came, or soon afterwards.
        """
        options = self.parts.cfg.trainer
        again = options.reshard_after_forward
        units = self.units(layout)
        low = 2 if self.mixed else 4
        padded = sum(unit.number * unit.padded for unit in units if unit.name != REST)
        largest = max((unit.padded for unit in units if unit.name != REST), default=0)
        rest = sum(unit.padded for unit in units if unit.name == REST)
        memory, host = self._kept(
            self._states(layout.shards, tensor_parallel=layout.tensor_parallel)._asdict(), images, layout
        )
        copies = min(memory.copies, 2 * rest) if self.mixed else memory.copies
        there = min(padded, (2 + max(1, options.prefetch_units)) * largest) if again else padded
        beside = max(4 * (rest + largest), 0 if again else 2 * low * largest)
        memory = memory._replace(gathered=4 * rest + low * there + beside, copies=copies)
        members = layout.shards
        near = min(members, layout.gpus // layout.tensor_parallel)  # of them in a node
        reduced = sum(unit.number * unit.reduced for unit in units)
        traffic = [
            ring("all-gather", number * (2 if again else 1) * (low * padded + 4 * rest), members, near),
            ring("reduce-scatter", number * 4 * reduced, members, near),
            ring("all-reduce", number * 4 * reduced / members, layout.data_parallel // members, 1),
        ]
        if layout.tensor_parallel > 1:
            traffic.append(self._tensor_parallel(layout, images * number))
        return memory, host, units, traffic

    def _tensor_parallel(self, layout: Layout, images: int) -> Traffic:
        """The sum of each split pair of layers' output forward, and of the gradient of its input backward."""
        network = self._split(layout.tensor_parallel)
        pairs = sum(SPLIT.get(name) == 1 for unit in units_of(network) for name, _ in unit.named_modules())
        again = self.parts.cfg.trainer.activation_checkpointing == "full"
        _, tokens, width = network.pos_embed.shape
        num_bytes = (
            (3 if again else 2) * pairs * images * (tokens + network.class_tokens) * width * (2 if self.mixed else 4)
        )
        return ring("all-reduce", num_bytes, layout.tensor_parallel, layout.tensor_parallel, hidden=False)

    def _zero(self, layout: Layout, images: int, number: int, stage: int) -> tuple[Any, ...]:
        """DeepSpeed, all in float32; the optimizer steps a copy of the rank's part of the parameters."""
        whole, part = self._states(), self._states(layout.world, flat=True)
        (numbers, trained), (own, own_trained) = self._numbers(), self._numbers(layout.world)
        small = sum(p.numel() for p in self._split(1).parameters() if p.numel() < PERSISTENT)
        state = part.optimizer + 4 * own_trained
        memory, host = self._kept(
            {
                "parameters": 4 * (own + small) if stage == 3 else whole.parameters,
                "gradients": 4 * (trained if stage == 1 else own_trained),
                "optimizer": 0 if layout.offload else state,
                "ema": (part if stage == 3 else whole).ema,
            },
            images,
            layout,
        )
        if layout.offload:  # with gradients, and room for the parameters that it gives
            host += state + 8 * own_trained
        memory = memory._replace(
            gathered=4 * (min(BUCKET, numbers) + (min(LIVE + AHEAD, numbers) if stage == 3 else 0))
        )
        gathers = 2 * number * numbers if stage == 3 else trained
        reductions = 1 if stage == 1 else number
        traffic = [
            ring("all-gather", 4 * gathers, layout.world, layout.gpus, hidden=stage == 3),
            ring("reduce-scatter", 4 * trained * reductions, layout.world, layout.gpus, hidden=stage == 3),
        ]
        return memory, host, [], traffic

    def _zero1(self, layout: Layout, images: int, number: int) -> tuple[Any, ...]:
        return self._zero(layout, images, number, 1)

    def _zero2(self, layout: Layout, images: int, number: int) -> tuple[Any, ...]:
        return self._zero(layout, images, number, 2)

    def _zero3(self, layout: Layout, images: int, number: int) -> tuple[Any, ...]:
        return self._zero(layout, images, number, 3)


def ring(kind: str, num_bytes: float, members: int, near: int, *, hidden: bool = True) -> Traffic:
    """A collective of `num_bytes` in all among `members` GPUs, `near` of them in each node.

    Each sends (members - 1) / members of the bytes to its neighbour in the ring, twice if they are reduced and gathered
    (`all-reduce`). One of the `near` hops in a node leads to another one; the rings that run at the same time leave it
    at different GPUs.
    """
    sent = num_bytes * (members - 1) / members * (2 if kind == "all-reduce" else 1)
    leaves = 0.0 if members == near else 1 / near
    return Traffic(kind, sent * (1 - leaves), sent * leaves, hidden)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
