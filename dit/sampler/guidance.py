"""Guidance: a wrapped denoiser, same call in, same call out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser, expand_like
from dit.noise.prediction import Estimate

Null = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Guidance(ABC):
    """estimate = worse + scale (told - worse), for a worse estimate at the same x_t.

    As both share x_t, the same image results whatever the network predicts. Scale 1 is no guidance, and then costs
    nothing.

    Args:
        denoiser: (x_t, t, **cond) -> (x0, eps).
        null: cond -> cond of the same shapes that says nothing.
        scale: more than 1 goes away from the worse estimate; 0 is that estimate.
        interval: [first, last], the times t at which to guide; elsewhere it costs nothing (arXiv:2404.07724).
        rescale: in [0, 1], how far the standard deviation of each x0 is brought back to what it is without guidance
            (arXiv:2305.08891, section 3.4).
        clip: pixels only: keep x0 within [-clip, clip].
        dynamic_clip: pixels only, a share p like 0.995: keep x0 within [-q, q], where q is the p-quantile of |x0| in an
            image, at least clip (1 if null), and divide by q / clip (arXiv:2205.11487, section 2.3).

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null: Null,
        *,
        scale: float = 1.0,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        clip: float | None = None,
        dynamic_clip: float | None = None,
    ):
        if not scale >= 0:
            raise ValueError(f"guidance.scale={scale} must not be negative: 1 is no guidance")
        if interval is not None:
            _check_interval(interval, denoiser)
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance.rescale={rescale} must lie in [0, 1]: 0 is none")
        if clip is not None and not clip > 0:
            raise ValueError(f"guidance.clip={clip} must be positive, or null")
        if dynamic_clip is not None and not 0 < dynamic_clip <= 1:
            raise ValueError(f"guidance.dynamic_clip={dynamic_clip} must lie in (0, 1], like 0.995, or be null")
        self.denoiser = denoiser
        self.null = null
        self.scale = scale
        self.interval = interval
        self.rescale = rescale
        self.clip = clip
        self.dynamic_clip = dynamic_clip

    @abstractmethod
    def pair(self, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Mapping[str, Tensor]) -> tuple[Estimate, Estimate]:
        """The estimate of the denoiser, and the worse one."""

    def __call__(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, scale: Tensor | None = None, **cond: Tensor
    ) -> Estimate:
        """The guided estimate of (x0, eps); scale, (B,), takes the place of the one for all."""
        first, last = self.interval or (0.0, math.inf)
        inside = (first <= t) & (t <= last)
        wanted = self.scale if scale is None else scale.double()
        if (scale is None and self.scale == 1) or not inside.any():
            estimate = self.denoiser(x_t, t, s, **cond)
        else:
            told, worse = self.pair(x_t, t, s, cond)
            factor = expand_like((1 + (wanted - 1) * inside.double()).to(x_t.dtype), x_t)
            x0, eps = (b + factor * (a - b) for a, b in ((told.x0, worse.x0), (told.eps, worse.eps)))
            estimate = Estimate(x0, eps, told.variance)
            if self.rescale:
                estimate = self._with_x0(torch.lerp(x0, x0 * _std(told.x0) / _std(x0), self.rescale), estimate, x_t, t)
        if self.clip is None and self.dynamic_clip is None:
            return estimate
        return self._with_x0(self._clipped(estimate.x0), estimate, x_t, t)

    def _with_x0(self, x0: Tensor, estimate: Estimate, x_t: Tensor, t: Tensor) -> Estimate:
        """The estimate with another x0, and eps to match."""
        alpha, sigma = (expand_like(c, x_t) for c in self.denoiser.schedule(t))
        return Estimate(x0, (x_t - alpha * x0) / sigma, estimate.variance)

    def _clipped(self, x0: Tensor) -> Tensor:
        bound = 1.0 if self.clip is None else self.clip
        if self.dynamic_clip is None:
            return x0.clamp(-bound, bound)
        quantile = torch.quantile(x0.flatten(1).abs().float(), self.dynamic_clip, dim=1).to(x0)
        most = expand_like(quantile.clamp(min=bound), x0)
        return x0.clamp(-most, most) * (bound / most)


