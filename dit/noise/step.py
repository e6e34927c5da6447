"""Points of a path: x_t of what it holds, and x_s from x_t, as far as an estimate at t says."""

from torch import Tensor

from dit.noise.denoiser import expand_like
from dit.noise.prediction import Coefficients, Estimate, solve
from dit.noise.schedule import NoiseLevel, Schedule


def point(schedule: Schedule, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps, each (B, C, H, W); t is (B,) or ()."""
    alpha, sigma = (_beside(c, x0) for c in schedule(t))
    return alpha * x0 + sigma * eps


def step(schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, estimate: Estimate) -> Tensor:
    """x_s = (c_s / c_t) x_t + (alpha_s - alpha_t c_s / c_t) x0 + (sigma_s - sigma_t c_s / c_t) eps, c: `straight`.

    That is Euler's method in the coordinates x / c, where the path from x0 to eps is straight; with the mean of two
    estimates, of both ends, it is Heun's. Where the estimate explains x_t it is alpha_s x0 + sigma_s eps, DDIM's step.

    Args:
        schedule: t -> (alpha, sigma).
        x_t: (B, C, H, W).
        t: now, (B,) or ().
        s: next, the same.
        estimate: (x0, eps), each (B, C, H, W).
    """
    now, following = schedule(t), schedule(s)
    kept = schedule.straight(s) / schedule.straight(t)
    of_x0, of_eps = following.alpha - now.alpha * kept, following.sigma - now.sigma * kept
    kept, of_x0, of_eps = (_beside(c, x_t) for c in (kept, of_x0, of_eps))
    return kept * x_t + of_x0 * estimate.x0 + of_eps * estimate.eps


def mean(a: Estimate, b: Estimate) -> Estimate:
    """Of two estimates."""
    return Estimate((a.x0 + b.x0) / 2, (a.eps + b.eps) / 2)


def secant(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Estimate:
    """The (x0, eps) with which one step from x_t lands on x_s: x_t = alpha_t x0 + sigma_t eps, and the same at s.

    On flow eps - x0 is then the mean velocity from t to s. Where s = t there is none.
    """
    now, following = ([_beside(c, x_t) for c in schedule(time)] for time in (t, s))
    return solve(Coefficients(*following), NoiseLevel(*now), x_s, x_t)


def _beside(c: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, ...) of the dtype of x; () stays as exact as it is."""
    return expand_like(c.to(x), x) if c.ndim else c
