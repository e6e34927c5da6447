"""Guidance distillation: say in one evaluation what a guided teacher says in two."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.schedule import Schedule
from dit.noise.step import point
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, needed


class GuidanceDistillation(Objective):
    """E |F(x_t, t, w) - (a x0_w + b eps_w)|^2, where (x0_w, eps_w) is what a teacher guided with scale w says of x_t.

    The first stage of arXiv:2210.03142, but for the scale: there 1 + w is ours, of which 1 is no guidance. Either w is
    the teacher's own scale, which the student then has for good; or it is drawn for each sample and told to the student
    (`model.guided`), which is then sampled with `guidance=told`. Drawn it is in as many steps as a denoiser is.

    Args:
        teacher: guided.
        times: the density of t, (schedule, u) -> t, both (B,).
        scales: [first, last], between which w is drawn; None: the teacher's own.

    Raises:
        ValueError: if there is no guidance to learn, or the scales do not rise.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        times: Callable[[Schedule, Tensor], Tensor],
        scales: Sequence[float] | None = None,
    ):
        super().__init__()
        teacher = needed(teacher, "guidance_distillation")
        if scales is None and teacher.scale == 1:
            raise ValueError(
                "objective.teacher.scale=1 is no guidance, so that there is nothing to learn: give another, like "
                "objective.teacher.scale=2, or objective.scales=[1,4]"
            )
        if scales is not None:
            if len(scales) != 2 or not 0 <= scales[0] < scales[1]:
                raise ValueError(f"objective.scales={list(scales)} must be two rising scales, like [1,4]")
            if teacher.scale != 1:
                raise ValueError(
                    f"objective.teacher.scale={teacher.scale} and objective.scales={list(scales)}: give one of them"
                )
        self.teacher = teacher
        self.times = times
        self.scales = None if scales is None else list(scales)

    def few_step(self, step: int | None = None) -> FewStep:
        """As any denoiser, but for guidance."""
        return FewStep("guidance_distillation", None, None, self.scales or self.teacher.scale)

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a network that is not told the scale that is drawn, or the other way round."""
        if (guided := getattr(denoiser.network, "guided", False)) != (self.scales is not None):
            raise ValueError(
                f"objective.scales={self.scales or 'null'}, but model.guided={str(guided).lower()}: scales are drawn "
                "for a network that is told them; take objective.scales=[1,4] model.guided=true, or neither"
            )

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule, told = batch.x0, denoiser.schedule, dict(batch.cond)
        t = self.times(schedule, batch.draw.uniform("t"))  # (B,)
        x_t = point(schedule, t, x0, batch.draw.normal("eps", x0.shape[1:]))  # (B, C, H, W)
        if self.scales is not None:
            first, last = self.scales
            told["scale"] = first + (last - first) * batch.draw.uniform("w")  # (B,)
        said = self.teacher.on(schedule)(x_t, t, **told)
        a, b = (expand_like(c, x_t) for c in denoiser.prediction(schedule, t))
        f = denoiser.output(x_t, t, **told).f
        yield "denoiser", (f - (a * said.x0 + b * said.eps)).square().mean()
