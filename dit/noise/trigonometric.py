"""The quarter circle."""

import math

from torch import Tensor

from dit.noise.schedule import NoiseLevel, Schedule


class Trigonometric(Schedule):
    """alpha = cos t, sigma = sin t: the time is the angle (GVP of arXiv:2401.08740; TrigFlow, arXiv:2410.11081).

    Its velocity is v, so that the predictions v and flow are one.

    Args:
        t_max: where sampling begins, pi / 2 for pure noise. There a prediction of the noise alone cannot be turned
            into x0: 1.569 serves it.

    Raises:
        ValueError: if t_max is outside (0, pi / 2].
    """

    def __init__(self, t_max: float = math.pi / 2):
        if not 0 < t_max <= math.pi / 2:
            raise ValueError(f"noise.t_max={t_max} must lie in (0, pi / 2]")
        self.t_max = t_max

    def __call__(self, t: Tensor) -> NoiseLevel:
        """(cos t, sin t)."""
        return NoiseLevel(t.cos().clamp(min=0), t.sin())  # in float32 pi / 2 is a little more than pi / 2

    def rate(self, t: Tensor) -> NoiseLevel:
        """(-sin t, cos t)."""
        return NoiseLevel(-t.sin(), t.cos())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """atan(exp(-log_snr / 2))."""
        return (-log_snr / 2).exp().atan().clamp(max=self.t_max)

    def straight(self, t: Tensor) -> Tensor:
        """Alpha + sigma, whatever t_max is."""
        return t.cos() + t.sin()
