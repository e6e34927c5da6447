import math
from functools import partial

import pytest
import torch
from exact import SCHEDULES, Mixture

from dit.condition.label import Label
from dit.condition.unconditional import Unconditional
from dit.latent.pixels import Pixels
from dit.model.dit import DiT
from dit.noise import prediction
from dit.noise.denoiser import Denoiser
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.grid import evenly, karras, log_snr, respaced
from dit.noise.prediction import Estimate
from dit.noise.trigonometric import Trigonometric
from dit.noise.vp import cosine, linear, scaled_linear
from dit.sampler import ancestral, dpmpp, heun, unipc
from dit.sampler.guidance import Autoguidance, ClassifierFree
from dit.sampler.pipeline import Pipeline

F64 = torch.float64
PREDICTIONS = {name: getattr(prediction, name) for name in ("eps", "x0", "v", "flow", "edm")}
SAMPLERS = {
    "ddpm": partial(ancestral.sample, eta=1.0),
    "ddim": ancestral.sample,
    "heun": heun.sample,
    "heun_churn": partial(heun.sample, churn=0.3),
    "dpmpp": dpmpp.sample,
    "dpmpp_sde": partial(dpmpp.sample, eta=1.0),
    "unipc": unipc.sample,
}
RANDOM = ("ddpm", "heun_churn", "dpmpp_sde")
FLAT = Mixture([[0.6, -0.2], [-0.4, 0.5], [0.3, 0.9]], 0.3, [0.5, 0.3, 0.2])  # in the plane
LINE = Mixture([[-0.6], [0.5]], 0.25, [0.4, 0.6])


@pytest.mark.parametrize("data", [FLAT, Mixture([[0.3, -0.1]], 0.5)], ids=["mixture", "gaussian"])
@pytest.mark.parametrize("sampler", RANDOM)
@pytest.mark.parametrize("name", SCHEDULES)
def test_samplers_that_draw_noise_reproduce_mean_and_covariance(name, sampler, data):
    schedule, lay_out = SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    times = lay_out(schedule, 60 if sampler == "heun_churn" else 200)  # which is of second order
    x = schedule(times[0]).sigma * torch.randn(20_000, 2, generator=generator, dtype=F64)
    x = SAMPLERS[sampler](data.denoise(schedule), schedule, x, times, generator=generator)
    torch.testing.assert_close(x.mean(0), data.mean(), atol=0.02, rtol=0)
    torch.testing.assert_close(x.T.cov(), data.covariance(), atol=0.02, rtol=0)


def errors(sampler, schedule, grids):
    """Mean distance from the exact solution of the ODE, a grid each."""
    start = torch.linspace(-1.5, 1.5, 13, dtype=F64)[:, None]
    for times in grids:
        x = schedule(times[0]).sigma * start
        end = LINE.ode_end(schedule, x, times[0], times[-1])
        yield (sampler(LINE.denoise(schedule), schedule, x, times) - end).abs().mean().item()


