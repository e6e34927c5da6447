"""Likelihood, where the exact one is known: Gaussian data and its exact denoiser."""

import math
from functools import partial

import pytest
import torch

from dit.metric.likelihood import likelihood, log_likelihood, variational_bound
from dit.metric.subject import Subject
from dit.noise.bound import nats
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.grid import log_snr
from dit.noise.prediction import Estimate
from dit.noise.trigonometric import Trigonometric
from dit.noise.vp import cosine, linear

F64 = torch.float64
SCHEDULES = {"linear": linear(), "cosine": cosine(), "edm": EDM(), "flow": Flow(), "trigonometric": Trigonometric()}
SHAPE = (1, 2, 2)
MEAN = torch.tensor([0.2, -0.1, 0.0, 0.3], dtype=F64)
ROOT = torch.tensor([[0.4, 0, 0, 0], [0.2, 0.3, 0, 0], [-0.1, 0.1, 0.35, 0], [0, 0.2, -0.1, 0.3]], dtype=F64)
NORMAL = torch.distributions.MultivariateNormal(MEAN, scale_tril=ROOT)


def denoise(schedule):
    """The exact denoiser, of correlated pixels, so that the trace must be estimated."""
    covariance = ROOT @ ROOT.T

    def estimate(x, t):
        alpha, sigma = (c.reshape(-1)[0] for c in schedule(t.double()))
        flat = x.flatten(1).double()
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(4))
        x0 = MEAN + (flat - alpha * MEAN) @ gain.T
        eps = (flat - alpha * x0) / sigma
        return Estimate(x0.reshape(x.shape).to(x), eps.reshape(x.shape).to(x))

    return estimate


def data(number):
    torch.manual_seed(0)
    return NORMAL.sample((number,))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_odes_likelihood_is_the_closed_form(name):
    schedule, x = SCHEDULES[name], data(400)
    times = log_snr(schedule, 250, sigma_min=1e-3)[:-1]
    generator = torch.Generator().manual_seed(0)
    ours = log_likelihood(denoise(schedule), schedule, x.reshape(-1, *SHAPE), times, generator, num_probes=1)
    difference = ours - NORMAL.log_prob(x)
    error = difference.std() / len(x) ** 0.5
    assert error < 0.06 and difference.mean().abs() < 3 * error  # of about 0.8 nats
    more = log_likelihood(denoise(schedule), schedule, x.reshape(-1, *SHAPE), times, generator, num_probes=16)
    assert (more - NORMAL.log_prob(x)).mean().abs() < 0.06
    assert (more - NORMAL.log_prob(x)).std() < difference.std() / 2  # the only randomness is Hutchinson's


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_bounds_it_and_tightens(name):
    """Of data rounded to grey levels of 2 / 255; the bound ends at half a level of noise, where it is tightest."""
    schedule = SCHEDULES[name]
    levels = (data(300) * 127.5 + 127.5).round() / 127.5 - 1
    exact = -NORMAL.log_prob(levels) - 4 * math.log(2 / 255)
    bounds = []
    for number in (50, 500):
        generator = torch.Generator().manual_seed(0)
        times = log_snr(schedule, number, sigma_min=4e-3)
        x0 = levels.reshape(-1, *SHAPE)
        bounds.append(variational_bound(denoise(schedule), schedule, x0, times, generator, nats))
    errors = [(bound - exact).std() / len(levels) ** 0.5 for bound in bounds]
    assert (bounds[0] - exact).mean() > (bounds[1] - exact).mean() > -2 * errors[1]
    assert (bounds[1] - exact).mean() / (4 * math.log(2)) < 0.15  # bits per dimension


def test_the_metric_puts_both_in_bits_per_dimension():
    schedule = linear()
    images = (data(300) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).reshape(-1, *SHAPE)
    held_out = {"image": images, "label": torch.zeros(300, dtype=torch.long)}
    subject = Subject(dict, lambda samples: images, lambda x, t, told: denoise(schedule)(x, t), schedule, SHAPE)
    figures = partial(likelihood, grid=partial(log_snr, sigma_min=4e-3), nats=nats, num_probes=4)(
        subject, held_out, held_out
    )
    log_p = NORMAL.log_prob(images.flatten(1).double() / 127.5 - 1).mean().item()
    exact = -log_p / (4 * math.log(2)) + math.log2(127.5)
    assert figures["bits_per_dim"] == pytest.approx(exact, abs=0.05)
    assert figures["bits_per_dim"] - 0.02 < figures["bits_per_dim_bound"] < figures["bits_per_dim"] + 0.25
    assert 0 < figures["bits_per_dim_error"] < 0.1
    with pytest.raises(ValueError, match="metric=likelihood is that of pixels"):
        likelihood(subject._replace(shape=(4, 1, 1)), held_out, held_out, grid=log_snr, nats=nats)