class ClassifierFree(Guidance):
    """Worse is what the network says when it is told nothing (arXiv:2207.12598); both run as one batch of 2B.

    Args:
        denoiser: (x_t, t, **cond) -> (x0, eps).
        null: cond -> cond of the same shapes that says nothing.
        channels: guide only so many channels, the first; None: all. 3 of 4 is what the published DiT samples with.
        **options: those of `Guidance`.

    Raises:
        ValueError: if a value is out of range, or the condition cannot be left out.
    """

    def __init__(self, denoiser: Denoiser, null: Null, *, channels: int | None = None, **options: Any):
        super().__init__(denoiser, null, **options)
        if channels is not None and not (isinstance(channels, int) and channels >= 1):
            raise ValueError(f"guidance.channels={channels} must be a whole number of at least 1, or null for all")
        if self.scale != 1:
            null({})
        self.channels = channels

    def pair(self, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Mapping[str, Tensor]) -> tuple[Estimate, Estimate]:
        """What it says when it is told, and when not."""
        null = self.null(cond)
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        twice = (torch.cat([time, time]) if time is not None and time.ndim else time for time in (t, s))
        doubled = self.denoiser(torch.cat([x_t, x_t]), *twice, **both)
        told, nothing = (_half(doubled, part, len(x_t)) for part in (0, 1))
        if self.channels is not None:
            for ours, theirs in ((nothing.x0, told.x0), (nothing.eps, told.eps)):
                ours[:, self.channels :] = theirs[:, self.channels :]
        return told, nothing


class Told:
    """No guidance, but a network that was taught what it leads to, by its scale (`model.guided`): arXiv:2210.03142.

    Args:
        denoiser: (x_t, t, scale=..., **cond) -> (x0, eps).
        null: unused.
        scale: what the network is told; 1 is no guidance.

    Raises:
        ValueError: if the network is not told any.
    """

    def __init__(self, denoiser: Denoiser, null: Null, *, scale: float = 1.0):
        if not getattr(denoiser.network, "guided", False):
            raise ValueError("guidance=told is for a network with model.guided=true: take guidance=classifier_free")
        self.denoiser = denoiser
        self.scale = scale

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor | None = None, **cond: Tensor) -> Estimate:
        """The estimate of (x0, eps) that the network knows to be guided."""
        estimate: Estimate = self.denoiser(x_t, t, s, scale=x_t.new_full((len(x_t),), self.scale), **cond)
        return estimate


class Autoguidance(Guidance):
    """Worse is a smaller or less trained network, told the same (arXiv:2406.02507).

    Args:
        denoiser: (x_t, t, **cond) -> (x0, eps).
        null: unused.
        weak: the weaker denoiser, on the same schedule; it may predict something else.
        **options: those of `Guidance`.

    Raises:
        ValueError: if a value is out of range, or the schedules differ.
    """

    def __init__(self, denoiser: Denoiser, null: Null, *, weak: Denoiser, **options: Any):
        super().__init__(denoiser, null, **options)
        t = torch.linspace(0, denoiser.schedule.t_max, 5, dtype=torch.float64)
        for ours, theirs in zip(denoiser.schedule(t), weak.schedule(t.clamp(max=weak.schedule.t_max)), strict=True):
            if not torch.allclose(ours, theirs):
                raise ValueError("guidance.weak has another schedule: its run must have had the same noise")
        self.weak = weak.eval()

    def pair(self, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Mapping[str, Tensor]) -> tuple[Estimate, Estimate]:
        """What the denoiser says, and what the weaker one."""
        return self.denoiser(x_t, t, s, **cond), self.weak.to(x_t.device)(x_t, t, s, **cond)


def _std(x: Tensor) -> Tensor:
    """The standard deviation within each image, (B, 1, 1, 1)."""
    return expand_like(x.flatten(1).std(dim=1), x)


def _check_interval(interval: Sequence[float], denoiser: Denoiser) -> None:
    """Two rising times, of which the schedule has some."""
    numbers = isinstance(interval, Sequence) and all(isinstance(time, int | float) for time in interval)
    if not numbers or len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(f"guidance.interval={interval} must be two rising times, like [0.1, 0.7]")
    if interval[0] >= denoiser.schedule.t_max:
        raise ValueError(f"guidance.interval={interval} lies beyond the schedule's t_max={denoiser.schedule.t_max:g}")


def _half(doubled: Estimate, part: int, batch: int) -> Estimate:
    """The first or the second half of the rows."""
    rows = slice(part * batch, (part + 1) * batch)
    variance = None if doubled.variance is None else doubled.variance[rows]
    return Estimate(doubled.x0[rows], doubled.eps[rows], variance)
