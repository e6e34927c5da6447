"""How much an error counts at time t: weights of |x0_hat - x0|^2.

A weight is `f(schedule, t) -> (B,)`. Every published weight, whatever it was stated for, becomes one of the error in
x0, because an error in any space is one in x0: F_hat - F = -det / sigma (x0_hat - x0). A training objective turns it
into a weight of what its network predicts.
"""

from torch import Tensor

from dit.noise.prediction import Prediction, determinant
from dit.noise.schedule import Schedule


def mean_square(schedule: Schedule, t: Tensor, *, prediction: Prediction) -> Tensor:
    """The plain mean square in the space of another prediction, (det / sigma)^2.

    With flow for a network that predicts x0 it is the v-loss of pixel transformers (arXiv:2511.13720); with edm the
    weight of arXiv:2206.00364, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; with eps the SNR.
    """
    level = schedule(t)
    return (determinant(prediction(schedule, t), level) / level.sigma) ** 2


def min_snr(schedule: Schedule, t: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (arXiv:2303.09556)."""
    return _snr(schedule, t).clamp(max=_positive("gamma", gamma))


def soft_min_snr(schedule: Schedule, t: Tensor, *, gamma: float = 4.0) -> Tensor:
    """SNR gamma / (SNR + gamma), with gamma 4 = 1 / 0.5^2 that of arXiv:2401.11605, 1 / (sigma^2 + sigma_data^2)."""
    return 1 / (1 / _snr(schedule, t) + 1 / _positive("gamma", gamma))


def truncated_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """max(SNR, 1) (arXiv:2202.00512, section 4)."""
    return _snr(schedule, t).clamp(min=1)


def p2(schedule: Schedule, t: Tensor, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """SNR / (k + SNR)^gamma: 1 / (k + SNR)^gamma of the error in eps (arXiv:2204.00227)."""
    snr = _snr(schedule, t)
    return snr / (_positive("k", k) + snr) ** _positive("gamma", gamma)


def _snr(schedule: Schedule, t: Tensor) -> Tensor:
    return schedule.log_snr(t).exp()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"weight.{name}={value} must be positive")
    return value
