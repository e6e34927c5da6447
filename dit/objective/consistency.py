"""Consistency: what is said at t is what is said at s, a little further down the same trajectory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.schedule import Schedule
from dit.noise.step import point
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, baked, check_start


class Consistency(Objective):
    """E w d(f(x_t, t), sg f'(x_s, s)), f: the x0 of the student, of whatever schedule and prediction; f(x, 0) = x.

    x_s follows from x_t by one step of a teacher's ODE: consistency distillation (arXiv:2303.01469, algorithm 2), and
    LCM (arXiv:2310.04378), where student and teacher are DDPM's. Without a teacher x_s = alpha_s x0 + sigma_s eps, of
    the same noise as x_t: consistency training (algorithm 3; arXiv:2310.14189). d is the pseudo-Huber distance
    sqrt(|a - b|^2 + c^2) - c, for c = None |a - b|^2; over the number of values of an image, D.

    The student is sampled by `sampler/consistency.py`, in any number of steps.

    Args:
        interval: (schedule, u, progress) -> (t, s), such as `fixed` and `shrinking`; u uniform, (B,), progress in
            [0, 1).
        weight: w, (schedule, t) -> (B,), of |x0_hat - x0|^2; that of d is its root, but where d is a square.
        max_steps: of the training, for progress.
        teacher: None: there is none.
        target: whose weights f' has: those of a profile of the moving average, or None, the student's own.
        huber: c / sqrt(D); None: squares.
        weigh_gaps: and times 1 / (t - s) (arXiv:2310.14189, section 3.4).

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        interval: Callable[[Schedule, Tensor, float], tuple[Tensor, Tensor]],
        weight: Callable[[Schedule, Tensor], Tensor],
        max_steps: int,
        teacher: Teacher | None = None,
        target: str | None = None,
        huber: float | None = 0.00054,
        weigh_gaps: bool = False,
    ):
        super().__init__()
        if huber is not None and not huber >= 0:
            raise ValueError(f"objective.huber={huber} must not be negative, or null for squares")
        self.interval = interval
        self.weight = weight
        self.max_steps = max_steps
        self.teacher = teacher
        self.target = target
        self.huber = huber
        self.weigh_gaps = weigh_gaps

    @property
    def profiles(self) -> tuple[str, ...]:
        """The moving averages it asks for."""
        return () if self.target is None else (self.target,)

    def few_step(self, step: int | None = None) -> FewStep:
        """In any number of steps."""
        return FewStep("consistency", "consistency", None, baked(self.teacher))

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a student whose x0 cannot be had at t_max."""
        check_start(denoiser)
        self.interval(denoiser.schedule, torch.full((1,), 0.5), 0.0)

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule = batch.x0, denoiser.schedule
        t, s = self.interval(schedule, batch.draw.uniform("t"), step / self.max_steps)  # (B,), (B,)
        eps = batch.draw.normal("eps", x0.shape[1:])  # (B, C, H, W)
        x_t = point(schedule, t, x0, eps)
        x_s = (
            point(schedule, s, x0, eps) if self.teacher is None else self.teacher.step(schedule, x_t, t, s, batch.cond)
        )
        batch.draw.seed_layers()  # the same dropout for both
        with torch.no_grad(), batch.lent(self.target):
            said = denoiser(x_s, s, **batch.cond).x0
        target = torch.where(expand_like(s > 0, x_s), said, x_s)
        batch.draw.seed_layers()
        error = (denoiser(x_t, t, **batch.cond).x0 - target).float().flatten(1).square().mean(dim=1)  # (B,)
        error = self.weight(schedule, t).to(error) * error
        if self.huber is not None:
            error = (error + self.huber**2).sqrt() - self.huber
        if self.weigh_gaps:
            error = error / (t - s).to(error)
        yield "denoiser", error.mean()


def fixed(
    schedule: Schedule, u: Tensor, progress: float, *, grid: Callable[..., Tensor], num_steps: int
) -> tuple[Tensor, Tensor]:
    """A step of a grid of num_steps, each as likely as the others (arXiv:2303.01469, equation 7).

    Raises:
        ValueError: if the grid cannot be laid.
    """
    times = grid(schedule, num_steps=num_steps).to(u.device)
    n = (u * num_steps).long().clamp(max=num_steps - 1)
    return times[n], times[n + 1]


def doubling(
    schedule: Schedule, u: Tensor, progress: float, *, grid: Callable[..., Tensor], first: int = 10, last: int = 1280
) -> tuple[Tensor, Tensor]:
    """The same, the number of steps doubled again and again from first to last (arXiv:2310.14189, section 3.4).

    Raises:
        ValueError: if the numbers do not rise.
    """
    if not 1 <= first <= last:
        raise ValueError(f"objective.interval.first={first} must be at least 1, and at most last={last}")
    stages = (last // first).bit_length()
    return fixed(schedule, u, 0.0, grid=grid, num_steps=min(first * 2 ** int(progress * stages), last))


def shrinking(
    schedule: Schedule,
    u: Tensor,
    progress: float,
    *,
    times: Callable[[Schedule, Tensor], Tensor],
    stages: int = 8,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """S = t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), at least 0, in `stages` equal stages (arXiv:2406.14548).

    While s = 0 that is denoising, so that it goes on from a trained denoiser.

    Raises:
        ValueError: if a value is out of range.
    """
    if stages < 1 or not q > 1 or not k >= 0:
        raise ValueError(
            f"objective.interval: stages={stages} must be at least 1, q={q} more than 1, k={k} not negative"
        )
    t = times(schedule, u).double()
    gap = q ** -(int(progress * stages) + 1.0) * (1 + k * torch.sigmoid(-b * t))
    return t, (t * (1 - gap)).clamp(min=0)
