"""Continuous-time consistency: what is said does not change along a trajectory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule
from dit.objective.derivative import Derivative
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, baked, check_start, explained


class ContinuousConsistency(Objective):
    """E w |v - sg(v + g)|^2, g = cos t df / dt, normalised: sCM on TrigFlow (arXiv:2410.11081, algorithm 1).

    On the quarter circle x_t = cos t x0 + sin t eps the student's v = cos t eps - sin t x0 makes f = cos t x_t - sin t
    v of it, what it says of x0. Along the trajectory, dx_t / dt the teacher's v, or without one that of the sample,

        g = -cos^2 t (v - dx / dt) - r (cos t sin t x_t + cos t sin t dv / dt),    g <- g / (|g| + c),

    r rises from 0 to 1, |g| is a root mean square. Sampled by `sampler/consistency.py` in any number of steps.

    The derivative wants a time embedding without high frequencies. As it hands on what is learned at a time to times
    beyond, an error moves like a wave, which momentum can make grow: on the digits an optimizer without is steady.

    Args:
        times: the density of t, (schedule, u) -> t, both (B,).
        derivative: of v, `derivative.jvp` or `central`.
        teacher: None: there is none (sCT).
        warmup_steps: in which r rises.
        c: of the normalisation.
        weigh_noise: w = 1 / tan t, else 1.
        uncertainty: log SNR -> u, both (B,), learned: an image's loss becomes w e / exp(u) + u.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        times: Callable[[Schedule, Tensor], Tensor],
        derivative: Derivative,
        teacher: Teacher | None = None,
        warmup_steps: int = 10_000,
        c: float = 0.1,
        weigh_noise: bool = False,
        uncertainty: nn.Module | None = None,
    ):
        super().__init__()
        if warmup_steps < 0 or not c > 0:
            raise ValueError(f"objective.warmup_steps={warmup_steps} must not be negative, and c={c} must be positive")
        self.times = times
        self.derivative = derivative
        self.teacher = teacher
        self.warmup_steps = warmup_steps
        self.c = c
        self.weigh_noise = weigh_noise
        self.uncertainty = uncertainty

    def few_step(self, step: int | None = None) -> FewStep:
        """In any number of steps."""
        return FewStep("continuous_consistency", "consistency", None, baked(self.teacher))

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what is not on the quarter circle."""
        t = torch.linspace(0, denoiser.schedule.t_max, 5, dtype=torch.float64)
        alpha, sigma = denoiser.schedule(t)
        if not (torch.allclose(alpha, t.cos()) and torch.allclose(sigma, t.sin())):
            raise ValueError(
                "the objective is that of noise=trigonometric; of a teacher on another schedule, the student begins as "
                "its equal there with noise=matched prediction=matched"
            )
        check_start(denoiser)

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule = batch.x0, denoiser.schedule
        t = self.times(schedule, batch.draw.uniform("t")).to(x0)  # (B,)
        eps = batch.draw.normal("eps", x0.shape[1:]).to(x0)  # (B, C, H, W)
        cos, sin = (expand_like(c, x0) for c in (t.cos(), t.sin()))
        x_t = cos * x0 + sin * eps

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            batch.draw.seed_layers()  # a network and its derivative have the same dropout
            said = denoiser(x_t, t, **batch.cond)
            return expand_like(t.cos(), x_t) * said.eps - expand_like(t.sin(), x_t) * said.x0

        said = explained(self.teacher, schedule, x_t, t, batch.cond, Estimate(x0, eps))
        dx = cos * said.eps - sin * said.x0
        rate = self.derivative(velocity, (x_t, t), (cos * sin * dx, t.cos() * t.sin()))
        v = velocity(x_t, t)
        r = min(1.0, (step + 1) / (self.warmup_steps + 1))
        g = -(cos**2) * (v.detach() - dx) - r * (cos * sin * x_t + rate)
        g = g / (expand_like(g.flatten(1).square().mean(dim=1).sqrt(), g) + self.c)
        error = (v - (v.detach() + g)).float().square().flatten(1).mean(dim=1)  # (B,)
        if self.weigh_noise:
            error = error / t.tan().float()
        if self.uncertainty is not None:
            u = self.uncertainty(schedule.log_snr(t))
            error = error * (-u).exp() + u
        yield "denoiser", error.mean()
