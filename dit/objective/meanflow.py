"""MeanFlow: the mean velocity between any two times, from the velocity at one of them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule
from dit.noise.step import point
from dit.objective.derivative import Derivative
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, baked, check_flow_map, explained


class MeanFlow(Objective):
    """E w |u + (t - s) sg(du / dt) - v|^2, u(x_t, t, s) = eps - x0 of a flow map, du / dt along its trajectory.

    (t - s) u is the integral of the velocity v from s to t; differentiated by t that is u + (t - s) du / dt = v
    (arXiv:2505.13447, equation 6), du / dt = (v d/dx + d/dt) u. Sampled by `sampler/flow_map.py` in any number of
    steps.

    Args:
        times: the density of t and s, (schedule, u) -> t, both (B,); s is the smaller of two.
        derivative: of u, `derivative.jvp` or `central`.
        teacher: whose velocity v is; None: eps - x0 of the sample, the mean of which it is.
        equal: the share of samples with s = t, where the loss is flow matching.
        own_direction: du / dt along the network's own velocity, u(x_t, t, t), of which, without a teacher, v is but
            a sample (improved MeanFlow, arXiv:2512.02012).
        power: p of w = 1 / (|error|^2 + c)^p, not differentiated; 0: none.
        c: of that, for the mean square of the error.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        times: Callable[[Schedule, Tensor], Tensor],
        derivative: Derivative,
        teacher: Teacher | None = None,
        equal: float = 0.75,
        own_direction: bool = False,
        power: float = 1.0,
        c: float = 1e-3,
    ):
        super().__init__()
        if not 0 <= equal < 1:
            raise ValueError(f"objective.equal={equal} must lie in [0, 1): at 1 no mean is learned")
        if not power >= 0 or not c > 0:
            raise ValueError(f"objective.power={power} must not be negative, and c={c} must be positive")
        self.times = times
        self.derivative = derivative
        self.teacher = teacher
        self.equal = equal
        self.own_direction = own_direction
        self.power = power
        self.c = c

    def few_step(self, step: int | None = None) -> FewStep:
        """In any number of steps."""
        return FewStep("meanflow", "flow_map", None, baked(self.teacher))

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what is no flow map."""
        check_flow_map(denoiser)

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule, draw = batch.x0, denoiser.schedule, batch.draw
        one, other = (self.times(schedule, draw.uniform(name)).to(x0) for name in ("t", "s"))  # (B,)
        t, s = torch.maximum(one, other), torch.minimum(one, other)
        s = torch.where(draw.uniform("equal").to(x0) < self.equal, t, s)
        eps = draw.normal("eps", x0.shape[1:]).to(x0)  # (B, C, H, W)
        x_t = point(schedule, t, x0, eps)

        def velocity(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
            draw.seed_layers()  # a network and its derivative have the same dropout
            said: Estimate = denoiser(x_t, t, s, **batch.cond)
            return said.velocity

        v = explained(self.teacher, schedule, x_t, t, batch.cond, Estimate(x0, eps)).velocity
        with torch.no_grad():
            direction = velocity(x_t, t, t) if self.own_direction else v
        rate = self.derivative(velocity, (x_t, t, s), (direction, torch.ones_like(t), torch.zeros_like(s)))
        difference = velocity(x_t, t, s) + expand_like(t - s, x0) * rate - v
        error = difference.float().square().flatten(1).mean(dim=1)  # (B,)
        yield "denoiser", (error / (error.detach() + self.c) ** self.power).mean()
