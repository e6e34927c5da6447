"""What a student learns from: a frozen denoiser, and the steps of its trajectories."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.matched import on_path
from dit.noise.prediction import Estimate, determinant
from dit.noise.schedule import Schedule
from dit.noise.step import mean, step
from dit.objective.objective import Batch

SOLVERS = ("euler", "heun")
MOST = 1000.0  # times as large as an error of F one of x0 may be
Denoise = Callable[..., Estimate]  # (x_t, t, **cond) -> (x0, eps)


class Teacher:
    """A denoiser, guided or not, whose trajectories a student of any schedule follows on the student's own path.

    It is no part of the objective, so that it is neither trained, averaged nor saved with the run.

    Args:
        denoiser: the denoiser, of whatever schedule and prediction.
        guidance: denoiser -> guided denoiser, (x_t, t, **cond) -> (x0, eps), in the times of the student; None: none.
        solver: of its trajectories: `euler`, which is DDIM, or `heun`, of second order, which asks twice a step.
        num_substeps: of the solver for one step of the student.
        scale: of the guidance, which students of it have for good; 1 is none.

    Raises:
        ValueError: if there is no such solver, or num_substeps is less than 1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Callable[[Denoiser], Denoise] | None = None,
        solver: str = "heun",
        num_substeps: int = 1,
        scale: float = 1.0,
    ):
        if solver not in SOLVERS:
            raise ValueError(f"objective.teacher.solver={solver}: choose one of {', '.join(SOLVERS)}")
        if num_substeps < 1:
            raise ValueError(f"objective.teacher.num_substeps={num_substeps} must be at least 1")
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.guidance = guidance or (lambda denoiser: denoiser)
        self.solver = solver
        self.num_substeps = num_substeps
        self.scale = scale
        self._on: tuple[Schedule, Denoise] | None = None  # the last one asked for

    def step(self, schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """x_s, on the teacher's trajectory through x_t.

        Args:
            schedule: of the path on which x_t lies.
            x_t: (B, C, H, W).
            t: now, (B,).
            s: next, (B,); a step to 0 is Euler's.
            cond: what the network is told.
        """
        denoise = self.on(schedule)
        times = [torch.lerp(t, s, i / self.num_substeps) for i in range(self.num_substeps)]
        for now, then in pairwise([*times, s]):
            first = denoise(x_t, now, **cond)
            x_s = step(schedule, x_t, now, then, first)
            if self.solver == "heun":
                second = step(schedule, x_t, now, then, mean(first, denoise(x_s, then, **cond)))
                x_s = torch.where(expand_like(then > 0, x_t), second, x_s)
            x_t = x_s
        return x_t

    def on(self, schedule: Schedule) -> Denoise:
        """The teacher as a denoiser of another schedule, without a gradient.

        Where there is more noise than it knows, it is asked at its own t_max, and eps follows from its x0.
        """
        if self._on and self._on[0] is schedule:
            return self._on[1]
        own = on_path(self.denoiser, schedule)
        known, guided = own.schedule, self.guidance(own)

        @torch.no_grad()
        def denoise(x_t: Tensor, t: Tensor, **cond: Tensor) -> Estimate:
            if next(own.parameters(), x_t).device != x_t.device:  # moving looks at each parameter, at each call
                own.to(x_t.device)
            x0, eps, _ = guided(x_t, t.clamp(max=known.t_max), **cond)
            alpha, sigma = (expand_like(c.to(x_t), x_t) for c in schedule(t))
            return Estimate(x0, torch.where(expand_like(t > known.t_max, x_t), (x_t - alpha * x0) / sigma, eps))

        self._on = schedule, denoise
        return denoise


@contextmanager
def teaching(denoiser: Denoiser, batch: Batch, profile: str | None) -> Iterator[None]:
    """For the length of a `with`, a student is its own teacher: with averaged weights, no dropout and no gradient."""
    training = denoiser.training
    with torch.no_grad(), batch.lent(profile):
        denoiser.eval()
        try:
            yield
        finally:
            denoiser.train(training)


def explained(
    teacher: Teacher | None,
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    sample: Estimate,
) -> Estimate:
    """What is said of x_t: by a teacher, or where there is none by the sample itself."""
    return sample if teacher is None else teacher.on(schedule)(x_t, t, **cond)


def needed(teacher: Teacher | None, method: str) -> Teacher:
    """The teacher of a method that has nothing to learn without one.

    Raises:
        ValueError: if there is none.
    """
    if teacher is None:
        raise ValueError(f"objective={method} learns from a teacher: take objective/teacher=run")
    return teacher


def baked(teacher: Teacher | None) -> float:
    """The scale of guidance that a student has of its teacher."""
    return 1.0 if teacher is None else teacher.scale


def absent(**options: object) -> None:
    """None, whatever an experiment says of it: no teacher, so that each sample speaks for itself, or no critic."""


def check_start(denoiser: Denoiser) -> None:
    """See that a student's x0 can be had where it begins.

    Raises:
        ValueError: if an error of its output is enlarged too much, with the way out.
    """
    schedule = denoiser.schedule
    t = torch.tensor(schedule.t_max, dtype=torch.float64)
    level = schedule(t)
    factor = float((level.sigma / determinant(denoiser.prediction(schedule, t), level)).abs())
    if factor > MOST:
        raise ValueError(
            f"an error of what this prediction says is {factor:.0f} times as large in x0 at t={schedule.t_max:g}, "
            "where a student begins: take noise=flow prediction=flow, or another prediction, after a short training of "
            "the teacher's weights; or let it begin earlier, with noise.t_max, where the schedule has it"
        )


def check_flow_map(denoiser: Denoiser) -> None:
    """See that a student has a velocity on the straight path, and is told where it will land.

    Raises:
        ValueError: if not, with the way out.
    """
    t = torch.linspace(0, denoiser.schedule.t_max, 5, dtype=torch.float64)
    alpha, sigma = denoiser.schedule(t)
    if not (torch.allclose(alpha, 1 - t) and torch.allclose(sigma, t)):
        raise ValueError("the objective learns velocities on the straight path: take noise=flow prediction=flow")
    if not getattr(denoiser.network, "lands", False):
        raise ValueError(
            "the objective teaches where a step lands, of which this network is not told: take model.lands=true"
        )
    check_start(denoiser)
