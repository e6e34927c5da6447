"""Reflow: flow matching on pairs, of the noise and of where a teacher's trajectory leads from it."""

from collections.abc import Callable, Iterator

from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.schedule import Schedule
from dit.noise.step import point
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import check_start


class Reflow(Objective):
    """E |F(alpha x0 + sigma eps, t) - (a x0 + b eps)|^2 of pairs (eps, x0) (arXiv:2209.03003, section 2.2).

    On flow that is the velocity eps - x0 of the straight path between the two. Paths of pairs hardly cross, as those
    of unrelated noise and data do, so that what is learned is nearly straight: few steps are enough, of any sampler.
    Pairs are those of eps, and not of x_t at the teacher's t_max, so that they are the same on every schedule.

    Args:
        times: the density of t, (schedule, u) -> t, both (B,).
        scale: of the guidance that the pairs were made with, which the student has for good; 1 is none.
    """

    paired = True

    def __init__(self, times: Callable[[Schedule, Tensor], Tensor], scale: float = 1.0):
        super().__init__()
        self.times = times
        self.scale = scale

    def few_step(self, step: int | None = None) -> FewStep:
        """As any denoiser, but for guidance."""
        return FewStep("reflow", None, None, self.scale)

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a student whose x0 cannot be had at t_max."""
        check_start(denoiser)

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        assert batch.eps is not None
        x0, eps, schedule = batch.x0, batch.eps, denoiser.schedule
        t = self.times(schedule, batch.draw.uniform("t"))  # (B,)
        a, b = (expand_like(c, x0) for c in denoiser.prediction(schedule, t))
        f = denoiser.output(point(schedule, t, x0, eps), t, **batch.cond).f
        yield "denoiser", (f - (a * x0 + b * eps)).square().mean()
