"""Whether a student is drawn as it has learned to be."""

from collections.abc import Sequence
from typing import Any

from dit.objective.objective import FewStep


def check_drawn(taught: FewStep, cfg: Any, had: Any = None, way_out: str = "") -> None:
    """See that sampler, number of steps, their times and guidance are those of a student.

    Args:
        taught: what it has learned.
        cfg: how it is to be drawn: sampler, grid and guidance.
        had: the same as it was trained; None: this is its training.
        way_out: what else there is, where the number of steps is another.

    Raises:
        ValueError: if it would be drawn in another way, with the way out.
    """
    student = f"a student of {taught.method}"
    if taught.sampler and cfg.sampler._target_ != f"dit.sampler.{taught.sampler}.sample":
        name = cfg.sampler._target_.split(".")[-2]
        raise ValueError(f"the sampler {name} does not draw {student}: take sampler={taught.sampler}")
    if taught.steps is not None:
        if not taught.takes(num_steps := cfg.sampler.num_steps):
            raise ValueError(
                f"sampler.num_steps={num_steps}, but {student} has learned {_said(taught.steps)}: take "
                f"sampler.num_steps={taught.nearest(num_steps)}{way_out}"
            )
        if had is not None and cfg.grid != had.grid:
            raise ValueError(f"{student} has learned the times of the grid of its training alone: leave grid= out")
    if isinstance(taught.guidance, Sequence):
        scale = cfg.guidance.get("scale", 1.0)
        first, last = taught.guidance
        if not cfg.guidance._target_.endswith(".Told") or not first <= scale <= last:
            raise ValueError(
                f"guidance.scale={scale}: {student} is told a scale of {first:g} to {last:g}: take guidance=told, and "
                f"guidance.scale={min(max(scale, first), last):g}"
            )
    check_guided_once(taught, cfg.guidance)


def check_guided_once(taught: FewStep, guidance: Any) -> None:
    """See that a student which has guidance for good is given no other.

    Args:
        taught: what it has learned.
        guidance: with which it is to be drawn.

    Raises:
        ValueError: if it would be guided twice.
    """
    scale = (guidance or {}).get("scale", 1.0)
    if not isinstance(taught.guidance, Sequence) and taught.guidance != 1 and scale != 1:
        raise ValueError(
            f"guidance.scale={scale} would guide twice: a student of {taught.method} has guidance of scale "
            f"{taught.guidance:g} for good; take guidance.scale=1"
        )


def _said(steps: Sequence[int]) -> str:
    """Numbers of steps in words."""
    *others, last = map(str, steps)
    return f"{', '.join(others)}{' or ' if others else ''}{last} step{'' if steps[-1] == 1 else 's'}"
