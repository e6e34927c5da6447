"""dit doctor: what a recipe costs, before anything is spent."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from dit.command.compose import user_errors
from dit.command.train import check
from dit.train.kind import check_denoiser

if TYPE_CHECKING:
    from dit.train.build import Parts
    from dit.train.cost import Memory

__all__ = ["check", "main", "tell_apart"]

GIB, MIB = 2**30, 2**20


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Nothing: the jobs of a multirun write nothing but what they print."""


def main(cfg: DictConfig) -> int:
    """Print parameters, operations and memory; the exit code."""
    with user_errors():
        check_denoiser(cfg)
        from dit.train.build import Parts
        from dit.train.cost import memory, multiply_adds
        from dit.train.devices import settled

        cfg.trainer.dry_run = True  # a GPU need not be there
        cfg = settled(cfg)
        parts = Parts(cfg)
        batch_size = cfg.trainer.micro_batch_size or cfg.trainer.batch_size
        macs, need = multiply_adds(parts), memory(parts, batch_size)
    print("\n".join(network_lines(parts, macs) + memory_lines(cfg, need, batch_size)))
    return 0


def network_lines(parts: "Parts", macs: int) -> list[str]:
    """The network, what it sees and what it is told; its parameters and operations."""
    cfg, told = parts.cfg, parts.condition.sizes
    size, inside = cfg.data.image_size, cfg.latent.size
    sees = f"{size} x {size} pixels" + (f" as {cfg.latent.channels} x {inside} x {inside}" if inside != size else "")
    said = ", ".join(f"{name}={value}" for name, value in told.items()) or "nothing"
    parameters = list(parts.denoiser("meta").parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    digits = ",.2f" if macs >= 1e8 else ".3g"
    operations = f"{2 * macs / 1e9:{digits}} GFLOP = {macs / 1e9:{digits}} GMAC"
    return [
        f"{cfg.model._target_.rpartition('.')[2]}, {sees}, told {said}",
        f"  parameters         {sum(p.numel() for p in parameters):,}, of which {trained:,} are trained",
        f'  an image forward   {operations} (multiply-adds, the "Gflops" of the papers)',
    ]


def memory_lines(cfg: DictConfig, need: "Memory", batch_size: int, of: str = "") -> list[str]:
    """The memory of a training step, by its parts, of which trifles are left out."""
    options = " ".join(f"trainer.{key}={cfg.trainer[key]}" for key in ("precision", "activation_checkpointing"))
    lines = [f"  memory of a training step{of}, {batch_size} images at a time, {options}"]
    notes = {
        "optimizer": cfg.optimizer._target_.rpartition(".")[2],
        "copies": "not for each image: parameters in bfloat16",
        "activations": f"kept for the backward pass, {need.activations / batch_size / MIB:,.1f} MiB an image",
        "passing": "the most that comes and goes besides",
        "gathered": "the most parameters of other ranks, and gradients on their way, at a time",
    }
    digits = ".2f" if need.total >= GIB else ".4f"
    for name, num_bytes in (need._asdict() | {"total": need.total}).items():
        if num_bytes >= need.total / 1000:
            lines.append(f"    {name:<12} {num_bytes / GIB:10{digits}} GiB   {notes.get(name, '')}".rstrip())
    without = "trainer.compile" + (", the VAE" if cfg.latent.get("stride", 1) > 1 else "")
    return [
        *lines,
        f"    counted without running, with fused attention; without {without}, data and the device's own needs",
    ]
