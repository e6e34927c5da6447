"""Learning-rate schedules: the factor on the optimizer's lr at a step (0, 1, ...)."""

import math


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """1, after a linear rise over the first warmup_steps steps."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def stages(step: int, *, max_steps: int, num_stages: int, warmup_steps: int = 0) -> float:
    """In each of num_stages equal stages a linear fall from 1 to 0 (arXiv:2202.00512), the first after a rise."""
    progress = step * num_stages % max_steps / max_steps
    return constant(step, warmup_steps=warmup_steps) * (1 - progress)


def cosine(step: int, *, max_steps: int, warmup_steps: int = 0) -> float:
    """A linear rise over the first warmup_steps steps, then half a cosine down to 0 at max_steps.

    Raises:
        ValueError: if the end comes before the rise is over.
    """
    if warmup_steps >= max_steps:
        raise ValueError(
            f"learning_rate.warmup_steps={warmup_steps} must be less than trainer.max_steps={max_steps}, where "
            "learning_rate=cosine ends: take fewer, or learning_rate=constant for a short try"
        )
    progress = min(1.0, max(0, step - warmup_steps) / max(1, max_steps - warmup_steps))
    return constant(step, warmup_steps=warmup_steps) * (1 + math.cos(math.pi * progress)) / 2
