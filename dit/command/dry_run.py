"""`dit train ... trainer.dry_run=true`: what a run would need of each GPU, before there is one."""

from typing import Any

from omegaconf import DictConfig

from dit.command.doctor import GIB, MIB, memory_lines, network_lines
from dit.train.build import build
from dit.train.checked import build_trained, checked
from dit.train.devices import settled
from dit.train.hardware import HARDWARE, Hardware
from dit.train.kind import autoencodes
from dit.train.layout import Layout, assumed_layout
from dit.train.plan import EFFICIENCY, OVERLAP, REST, Plan, Planner


def report(cfg: DictConfig) -> str:
    """Check what can be checked without data, weights and GPUs; the parts and their costs in words.

    Raises:
        ValueError: if the configuration does not do, with the way out.
    """
    layout, assumed = assumed_layout(cfg.trainer)
    cfg, parts = sound(cfg, layout)
    lines = [f"dry run of run={cfg.run}: nothing is trained, read or written"]
    if autoencodes(cfg):
        return "\n".join([*lines, "the configuration is sound; the cost of an autoencoder is not counted"])
    planner = Planner(parts)
    plan = planner(layout, cfg.trainer.batch_size, cfg.trainer.micro_batch_size)
    words = f"{layout.nodes} x {layout.gpus} GPUs, trainer.strategy={layout.strategy}"
    words += f" trainer.shard={layout.shard}" if layout.strategy == "fsdp" else ""
    words += f" trainer.tensor_parallel_size={layout.tensor_parallel}" if layout.tensor_parallel > 1 else ""
    lines += network_lines(parts, planner.multiply_adds)
    lines.append(f"  layout             {words}{f' ({assumed})' if assumed else ''}")
    lines.append(
        f"  global batch       {plan.batch} images = {layout.data_parallel} ranks x {plan.num_micro_batches} "
        f"micro-batches x {plan.images} images, lr {cfg.optimizer.lr:g}"
    )
    lines += _units(plan)
    lines += memory_lines(cfg, plan.memory, plan.images, " on each GPU")
    if plan.host_bytes:
        lines.append(f"    and {plan.host_bytes / GIB:.2f} GiB of the CPU's memory for each GPU")
    lines += _traffic(plan)
    lines += _time(plan, cfg.trainer.precision, HARDWARE["h100"])
    return "\n".join(lines)


def sound(cfg: DictConfig, layout: Layout) -> tuple[DictConfig, Any]:
    """The configuration settled, and its parts, if all that it names can be made and shared out so.

    Raises:
        ValueError: if not, with the way out.
    """
    cfg = settled(cfg)
    _, parts, _, denoiser, _, _ = checked(cfg, layout)
    for node in (cfg.logger, *(cfg.metric or {}).values(), cfg.learning_rate):
        build(node)
    build_trained(cfg, denoiser)
    return cfg, parts


def _units(plan: Plan) -> list[str]:
    """The shard plan of FSDP2."""
    if not plan.units:
        return []
    ranks = plan.layout.shards
    lines = [f"  shards             each parameter among {ranks} ranks along its first dimension"]
    for unit in plan.units:
        name = unit.name if unit.name == REST else f"{unit.number} x {unit.name}"
        lines.append(
            f"    {name:<16} {unit.parameters:>13,} parameters, {unit.held:>11,} on a rank; gathered, padded: "
            f"{unit.padded:>13,}"
        )
    held = sum(unit.number * unit.held for unit in plan.units)
    return [*lines, f"    {'a rank holds':<16} {held:>13,}"]


def _traffic(plan: Plan) -> list[str]:
    """What each GPU sends in a step."""
    if not plan.traffic:
        return ["  communication      none"]
    lines = ["  communication in a step, sent by each GPU (and as much received), by NCCL's rings"]
    for t in plan.traffic:
        where = f"{t.inside / MIB:10,.0f} MiB in the node {t.between / MIB:10,.0f} MiB between nodes"
        lines.append(f"    {t.kind:<16} {where}, while it {'computes' if t.hidden else 'waits'}")
    return lines


def _time(plan: Plan, precision: str, hardware: Hardware) -> list[str]:
    """By a GPU's data sheet."""
    seconds = plan.seconds(hardware, precision, EFFICIENCY, OVERLAP)
    ms = {name: f"{1000 * value:,.1f} ms" for name, value in seconds.items()}
    flops, rate = plan.flops / 1e12, plan.batch / seconds["step"]
    return [
        f"  operations         {flops * plan.layout.world:,.1f} TFLOP a step, {flops:,.2f} on each GPU",
        f"  a step on {hardware.name:<8} {ms['step']}, {rate:,.0f} images/s: computing {ms['compute']}, update "
        f"{ms['update']}, communication {ms['communication']}, of which {ms['exposed']} waited for",
        f"    predicted, not measured: {EFFICIENCY:.0%} of the data sheet's peak, communication hidden by",
        f"    {OVERLAP:.0%} of computing, no data or VAE; tools/scaling.py compares layouts, GPUs and networks",
    ]
