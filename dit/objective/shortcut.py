"""Shortcut models: a step of any length lands where two of half the length do."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.prediction import Estimate
from dit.noise.schedule import Schedule
from dit.noise.step import point
from dit.objective.objective import Batch, FewStep, Objective
from dit.objective.teacher import Teacher, baked, check_flow_map, explained, teaching


class Shortcut(Objective):
    """E |u(x_t, t, s) - u*|^2, u = eps - x0 of a flow map (arXiv:2410.12557).

    In a share of the samples s = t - d, d = 2^-k t_max, k in 0..most, and u* is the mean of two of its own steps of
    half the length, with averaged weights; in the others s = t, and u* is the velocity: flow matching. Sampled by
    `sampler/flow_map.py` in 1, 2, 4, ... steps.

    Args:
        times: the density of t where s = t, (schedule, u) -> t, both (B,).
        teacher: whose velocity u* is; None: eps - x0 of the sample, the mean of which it is.
        share: of the samples that learn from two steps; of each lane its first, at least one and not all.
        most: the shortest step is 2^-most t_max; one half as long is taken for the velocity.
        target: the profile of the moving average that takes the two steps; None: the network's own weights.
        clip: u* of two steps is kept within [-clip, clip]; None: no limit.

    Raises:
        ValueError: if a value is out of range.
    """

    least_rows = 2  # of which one learns from two steps, and one the velocity

    def __init__(
        self,
        times: Callable[[Schedule, Tensor], Tensor],
        teacher: Teacher | None = None,
        share: float = 0.25,
        most: int = 6,
        target: str | None = "ema",
        clip: float | None = 4.0,
    ):
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"objective.share={share} must lie between 0 and 1")
        if not 0 <= most <= 16:
            raise ValueError(f"objective.most={most} must be from 0 to 16: the shortest step is 2^-most of the whole")
        if clip is not None and not clip > 0:
            raise ValueError(f"objective.clip={clip} must be positive, or null")
        self.times = times
        self.teacher = teacher
        self.share = share
        self.most = most
        self.target = target
        self.clip = clip

    @property
    def profiles(self) -> tuple[str, ...]:
        """The moving averages it asks for."""
        return () if self.target is None else (self.target,)

    def few_step(self, step: int | None = None) -> FewStep:
        """In as many steps as fit, one after the other, into the whole."""
        return FewStep("shortcut", "flow_map", [2**k for k in range(self.most + 1)], baked(self.teacher))

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what is no flow map."""
        check_flow_map(denoiser)

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule, draw = batch.x0, denoiser.schedule, batch.draw
        num_long = min(max(1, round(self.share * draw.rows)), draw.rows - 1)
        long = torch.arange(len(x0), device=x0.device) % draw.rows < num_long  # (B,), as many in each lane
        steps = 2 ** (draw.uniform("steps") * (self.most + 1)).long()  # (B,)
        at = 1 - (draw.uniform("at") * steps).floor() / steps
        t = torch.where(long, schedule.t_max * at, self.times(schedule, draw.uniform("t"))).to(x0)
        s = torch.where(long, t - schedule.t_max / steps, t).clamp(min=0).to(x0)
        eps = draw.normal("eps", x0.shape[1:]).to(x0)  # (B, C, H, W)
        x_t = point(schedule, t, x0, eps)
        target = explained(self.teacher, schedule, x_t, t, batch.cond, Estimate(x0, eps)).velocity
        cond = {name: value[long] for name, value in batch.cond.items()}
        target = target.masked_scatter(
            expand_like(long, x0), self._of_two(denoiser, x_t[long], t[long], s[long], cond, batch)
        )
        yield "denoiser", (denoiser(x_t, t, s, **batch.cond).velocity - target).square().mean()

    def _of_two(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: dict[str, Tensor], batch: Batch
    ) -> Tensor:
        """The mean velocity of two steps of half the length; of the shortest these are taken with the velocity."""
        between = (t + s) / 2
        shortest = (t - s) * 2**self.most <= denoiser.schedule.t_max * (1 + 1e-3)
        velocities = []
        with teaching(denoiser, batch, self.target):
            for now, then in ((t, between), (between, s)):
                velocities.append(denoiser(x_t, now, torch.where(shortest, now, then), **cond).velocity)
                x_t = x_t - expand_like(now - then, x_t) * velocities[-1]
        mean = (velocities[0] + velocities[1]) / 2
        return mean if self.clip is None else mean.clamp(-self.clip, self.clip)
