"""Plain denoising: regress the network's output on what its prediction says it is."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dit.noise.bound import nats
from dit.noise.denoiser import Denoiser, Output, expand_like
from dit.noise.draw import SPREADS
from dit.noise.prediction import determinant
from dit.noise.schedule import Schedule
from dit.noise.times import num_discrete_steps
from dit.objective.objective import Batch, Objective

MOST = 1e10  # that an error of F may count; of schedules without discrete steps more is a weight without bound


class Denoising(Objective):
    """E w(t) |F(alpha x0 + sigma eps, t) - (a x0 + b eps)|^2, mean over all elements.

    With prediction eps this is DDPM's simple loss (arXiv:2006.11239, equation 14), with flow it is flow matching
    (arXiv:2210.02747), with edm EDM's weighted loss (arXiv:2206.00364, equation 8). The loss in another space than the
    network predicts is a weight, too (`noise/weight.py`).

    Args:
        times: the density of t, (schedule, u) -> t, both (B,).
        weight: (schedule, t) -> the weight of |x0_hat - x0|^2, both (B,).
        max_weight: no error of F counts more than that; None: no limit.
        spread: how the times lie to each other over the batch: independent, stratified or low_discrepancy.
        bound_weight: of the variational bound in bits per dimension, by which the variance is learned, and nothing else
            (arXiv:2102.09672, section 3.1); 0: no such term. The published DiT has 1.
        uncertainty: log SNR -> u, both (B,), learned: an image's loss becomes w e / exp(u) + u (arXiv:2312.02696).

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        times: Callable[[Schedule, Tensor], Tensor],
        weight: Callable[[Schedule, Tensor], Tensor],
        max_weight: float | None = None,
        spread: str = "independent",
        bound_weight: float = 0.0,
        uncertainty: nn.Module | None = None,
    ):
        super().__init__()
        if not bound_weight >= 0:
            raise ValueError(f"objective.bound_weight={bound_weight} must not be negative: 0 is none")
        if spread not in SPREADS:
            raise ValueError(f"objective.spread={spread}: choose one of {', '.join(SPREADS)}")
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"objective.max_weight={max_weight} must be positive, or null")
        self.times = times
        self.weight = weight
        self.max_weight = max_weight
        self.spread = spread
        self.bound_weight = bound_weight
        self.uncertainty = uncertainty

    def check(self, denoiser: Denoiser) -> None:
        """Refuse what is known beforehand not to work."""
        u = torch.linspace(0, 1 - 1e-6, 8)
        if not (most := self.weight_of_f(denoiser, self.times(denoiser.schedule, u)).max()) < MOST:
            raise ValueError(
                f"objective.max_weight={'null' if self.max_weight is None else self.max_weight}, but with this weight, "
                f"prediction and times a squared error may count {most:.0e}: give objective.max_weight=400, or take "
                "another weight, like weight=none"
            )
        if self.bound_weight:
            if (num_steps := self._num_steps(denoiser)) < 2:
                raise ValueError(
                    f"objective.bound_weight={self.bound_weight} wants noise.num_steps of at least 2, not {num_steps}"
                )
            if not getattr(denoiser.network, "learn_sigma", False):
                raise ValueError(
                    f"objective.bound_weight={self.bound_weight} is for a learned variance, which this network does "
                    "not have: model.learn_sigma=true gives it one"
                )

    def phases(self, denoiser: Denoiser, batch: Batch, step: int) -> Iterator[tuple[str, Tensor]]:
        """One phase, for the denoiser."""
        x0, schedule = batch.x0, denoiser.schedule
        t = self.times(schedule, batch.draw.uniform("t", self.spread))  # (B,)
        eps = batch.draw.normal("eps", x0.shape[1:])  # (B, C, H, W)
        alpha, sigma = (expand_like(c, x0) for c in schedule(t))
        a, b = (expand_like(c, x0) for c in denoiser.prediction(schedule, t))
        x_t = alpha * x0 + sigma * eps
        output = denoiser.output(x_t, t, **batch.cond)
        error = (output.f - (a * x0 + b * eps)).square().flatten(1).mean(dim=1)  # (B,)
        error = self.weight_of_f(denoiser, t).to(error) * error
        if self.uncertainty is not None:
            u = self.uncertainty(schedule.log_snr(t))
            error = error * (-u).exp() + u
        loss = error.mean()
        if self.bound_weight:
            loss = loss + self.bound_weight * self._bits(denoiser, output, x0, x_t, t)
        yield "denoiser", loss

    def weight_of_f(self, denoiser: Denoiser, t: Tensor) -> Tensor:
        """What the error of F counts at t (B,): w (sigma / det)^2 for a weight w of that of x0."""
        t, schedule = t.double(), denoiser.schedule
        level = schedule(t)
        weight = self.weight(schedule, t) * (level.sigma / determinant(denoiser.prediction(schedule, t), level)) ** 2
        return weight if self.max_weight is None else weight.clamp(max=self.max_weight)

    def _num_steps(self, denoiser: Denoiser) -> int:
        return num_discrete_steps(
            denoiser.schedule, f"objective.bound_weight={self.bound_weight}", "objective.bound_weight=0"
        )

    def _bits(self, denoiser: Denoiser, output: Output, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The variational bound's term of a discrete schedule from t to the step before, of the variance alone."""
        t = t.double()
        step = denoiser.schedule.t_max / self._num_steps(denoiser)
        s = ((t / step).round() - 1).clamp(min=0) * step
        estimate = denoiser.estimate(Output(output.f.detach(), output.variance), x_t, t)
        return nats(denoiser.schedule, estimate, x0, t, s).mean() / math.log(2)
