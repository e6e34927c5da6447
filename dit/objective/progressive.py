"""Progressive distillation: one step of the student lands where two steps of its teacher do."""

from collections.abc import Callable, Iterator

from torch import Tensor

from dit.noise.denoiser import Denoiser
from dit.noise.schedule import Schedule
from dit.noise.step import point, secant, step
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, baked, check_start, needed, teaching


class Progressive(Objective):
    """E w(t) |x0_hat(x_t, t) - x0*|^2, x0* of the step that lands on x_s (arXiv:2202.00512, algorithm 2).

    The training is divided into stages of equal length, in which a student learns to take N = 2^(num_stages - 1), ...,
    4, 2 and at last 1 step of a grid: from the teacher at first, later from itself as it was at the end of the stage
    before. Whatever the network predicts, x0* is the `secant` of x_t and x_s; on flow it is the mean velocity. A
    student of N steps draws well in N steps alone, so that the checkpoint of each stage is worth keeping
    (`trainer.keep_every_steps`).

    Args:
        teacher: of the first stage.
        grid: (schedule, num_steps=...) -> times (num_steps + 1,).
        weight: (schedule, t) -> the weight of |x0_hat - x0*|^2, both (B,).
        num_stages: how many.
        max_steps: of the training.
        before: the profile of the moving average that has the weights of the end of the stage before (`held`).

    Raises:
        ValueError: if the steps do not divide among the stages, or there is no teacher.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        grid: Callable[..., Tensor],
        weight: Callable[[Schedule, Tensor], Tensor],
        num_stages: int,
        max_steps: int,
        before: str = "before",
    ):
        super().__init__()
        if num_stages < 1 or max_steps % num_stages:
            raise ValueError(
                f"trainer.max_steps={max_steps} must be a multiple of objective.num_stages={num_stages}, which is at "
                "least 1: each stage has as many steps"
            )
        self.teacher = needed(teacher, "progressive")
        self.grid = grid
        self.weight = weight
        self.num_stages = num_stages
        self.stage_steps = max_steps // num_stages
        self.before = before

    @property
    def profiles(self) -> tuple[str, ...]:
        """That of the stage before."""
        return (self.before,) if self.num_stages > 1 else ()

    def few_step(self, step: int | None = None) -> FewStep:
        """In the number of steps of the stage that it is in, or has just ended."""
        stage = self.num_stages - 1 if step is None else self._stage(max(step - 1, 0))
        return FewStep("progressive", "flow_map", [self._num_steps(stage)], baked(self.teacher))

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a student whose x0 cannot be had at t_max."""
        check_start(denoiser)
        self.grid(denoiser.schedule, num_steps=2**self.num_stages)

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule = batch.x0, denoiser.schedule
        stage = self._stage(step)
        num_steps = self._num_steps(stage)
        times = self.grid(schedule, num_steps=2 * num_steps).to(x0.device)
        n = (batch.draw.uniform("t") * num_steps).long().clamp(max=num_steps - 1)  # (B,)
        t, between, s = times[2 * n], times[2 * n + 1], times[2 * n + 2]
        x_t = point(schedule, t, x0, batch.draw.normal("eps", x0.shape[1:]))  # (B, C, H, W)
        x_s = x_t
        for now, then in ((t, between), (between, s)):
            if stage == 0:
                x_s = self.teacher.step(schedule, x_s, now, then, batch.cond)
            else:
                x_s = self._itself(denoiser, x_s, now, then, batch)
        target = secant(schedule, x_t, x_s, t, s).x0
        error = (denoiser(x_t, t, **batch.cond).x0 - target).square().flatten(1).mean(dim=1)  # (B,)
        yield "denoiser", (self.weight(schedule, t).to(error) * error).mean()

    def _stage(self, step: int) -> int:
        return min(step // self.stage_steps, self.num_stages - 1)

    def _num_steps(self, stage: int) -> int:
        return 2 ** int(self.num_stages - 1 - stage)

    def _itself(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """x_s by a step of the student as it was."""
        with teaching(denoiser, batch, self.before):
            return step(denoiser.schedule, x_t, t, s, denoiser(x_t, t, **batch.cond))
