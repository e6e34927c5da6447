"""Learning-rate schedules: the factor on the optimizer's lr at a step."""


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """1, after a linear rise over the first warmup_steps steps (0, 1, ...)."""
    return min(1.0, (step + 1) / (warmup_steps + 1))
