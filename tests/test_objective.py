import math
from functools import partial

import pytest
import torch
from exact import SCHEDULES
from test_sampler import PREDICTIONS, tiny_denoiser

from dit.noise import prediction, times, weight
from dit.noise.denoiser import Denoiser, Output
from dit.noise.draw import Draw
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.grid import respaced
from dit.noise.vp import linear
from dit.objective.denoising import Denoising
from dit.objective.objective import Batch
from dit.objective.uncertainty import Uncertainty
from dit.sampler import ancestral


def plain(predicted):
    """The weight of conf/weight/none.yaml."""
    return partial(weight.mean_square, prediction=predicted)


def batch(size=16, seed=0, channels=1):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(size, channels, 4, 4, generator=generator) * 2 - 1
    return Batch(x0, {"label": torch.arange(size) % 3}, Draw(seed, 0, range(4), size))


def loss_of(objective, denoiser, batch):
    [(name, loss)] = objective.phases(denoiser, batch, 0)
    assert name == "denoiser"
    return loss


@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_weight_it_is_the_plain_mean_square_of_f(name, predicted):
    schedule, predicted = SCHEDULES[name][0], PREDICTIONS[predicted]
    if predicted is prediction.eps and name in ("zero_terminal_snr", "flow", "trigonometric"):
        return  # nothing of the data is left at t_max: tests/test_noise.py
    denoiser = tiny_denoiser(schedule, predicted)
    given = batch()
    t = times.uniform(schedule, given.draw.uniform("t"))
    eps = given.draw.normal("eps", (1, 4, 4))
    alpha, sigma, a, b = (c.reshape(-1, 1, 1, 1) for c in (*schedule(t), *predicted(schedule, t)))
    f = denoiser.output(alpha * given.x0 + sigma * eps, t, **given.cond).f
    expected = (f - a * given.x0 - b * eps).square().mean()
    ours = loss_of(Denoising(times.uniform, plain(predicted)), denoiser, given)
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-5)


def test_edms_weighted_loss_is_the_plain_mean_square_of_f():
    """lambda(sigma) |D - x0|^2 with lambda = (sigma^2 + sd^2) / (sigma sd)^2 (arXiv:2206.00364, equation 8)."""
    denoiser, given, sd = tiny_denoiser(EDM(), prediction.edm), batch(), 0.5
    sigma = times.log_normal(denoiser.schedule, given.draw.uniform("t")).reshape(-1, 1, 1, 1)
    x_t = given.x0 + sigma * given.draw.normal("eps", (1, 4, 4))
    said = denoiser(x_t, sigma.flatten(), **given.cond).x0
    weighted = ((sigma**2 + sd**2) / (sigma * sd) ** 2 * (said - given.x0) ** 2).mean()
    ours = loss_of(Denoising(times.log_normal, plain(prediction.edm)), denoiser, given)
    torch.testing.assert_close(ours, weighted, atol=0, rtol=1e-4)


def test_x_prediction_with_v_loss():
    """JiT: the network says x0, the loss is that of v = (x_t - x0) / t, with 1 / t at most 20."""
    denoiser, given = tiny_denoiser(Flow(), prediction.x0), batch()
    t = times.uniform(Flow(), given.draw.uniform("t")).reshape(-1, 1, 1, 1)
    x_t = (1 - t) * given.x0 + t * given.draw.normal("eps", (1, 4, 4))
    said = denoiser.output(x_t, t.flatten(), **given.cond).f
    v_loss = (((x_t - said) - (x_t - given.x0)) / t.clamp(min=0.05)).square().mean()
    ours = loss_of(Denoising(times.uniform, plain(prediction.flow), max_weight=400.0), denoiser, given)
    torch.testing.assert_close(ours, v_loss, atol=0, rtol=1e-4)


def test_the_bound_teaches_the_variance_and_nothing_else():
    denoiser = tiny_denoiser(linear(), prediction.eps, learn_sigma=True)
    objective = partial(Denoising, times.discrete, plain(prediction.eps))

    def gradient(bound_weight):
        denoiser.zero_grad()
        loss_of(objective(bound_weight=bound_weight), denoiser, batch()).backward()
        return denoiser.network.final_layer.linear.weight.grad.reshape(2, 2, 2, -1).clone()  # (p, q, C or 2C, D)

    without, with_bound = gradient(0.0), gradient(1.0)
    torch.testing.assert_close(with_bound[:, :, 0], without[:, :, 0])
    assert (without[:, :, 1] == 0).all() and with_bound[:, :, 1].abs().max() > 0


