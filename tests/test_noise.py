import math

import pytest
import torch

from dit.noise import prediction, times
from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.vp import VP, cosine, linear

SCHEDULES = {"linear": linear(), "cosine": cosine(), "edm": EDM(), "flow": Flow()}
PREDICTIONS = {name: getattr(prediction, name) for name in ("eps", "x0", "v", "flow", "edm")}
F64 = torch.float64


def inner_times(schedule, number=50):
    return torch.linspace(0.01, 0.99, number, dtype=F64) * schedule.t_max


def test_the_primers_worked_example():
    """One step of DDPM: sqrt(0.9) 0.8 + sqrt(0.1) (-0.3) = 0.6641."""
    alpha, sigma = VP(torch.tensor([0.1]))(torch.tensor(1.0, dtype=F64))
    assert float(alpha * 0.8 + sigma * -0.3) == pytest.approx(0.6641, abs=5e-5)


@pytest.mark.parametrize("make", [linear, cosine])
def test_the_jump_agrees_with_iterating(make):
    """x_k = sqrt(1 - beta) x_{k-1} + sqrt(beta) z, iterated in mean and variance, is the closed form at t = k / N."""
    schedule = make()
    mean, variance = 1.0, 0.0
    log_alpha = schedule._log_alpha
    for k in range(1, 1001):
        beta = 1 - math.exp(2 * float(log_alpha[k] - log_alpha[k - 1]))
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        alpha, sigma = schedule(torch.tensor(k / 1000, dtype=F64))
        assert float(alpha) == pytest.approx(mean, abs=1e-10)
        assert float(sigma**2) == pytest.approx(variance, abs=1e-10)


def test_linear_betas_are_ddpms():
    betas = 1 - (2 * linear()._log_alpha.diff()).exp()
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=F64), atol=1e-12, rtol=0)
    assert float(linear()(torch.tensor(1.0, dtype=F64)).alpha ** 2) == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_begins_at_data_and_its_rate_is_its_derivative(name):
    schedule = SCHEDULES[name]
    alpha, sigma = schedule(torch.tensor([0.0], dtype=F64))
    assert (alpha.item(), sigma.item()) == (1, 0)
    h = 1e-6 * schedule.t_max
    t = inner_times(schedule) + 0.3e-3 * schedule.t_max  # off the knots of the tables
    for upper, lower, rate in zip(schedule(t + h), schedule(t - h), schedule.rate(t), strict=True):
        torch.testing.assert_close((upper - lower) / (2 * h), rate, atol=1e-5, rtol=1e-5)
    assert (schedule.log_snr(t).diff() < 0).all()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_rate_at_a_knot_does_not_depend_on_rounding(name):
    t = torch.arange(1, 1001, dtype=F64) / 1000
    exact, rounded = SCHEDULES[name].rate(t), SCHEDULES[name].rate(t.float())
    torch.testing.assert_close(rounded.alpha, exact.alpha.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_solve_inverts(name, predicted):
    schedule = SCHEDULES[name]
    t = inner_times(schedule)
    level, coefficients = schedule(t), PREDICTIONS[predicted](schedule, t)
    x0, eps = torch.randn(2, len(t), generator=torch.Generator().manual_seed(0), dtype=F64)
    f = coefficients.a * x0 + coefficients.b * eps
    solved = prediction.solve(coefficients, level, f, level.alpha * x0 + level.sigma * eps)
    torch.testing.assert_close(solved.x0, x0, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(solved.eps, eps, atol=1e-8, rtol=1e-8)


def test_edm_prediction_is_the_papers_preconditioning():
    """D = c_skip x + c_out F (arXiv:2206.00364, table 1)."""
    schedule, sd = EDM(), 0.5
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=F64)
    x_t, f = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    solved = prediction.solve(prediction.edm(schedule, sigma), schedule(sigma), f, x_t)
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    torch.testing.assert_close(solved.x0, c_skip * x_t + c_out * f)
    torch.testing.assert_close(schedule.input_scale(sigma), 1 / (sigma**2 + sd**2).sqrt())
    torch.testing.assert_close(schedule.time_input(sigma), sigma.log() / 4)


def test_the_network_is_told_ddpms_index():
    assert linear().time_input(torch.tensor([1.0, 0.001], dtype=F64)).tolist() == pytest.approx([999, 0])


def test_a_prediction_that_says_nothing_of_x0_is_refused():
    with pytest.raises(ValueError, match=r"noise.t_max=0.999"):
        Denoiser(torch.nn.Identity(), Flow(), prediction.eps)
    Denoiser(torch.nn.Identity(), Flow(t_max=0.999), prediction.eps)


def test_densities_stay_in_range_and_have_their_shape():
    u = (torch.arange(100_000) + 0.5) / 100_000
    for schedule in SCHEDULES.values():
        for density in (times.uniform, times.logit_normal, times.log_normal):
            t = density(schedule, u)
            assert (t > 0).all() and (t <= schedule.t_max).all()
    with pytest.raises(ValueError, match="needs a schedule with steps, not Flow"):
        times.discrete(Flow(), u)
    steps = times.discrete(linear(), u) * 1000
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.round().unique().tolist() == list(range(1, 1001))
    assert times.log_normal(EDM(), u).log().mean().item() == pytest.approx(-1.2, abs=1e-2)
    assert times.log_normal(EDM(), u).log().std().item() == pytest.approx(1.2, abs=1e-2)
    assert times.logit_normal(Flow(), u).logit().std().item() == pytest.approx(1, abs=1e-2)


def test_grids_decrease_from_t_max_to_zero():
    for schedule, grid in [(linear(), times.evenly), (EDM(), times.karras), (Flow(), times.evenly)]:
        layout = grid(schedule, 20)
        assert layout.dtype == F64 and len(layout) == 21
        assert layout[0] == pytest.approx(schedule.t_max) and layout[-1] == 0
        assert (layout.diff() < 0).all()
        assert len(grid(schedule, 1)) == 2
        with pytest.raises(ValueError, match="num_steps=0"):
            grid(schedule, 0)
    assert float(times.karras(EDM(), 18)[17]) == pytest.approx(0.002)


def test_keyed_numbers_do_not_depend_on_the_partition():
    whole = Draw(7, 3, range(8), 32)
    parts = [Draw(7, 3, range(first, first + 2), 8) for first in range(0, 8, 2)]
    assert torch.equal(whole.normal("eps", (2, 3)), torch.cat([part.normal("eps", (2, 3)) for part in parts]))
    assert torch.equal(whole.uniform("t"), torch.cat([part.uniform("t") for part in parts]))
    assert not torch.equal(whole.uniform("t"), whole.uniform("drop"))
    assert not torch.equal(whole.uniform("t"), Draw(7, 4, range(8), 32).uniform("t"))
    assert not torch.equal(whole.uniform("t"), Draw(8, 3, range(8), 32).uniform("t"))
    assert whole.normal("eps", (1000,)).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("bad", [lambda: VP(torch.tensor([0.1, 1.0])), lambda: linear(num_steps=0), lambda: Flow(2.0)])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError):
        bad()
