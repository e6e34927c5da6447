"""Likelihood of held-out images, in bits per dimension."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dit.metric.subject import Samples, Subject, rows

Denoise = Callable[[Tensor, Tensor], Any]


def likelihood(
    subject: Subject,
    train: Samples,
    held_out: Samples,
    *,
    grid: Callable[..., Tensor],
    nats: Callable[..., Tensor],
    num_images: int = 2000,
    num_steps: int = 100,
    num_probes: int = 1,
    num_bound_steps: int = 500,
    batch_size: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """How likely the held-out images are: by an ODE, up to its estimators, its steps and its least noise; and bounded.

    Args:
        subject: the model.
        train: unused.
        held_out: the images, and what the network is told of them.
        grid: (schedule, num_steps) -> times.
        nats: the bound's term of one step, `dit.noise.bound.nats`.
        num_images: the first so many held-out images.
        num_steps: of the ODE's solver, of second order.
        num_probes: of Hutchinson's estimator, per image.
        num_bound_steps: terms of the bound; fewer are looser.
        batch_size: images at a time.
        seed: of all noise.

    Returns:
        `bits_per_dim` by the probability-flow ODE, of images with uniform noise of one grey level;
        `bits_per_dim_bound`, the variational bound, of grey levels themselves; and `*_error`, their standard errors
        over images and noise. Where the data have fewer than 256 grey levels the noise costs bits, and the bound may
        be the lesser.

    Raises:
        ValueError: if the model is no denoiser, or does not see pixels.
    """
    check(subject)
    images = held_out["image"][:num_images]
    for name, value in {"num_steps": num_steps, "num_probes": num_probes, "num_bound_steps": num_bound_steps}.items():
        if value < 1:
            raise ValueError(f"metric.likelihood.{name}={value} must be at least 1")
    if tuple(images.shape[1:]) != subject.shape:
        raise ValueError(
            f"metric=likelihood is that of pixels, {tuple(images.shape[1:])}; the network sees {subject.shape}"
        )
    schedule, dimensions = subject.schedule, math.prod(subject.shape)
    times, bound_times = grid(schedule, num_steps=num_steps), grid(schedule, num_steps=num_bound_steps)
    generator = torch.Generator().manual_seed(seed)
    bits: dict[str, list[Tensor]] = {"bits_per_dim": [], "bits_per_dim_bound": []}
    for first in range(0, len(images), batch_size):
        samples = rows(held_out, slice(first, min(first + batch_size, len(images))))
        part, told = samples["image"], subject.told(samples)

        def denoise(x_t: Tensor, t: Tensor, told: dict[str, Tensor] = told) -> Any:
            return subject.denoise(x_t, t, told)

        level = part.float() + torch.rand(part.shape, generator=generator) - 0.5
        log_p = log_likelihood(denoise, schedule, level / 127.5 - 1, times[:-1], generator, num_probes)
        bits["bits_per_dim"].append(-log_p / (dimensions * math.log(2)) + math.log2(127.5))
        bound = variational_bound(denoise, schedule, part.float() / 127.5 - 1, bound_times, generator, nats)
        bits["bits_per_dim_bound"].append(bound / (dimensions * math.log(2)))
    figures = {name: torch.cat(values).double() for name, values in bits.items()}
    errors = {f"{name}_error": (values.std() / len(values) ** 0.5).item() for name, values in figures.items()}
    return {name: values.mean().item() for name, values in figures.items()} | errors


def check(subject: Subject) -> None:
    """See that a model is a denoiser.

    Raises:
        ValueError: if not.
    """
    if subject.denoise is None:
        raise ValueError("metric=likelihood is that of denoisers, and this is an autoencoder: choose metric=psnr")


likelihood.check = check  # type: ignore[attr-defined]
likelihood.pixels = True  # type: ignore[attr-defined]


def log_likelihood(
    denoise: Denoise,
    schedule: Any,
    x: Tensor,
    times: Tensor,
    generator: torch.Generator | None = None,
    num_probes: int = 1,
) -> Tensor:
    """Log p(x) = log N(x_T; 0, sigma_T^2) + int tr(df / dx) dt along the ODE dx = f dt (arXiv:2011.13456, appendix D).

    Solved by Heun's method in the straight coordinates y = x / c, where dy = d(alpha / c) x0 + d(sigma / c) eps; the
    trace is Hutchinson's, e^T (df / dx) e with random signs e.

    Args:
        denoise: (x_t, t) -> (x0, eps), differentiable in x_t.
        schedule: t -> (alpha, sigma).
        x: data (B, C, H, W), taken for x_t / alpha at times[-1].
        times: decreasing, all positive.
        generator: for the signs.
        num_probes: how many e.

    Returns:
        (B,), in nats.
    """
    probes = torch.randint(0, 2, (num_probes, *x.shape), generator=generator).to(x) * 2 - 1

    def step(y: Tensor, t: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """A step's change of y, from what is said at y and t, and its trace."""
        c = schedule.straight(t)
        with torch.enable_grad():
            x = (c * y).detach().requires_grad_()
            estimate = denoise(x, t)
            change = d_alpha * estimate.x0 + d_sigma * estimate.eps
            products = [torch.autograd.grad(change, x, e, retain_graph=True)[0] for e in probes]
        trace = sum((product * e).flatten(1).sum(1) for product, e in zip(products, probes, strict=True)) / num_probes
        return change.detach(), trace * c

    def coordinates(t: Tensor) -> tuple[Tensor, Tensor]:
        level, c = schedule(t), schedule.straight(t)
        return level.alpha / c, level.sigma / c

    dimensions, (alpha, _) = x[0].numel(), coordinates(times[-1])
    y, log_p = alpha * x, dimensions * alpha.log()
    for t, s in pairwise(times.flip(0)):
        difference = [after - before for before, after in zip(coordinates(t), coordinates(s), strict=True)]
        change, trace = step(y, t, *difference)
        change_s, trace_s = step(y + change, s, *difference)
        y, log_p = y + (change + change_s) / 2, log_p + (trace + trace_s) / 2
    c, sigma = schedule.straight(times[0]), schedule(times[0]).sigma
    normal = -((c * y / sigma).square() / 2).flatten(1).sum(1) - dimensions * (sigma * math.sqrt(2 * math.pi)).log()
    return log_p + normal + dimensions * c.log()


@torch.no_grad()
def variational_bound(
    denoise: Denoise,
    schedule: Any,
    x0: Tensor,
    times: Tensor,
    generator: torch.Generator | None,
    nats: Callable[..., Tensor],
) -> Tensor:
    """-log p(x0) <= KL(q(x_T | x0) | N(0, sigma_T^2)) + sum over steps of their terms (arXiv:2107.00630).

    Args:
        denoise: (x_t, t) -> (x0, eps).
        schedule: t -> (alpha, sigma).
        x0: pixels (B, C, H, W), in steps of 2 / 255.
        times: (N + 1,), decreasing to 0.
        generator: for the noise.
        nats: (schedule, estimate, x0, t, s) -> (B, C, H, W).

    Returns:
        (B,), in nats.
    """
    alpha, sigma = schedule(times[0])
    total = ((alpha / sigma * x0).square() / 2).flatten(1).sum(1)
    for t, s in pairwise(times):
        alpha, sigma = schedule(t)
        x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0)
        term = nats(schedule, denoise(x_t, t), x0, t.expand(len(x0)), s.expand(len(x0)))
        total = total + term.flatten(1).sum(1)
    return total