def test_a_learned_variance_goes_to_the_best_one():
    """With x0 said exactly that is the least one, with the exact denoiser alpha x_t of white noise the greatest."""

    class Says(torch.nn.Module):
        learn_sigma = True

        def __init__(self):
            super().__init__()
            self.variance = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, time, label):
            return torch.cat([self.said(x), self.variance.expand_as(x)], dim=1)

    schedule = linear()
    alpha = schedule(torch.tensor(0.3)).alpha
    for knows, best in [(False, 1.0), (True, -1.0)]:
        network = Says()
        denoiser = Denoiser(network, schedule, prediction.x0)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        objective = Denoising(lambda s, u: torch.full_like(u, 0.3), plain(prediction.x0), bound_weight=1.0)
        for step in range(150):
            x0 = torch.randn(256, 1, 4, 4, generator=torch.Generator().manual_seed(step))
            network.said = lambda x, x0=x0, knows=knows: x0 if knows else alpha * x
            loss = loss_of(objective, denoiser, Batch(x0, {"label": torch.zeros(256)}, Draw(0, step, range(4), 256)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert network.variance.item() == pytest.approx(best, abs=0.1)


def test_a_learned_variance_is_sampled_with():
    denoiser = tiny_denoiser(linear(), prediction.eps, learn_sigma=True)
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(4, dtype=torch.long)

    def draw(variance):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return ancestral.sample(
                lambda x, t: denoiser(x, t, label=label),
                denoiser.schedule,
                x,
                respaced(denoiser.schedule, 5),
                generator=generator,
                eta=1.0,
                variance=variance,
            )

    small, learned, large = draw("small"), draw("learned"), draw("large")
    assert not torch.equal(small, learned) and not torch.equal(learned, large)


def test_uncertainty_learns_the_logarithm_of_the_loss():
    """Minimising e / exp(u) + u over u gives u = log e at every noise level."""
    uncertainty = Uncertainty()
    log_snr = torch.linspace(-8, 8, 64)
    error = (1 + 0.2 * log_snr.cos()) * (0.25 * log_snr).exp()
    assert uncertainty(log_snr).abs().max() == 0
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.02)
    for _ in range(1500):
        u = uncertainty(log_snr)
        loss = (error * (-u).exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(uncertainty(log_snr), error.log(), atol=0.15, rtol=0)


def test_uncertainty_is_part_of_the_objective():
    denoiser, given = tiny_denoiser(EDM(), prediction.edm), batch()
    without = loss_of(Denoising(times.log_normal, plain(prediction.edm)), denoiser, given)
    objective = Denoising(times.log_normal, plain(prediction.edm), uncertainty=Uncertainty())
    torch.testing.assert_close(loss_of(objective, denoiser, given), without)  # u = 0 at first
    torch.nn.init.constant_(objective.uncertainty.linear.bias, 0.7)
    torch.testing.assert_close(loss_of(objective, denoiser, given), without * math.exp(-0.7) + 0.7)
    assert len(list(objective.parameters())) == 2


@pytest.mark.parametrize(
    ("options", "denoiser", "message"),
    [
        ({"bound_weight": 1.0}, lambda: tiny_denoiser(linear(), prediction.eps), r"model\.learn_sigma=true"),
        ({"bound_weight": 1.0}, lambda: tiny_denoiser(Flow(), prediction.v, learn_sigma=True), r"bound_weight=0"),
        ({"bound_weight": 1.0}, lambda: tiny_denoiser(linear(1), prediction.eps, learn_sigma=True), "at least 2"),
        (
            {"times": times.discrete},
            lambda: tiny_denoiser(Flow(), prediction.v),
            "no discrete steps: choose times=uniform",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_beforehand(options, denoiser, message):
    objective = Denoising(**{"times": times.uniform, "weight": plain(prediction.eps)} | options)
    with pytest.raises(ValueError, match=message):
        objective.check(denoiser())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound_weight": -1.0}, "bound_weight=-1"),
        ({"max_weight": 0.0}, "max_weight=0"),
        ({"spread": "even"}, "choose one of independent"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Denoising(times.uniform, plain(prediction.eps), **options)


def test_the_output_is_told_apart_from_its_variance():
    denoiser = tiny_denoiser(linear(), prediction.eps, learn_sigma=True)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 0.7])
    output = denoiser.output(x, t, label=torch.tensor([0, 1]))
    assert isinstance(output, Output) and output.f.shape == output.variance.shape == x.shape
    assert torch.equal(denoiser(x, t, label=torch.tensor([0, 1])).variance, output.variance)
    assert tiny_denoiser(linear(), prediction.eps)(x, t, label=torch.tensor([0, 1])).variance is None