def slope(x, y):
    """Of the line through (log x, log y)."""
    x, y = (torch.tensor(list(values), dtype=F64).log() for values in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpmpp", 2), ("unipc", 3)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_measured_order_of_convergence(name, sampler, order):
    """Between sigma / alpha = 10 and 0.1, away from both ends, where log SNR is infinite. UniPC-p has order p + 1."""
    schedule, _ = SCHEDULES[name]
    numbers = (20, 40, 80, 160)
    log_snrs = (torch.linspace(-2 * math.log(10), -2 * math.log(0.1), n + 1, dtype=F64) for n in numbers)
    measured = errors(SAMPLERS[sampler], schedule, map(schedule.time_of, log_snrs))
    assert -slope(numbers, measured) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("sampler", "least", "most"),
    [("ddim", 0.95, 2e-3), ("heun", 1.6, 3e-5), ("dpmpp", 0.95, 1e-4), ("unipc", 1.4, 2e-5)],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_from_noise_to_data_the_ode_is_solved(name, sampler, least, most):
    """The whole way, on grids that one would use; DPM++ and UniPC begin and end with a step of first order."""
    schedule, lay_out = SCHEDULES[name]
    numbers = (40, 80, 160, 320, 640)
    measured = list(errors(SAMPLERS[sampler], schedule, (lay_out(schedule, n) for n in numbers)))
    assert measured[-1] < most
    assert -slope(numbers, measured) > least


@pytest.mark.parametrize("name", ["linear", "edm"])
def test_churn_goes_back_to_more_noise_before_a_step(name):
    """With churn 0.2 a step begins at 1.2 times its sigma / alpha, where that lies in the range."""
    schedule, lay_out = SCHEDULES[name]
    asked = []
    data = Mixture([[0.0]], 0.5)

    def denoise(x, t):
        asked.append(float(schedule(t).sigma / schedule(t).alpha))
        return data.denoise(schedule)(x, t)

    times = lay_out(schedule, 20)
    heun.sample(denoise, schedule, torch.zeros(1, 1, dtype=F64), times, churn=0.2, churn_min=0.1, churn_max=5.0)
    ratios = [float(schedule(t).sigma / schedule(t).alpha) for t in times[:-1]]
    added = [r * 1.2 if 0.1 <= r <= 5 else r for r in ratios]
    for ratio in added:
        assert any(a == pytest.approx(ratio, rel=1e-6) for a in asked)


def test_ddpms_step_is_the_published_posterior():
    """At eta = 1 the fresh noise has variance (1 - abar_s) / (1 - abar_t) beta; or beta; or between."""
    schedule = linear()
    t, s = torch.tensor([0.5, 0.499], dtype=F64)
    (alpha_t, sigma_t), (_, sigma_s) = schedule(t), schedule(s)
    beta = (1 - (alpha_t / schedule(s).alpha) ** 2).item()
    tilde = (sigma_s / sigma_t).item() ** 2 * beta
    x = torch.full((200_000,), 0.7, dtype=F64)
    learned = torch.full_like(x, 0.5)  # three quarters of the way, in the logarithm
    estimate = Estimate(torch.full_like(x, 0.1), (x - alpha_t * 0.1) / sigma_t, learned)
    mean = schedule(s).alpha * beta / sigma_t**2 * 0.1 + (1 - beta) ** 0.5 * sigma_s**2 / sigma_t**2 * 0.7
    for variance, expected in [("small", tilde), ("large", beta), ("learned", tilde**0.25 * beta**0.75)]:
        generator = torch.Generator().manual_seed(0)
        times = torch.stack([t, s])
        x_s = ancestral.sample(
            lambda x, t: estimate, schedule, x, times, generator=generator, eta=1.0, variance=variance
        )
        assert x_s.var().item() == pytest.approx(expected, rel=0.02)
        assert x_s.mean().item() == pytest.approx(mean.item(), abs=3e-4)


def tiny_denoiser(schedule, predicted, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"input_size": 4, "in_channels": 1, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    network = DiT(**sizes | {"num_classes": 3} | options)
    for p in network.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Denoiser(network, schedule, predicted).eval()


DRAWN = {
    "linear": (linear(), evenly),
    "cosine": (cosine(), respaced),
    "zero_terminal_snr": (scaled_linear(zero_terminal_snr=True), evenly),
    "edm": (EDM(), karras),
    "flow": (Flow(), evenly),
    "flow_cut": (Flow(t_max=0.999), log_snr),
    "trigonometric": (Trigonometric(), evenly),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("name", DRAWN)
def test_every_schedule_with_every_prediction_and_sampler_draws_the_same_bytes_again(name, predicted, sampler):
    schedule, lay_out = DRAWN[name]
    if predicted == "eps" and float(schedule(torch.tensor(schedule.t_max, dtype=F64)).alpha) < 1e-9:
        with pytest.raises(ValueError, match="v works everywhere"):
            tiny_denoiser(schedule, PREDICTIONS[predicted])
        return
    denoiser = tiny_denoiser(schedule, PREDICTIONS[predicted])

    def draw(num_images, batch_size):
        pipeline = Pipeline(
            denoiser,
            Label(3),
            Pixels(1, 4),
            partial(ClassifierFree, scale=2.0, clip=1.0),
            SAMPLERS[sampler],
            lambda schedule: lay_out(schedule, 5),
        )
        asked = {"label": [i % 3 for i in range(num_images)]}
        return pipeline(asked, num_images, seed=3, batch_size=batch_size)

    images = draw(6, 6)
    assert images.dtype == torch.uint8 and images.shape == (6, 1, 4, 4)
    assert torch.equal(images, draw(6, 6))
    assert images.float().std() > 0
    if sampler not in RANDOM:  # picture i does not depend on how many are drawn together
        assert (images[:4].int() - draw(4, 2).int()).abs().max() <= 1


X, T, COND = (
    torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
    torch.tensor(0.7),
    torch.tensor([0, 1, 2, 0]),
)


def test_guidance_is_linear_runs_as_one_batch_and_costs_nothing_where_it_does_nothing():
    denoiser = tiny_denoiser(linear(), prediction.eps)
    null = Label(3).null
    calls = []
    denoiser.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    plain = ClassifierFree(denoiser, null)(X, T, label=COND)
    assert calls == [4]
    guided = ClassifierFree(denoiser, null, scale=3.0)(X, T, label=COND)
    assert calls == [4, 8]
    nothing = denoiser(X, T, **null({"label": COND}))
    for field in ("x0", "eps"):
        expected = getattr(nothing, field) + 3 * (getattr(plain, field) - getattr(nothing, field))
        torch.testing.assert_close(getattr(guided, field), expected, atol=1e-4, rtol=1e-4)
    outside = ClassifierFree(denoiser, null, scale=3.0, interval=[0.1, 0.6])(X, T, label=COND)
    assert calls[3:] == [4] and torch.equal(outside.x0, plain.x0)
    half = ClassifierFree(denoiser, null, scale=3.0, interval=[0.1, 0.6])(
        X, torch.tensor([0.7, 0.5, 0.7, 0.5]), label=COND
    )
    torch.testing.assert_close(half.x0[[0, 2]], plain.x0[[0, 2]], atol=1e-4, rtol=1e-4)
    assert (half.x0[1] - denoiser(X, torch.tensor(0.5), label=COND).x0[1]).abs().max() > 1e-3
    calls.pop(), calls.pop()
    inside = ClassifierFree(denoiser, null, scale=3.0, interval=[0.1, 0.8])(X, T, label=COND)
    assert calls[4:] == [8] and torch.equal(inside.x0, guided.x0)


OPTIONS = [{}, {"rescale": 0.7}, {"clip": 0.8}, {"dynamic_clip": 0.9}, {"channels": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", DRAWN)
def test_guidance_gives_the_same_image_whatever_is_predicted(name, options):
    """Networks that say the same in different words: F = a x0 + b eps of one estimate."""
    schedule, lay_out = DRAWN[name]
    said = tiny_denoiser(Flow(), prediction.v, in_channels=2).network
    times = lay_out(schedule, 6)

    class Saying(torch.nn.Module):
        def __init__(self, predicted):
            super().__init__()
            self.predicted, self.unused = predicted, torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, time, label):
            t = times[self.step]
            alpha, sigma = schedule(t)
            x_t = (x / schedule.input_scale(t)).double()
            x0 = torch.tanh(said(x.float(), time.float(), label)).double()
            a, b = self.predicted(schedule, t)
            return a * x0 + b * (x_t - alpha * x0) / sigma

    images = {}
    for predicted in PREDICTIONS:
        if predicted == "eps" and float(schedule(times[0]).alpha) < 1e-9:
            continue
        network = Saying(PREDICTIONS[predicted])
        guided = ClassifierFree(
            Denoiser(network, schedule, PREDICTIONS[predicted]), Label(3).null, scale=2.5, **options
        )

        def denoise(x, t, network=network, guided=guided):
            network.step = times.tolist().index(float(t))
            return guided(x, t, label=COND)

        x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
        with torch.no_grad():
            images[predicted] = ancestral.sample(denoise, schedule, schedule(times[0]).sigma * x, times)
    for image in images.values():
        torch.testing.assert_close(image, images["v"], atol=1e-4, rtol=1e-4)
    if options:
        assert all((image.abs() < 10).all() for image in images.values())


def test_three_channels_are_guided_as_in_the_published_dit():
    denoiser = tiny_denoiser(linear(), prediction.eps, in_channels=4, learn_sigma=True)
    x = torch.randn(4, 4, 4, 4)
    null = Label(3).null
    with torch.no_grad():
        told, nothing = denoiser(x, T, label=COND), denoiser(x, T, **null({"label": COND}))
        guided = ClassifierFree(denoiser, null, scale=4.0, channels=3)(x, T, label=COND)
    expected = torch.cat([(nothing.eps + 4 * (told.eps - nothing.eps))[:, :3], told.eps[:, 3:]], dim=1)
    torch.testing.assert_close(guided.eps, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided.variance, told.variance)


def test_rescaling_keeps_the_deviation_and_clipping_the_range():
    denoiser = tiny_denoiser(linear(), prediction.v)
    null = Label(3).null
    told = denoiser(X, T, label=COND)
    rescaled = ClassifierFree(denoiser, null, scale=6.0, rescale=1.0)(X, T, label=COND)
    torch.testing.assert_close(rescaled.x0.flatten(1).std(1), told.x0.flatten(1).std(1))
    wide = 3 * X
    for options, most in [
        ({"clip": 0.5}, 0.5),
        ({"dynamic_clip": 0.9}, 1.0),
        ({"dynamic_clip": 0.9, "clip": 2.0}, 2.0),
    ]:
        clipped = ClassifierFree(denoiser, null, scale=6.0, **options)(wide, T, label=COND)
        assert clipped.x0.abs().max() <= most + 1e-6
        alpha, sigma = linear()(T)
        torch.testing.assert_close(alpha * clipped.x0 + sigma * clipped.eps, wide, atol=1e-5, rtol=1e-5)
    # Imagen's: where the quantile is above 1 everything is divided by it, so that not all is at the border.
    x0 = 8 * torch.rand(2, 1, 50, 50) - 4
    guide = ClassifierFree(denoiser, null, dynamic_clip=0.5)
    torch.testing.assert_close(guide._clipped(x0)[0], (x0[0] / x0[0].abs().quantile(0.5)).clamp(-1, 1))


def test_autoguidance_goes_away_from_the_weaker_model():
    strong, weak = tiny_denoiser(linear(), prediction.eps), tiny_denoiser(linear(), prediction.v, seed=1)
    guided = Autoguidance(strong, None, weak=weak, scale=2.0)(X, T, label=COND)
    expected = 2 * strong(X, T, label=COND).x0 - weak(X, T, label=COND).x0
    torch.testing.assert_close(guided.x0, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="another schedule"):
        Autoguidance(strong, None, weak=tiny_denoiser(cosine(), prediction.eps))


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ancestral, {"eta": 2.0}, "eta=2"),
        (ancestral, {"eta": -0.1}, r"eta=-0\.1"),
        (ancestral, {"eta": 1.0, "variance": "huge"}, "variance=huge: choose one of small, large, learned"),
        (ancestral, {"variance": "large"}, r"needs sampler\.eta=1"),
        (ancestral, {"eta": 1.0, "variance": "learned"}, r"model\.learn_sigma=true"),
        (heun, {"churn": -1.0}, "churn=-1"),
        (heun, {"churn": 0.5}, r"churn=0\.5"),
        (heun, {"churn_min": 2.0, "churn_max": 1.0}, "churn_min=2"),
        (dpmpp, {"eta": 1.5}, r"eta=1\.5"),
    ],
)
def test_bad_options_of_samplers_are_refused(sampler, options, message):
    schedule = linear()
    x = torch.zeros(1, 1, dtype=F64)
    with pytest.raises(ValueError, match=message):
        sampler.sample(FLAT.denoise(schedule), schedule, x.expand(1, 2), evenly(schedule, 3), **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("times", [[0.0, 0.5, 1.0], [1.0, 0.5, 0.5], [1.0], [0.5, -0.5]])
def test_grids_that_do_not_decrease_are_refused(sampler, times):
    schedule = linear()
    with pytest.raises(ValueError, match="must decrease"):
        SAMPLERS[sampler](FLAT.denoise(schedule), schedule, torch.zeros(1, 2), torch.tensor(times, dtype=F64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, r"guidance\.scale=-1"),
        ({"interval": [0.8, 0.2]}, "two rising times"),
        ({"interval": [0.8]}, "two rising times"),
        ({"interval": 0.5}, "two rising times"),
        ({"interval": ["a", "b"]}, "two rising times"),
        ({"interval": [10, 20]}, "beyond the schedule's t_max=1"),
        ({"rescale": 1.5}, r"rescale=1\.5"),
        ({"clip": 0.0}, "clip=0"),
        ({"dynamic_clip": 99.5}, r"dynamic_clip=99\.5"),
        ({"channels": 0}, "channels=0"),
        ({"channels": 1.5}, r"channels=1\.5"),
    ],
)
def test_bad_options_of_guidance_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierFree(tiny_denoiser(linear(), prediction.eps), Label(3).null, **options)


def test_a_condition_that_cannot_be_left_out_cannot_guide():
    denoiser = tiny_denoiser(linear(), prediction.eps, num_classes=0)
    with pytest.raises(ValueError, match=r"unconditional model cannot be guided.*guidance\.scale=1"):
        ClassifierFree(denoiser, Unconditional().null, scale=2.0)
    with pytest.raises(ValueError, match=r"condition\.dropout=0"):
        ClassifierFree(denoiser, Label(3, dropout=0.0).null, scale=2.0)
    estimate = ClassifierFree(denoiser, Unconditional().null)(X, T)
    assert estimate.x0.shape == X.shape
