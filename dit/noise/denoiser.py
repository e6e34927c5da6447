"""A network given its meaning: noisy x_t in, an estimate of (x0, eps) out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dit.noise.prediction import Estimate, Prediction, determinant, solve
from dit.noise.schedule import Schedule


class Output(NamedTuple):
    """What the network says."""

    f: Tensor  # F, (B, C, H, W)
    variance: Tensor | None  # as in Estimate


class Denoiser(nn.Module):
    """The only owner of the schedule: F(c_in x_t, c_noise) = a x0 + b eps, solved for (x0, eps).

    A flow map is told where it will land, at s <= t, and its (x0, eps) are those with which one step lands there.

    Args:
        network: `network(x, time, **cond)`, x (B, C, H, W), time (B,), to (B, C, H, W), or (B, 2C, H, W) where the
            second half is a learned variance. One whose `lands` is true is told `gap`, (t - s) / t_max, (B,), too.
        schedule: t -> (alpha, sigma).
        prediction: (schedule, t) -> (a, b).

    Raises:
        ValueError: if at t_max the prediction says nothing of x0 on this schedule.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        t = torch.tensor(schedule.t_max, dtype=torch.float64)
        (a, b), (alpha, sigma) = coefficients, level = prediction(schedule, t), schedule(t)
        if abs(determinant(coefficients, level)) < 1e-12:
            name = getattr(getattr(prediction, "func", prediction), "__name__", "")
            raise ValueError(
                f"prediction={name}, F = {a:g} x0 + {b:g} eps, cannot be solved for x0 at the end of this noise, "
                f"t={schedule.t_max:g}, where alpha={alpha:g}, sigma={sigma:g}: choose another prediction (v works "
                "everywhere), or let sampling begin a little earlier, with noise.zero_terminal_snr=false or "
                f"noise.t_max={0.999 * schedule.t_max:.4g}, where the schedule has it"
            )

    def output(self, x_t: Tensor, t: Tensor, s: Tensor | None = None, **cond: Tensor) -> Output:
        """The network's output; objectives regress its F. t and s are (B,) or (); without s, at t."""
        batch, channels = x_t.shape[:2]
        scale = self.schedule.input_scale(t).to(x_t)
        exact = torch.promote_types(x_t.dtype, torch.float32)  # bfloat16 does not tell 999 from 1000
        time = self.schedule.time_input(t).to(x_t.device, exact).expand(batch)
        if getattr(self.network, "lands", False) and s is not None:
            cond["gap"] = ((t - s) / self.schedule.t_max).to(x_t.device, exact).expand(batch)
        f: Tensor = self.network(expand_like(scale, x_t) * x_t, time, **cond).to(x_t.dtype)
        return Output(f[:, :channels], f[:, channels:] if f.shape[1] == 2 * channels else None)

    def estimate(self, output: Output, x_t: Tensor, t: Tensor) -> Estimate:
        """What an output at x_t says of (x0, eps)."""
        coefficients, level = self.prediction(self.schedule, t), self.schedule(t)
        x0, eps, _ = solve(
            type(coefficients)(*(expand_like(c, x_t) for c in coefficients)),
            type(level)(*(expand_like(c, x_t) for c in level)),
            output.f,
            x_t,
        )
        return Estimate(x0.to(x_t.dtype), eps.to(x_t.dtype), output.variance)  # t may be more exact

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor | None = None, **cond: Tensor) -> Estimate:
        """The estimate of (x0, eps), which samplers read; t and s are (B,) or (); without s, at t."""
        return self.estimate(self.output(x_t, t, s, **cond), x_t, t)


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, ...) to broadcast with x; () stays."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t
