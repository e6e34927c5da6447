"""A network of one schedule, on the path of another."""

from functools import partial

import torch
from torch import Tensor

from dit.noise.denoiser import Denoiser
from dit.noise.prediction import Coefficients, Prediction
from dit.noise.schedule import NoiseLevel, Schedule


class Matched(Schedule):
    """The levels of `path`, for a network that knows those of `of`, to which it is shown what it would see there.

    x_t = alpha x0 + sigma eps and x_u = (alpha_u + sigma_u) / (alpha + sigma) x_t hold the same (x0, eps) where the SNR
    is the same, so that an estimate of the one is that of the other, whatever was trained. The time u is found in
    float64. With the prediction `matched` a denoiser of any kind is then exactly itself, but on another path: on flow
    its eps - x0 is a velocity.

    t_max is where the noise of `of` ends, if that of `path` goes further.

    Args:
        path: the schedule of x_t and t.
        of: the schedule that the network knows.
    """

    def __init__(self, path: Schedule, of: Schedule):
        self.path = path
        self.of = of
        end = torch.tensor(of.t_max, dtype=torch.float64)
        self.t_max = min(path.t_max, path.time_of(of.log_snr(end)).item())
        self.sigma_data = path.sigma_data
        self.num_steps = path.num_steps

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Those of the path."""
        return self.path(t)

    def rate(self, t: Tensor) -> NoiseLevel:
        """That of the path."""
        return self.path.rate(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """That of the path."""
        return self.path.time_of(log_snr)

    def straight(self, t: Tensor) -> Tensor:
        """That of the path."""
        return self.path.straight(t)

    def there(self, t: Tensor) -> Tensor:
        """The time u of the other schedule at which the SNR is that of the path at t."""
        # Differences reach past both ends, where there is no SNR.
        wanted = self.path.log_snr(t.double().clamp(1e-6 * self.t_max, self.t_max))
        u = self.of.time_of(wanted.detach()).detach()
        # A search has no derivative; that of the inverse function is 1 / (d log SNR / du).
        (alpha, sigma), (d_alpha, d_sigma) = self.of(u), self.of.rate(u)
        change = (wanted - wanted.detach()) / (2 * (d_alpha / alpha - d_sigma / sigma))
        return u + torch.where(change.isfinite() & (u < self.of.t_max), change, torch.zeros_like(change))

    def input_scale(self, t: Tensor) -> Tensor:
        """By which x_t is what the network expects at u."""
        u = self.there(t)
        (alpha, sigma), (alpha_u, sigma_u) = self.path(t.double()), self.of(u)
        return self.of.input_scale(u) * (alpha_u + sigma_u) / (alpha + sigma)

    def time_input(self, t: Tensor) -> Tensor:
        """What the network is told of u."""
        return self.of.time_input(self.there(t))


def matched(schedule: Schedule, t: Tensor, *, prediction: Prediction) -> Coefficients:
    """What a network of another schedule says, F = a x0 + b eps with the (a, b) of its own.

    Raises:
        ValueError: if the schedule is not `Matched`.
    """
    if not isinstance(schedule, Matched):
        raise ValueError(
            f"prediction=matched is that of a network on the path of another schedule, and {type(schedule).__name__} "
            "has no other: take noise=matched, or another prediction"
        )
    return prediction(schedule.of, schedule.there(t))


def on_path(denoiser: Denoiser, path: Schedule) -> Denoiser:
    """The same network as a denoiser of another schedule."""
    known = Matched(path, denoiser.schedule)
    return Denoiser(denoiser.network, known, partial(matched, prediction=denoiser.prediction))
