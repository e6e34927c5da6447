import pytest
import torch

from dit.condition.label import Label
from dit.latent.pixels import Pixels
from dit.model.dit import DiT
from dit.noise import prediction, times
from dit.noise.denoiser import Denoiser
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.prediction import Estimate
from dit.noise.vp import cosine, linear
from dit.sampler.ancestral import sample
from dit.sampler.guidance import ClassifierFree
from dit.sampler.pipeline import Pipeline

SCHEDULES = {
    "linear": (linear(), times.evenly),
    "cosine": (cosine(), times.evenly),
    "edm": (EDM(), times.karras),
    "flow": (Flow(t_max=0.999), times.evenly),  # eps says nothing of x0 at 1
}
PREDICTIONS = {name: getattr(prediction, name) for name in ("eps", "x0", "v", "flow", "edm")}
MEAN, STD = 0.3, 0.5


def exact(schedule):
    """The exact denoiser of data ~ N(MEAN, STD^2)."""

    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return Estimate(x0, (x - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_samples_of_the_exact_denoiser_have_the_datas_mean_and_deviation(name, eta):
    schedule, grid = SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    layout = grid(schedule, 250)
    x = schedule(layout[0]).sigma * torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    x = sample(exact(schedule), schedule, x, layout, generator=generator, eta=eta)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_deterministic_sampler_solves_the_ode_at_first_order(name):
    """For Gaussian data the ODE's end is known: MEAN + STD (x_T - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2)."""
    schedule, grid = SCHEDULES[name]
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for num_steps in (200, 400):
        layout = grid(schedule, num_steps)
        alpha, sigma = schedule(layout[0])
        x = sigma * start
        end = MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        errors.append((sample(exact(schedule), schedule, x, layout) - end).abs().max().item())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.4)


def test_ddpms_step_is_the_published_posterior():
    """At eta = 1 the fresh noise has variance (1 - abar_s) / (1 - abar_t) beta, on DDPM's own grid."""
    schedule = linear()
    t, s = torch.tensor([0.5, 0.499], dtype=torch.float64)
    (alpha_t, sigma_t), (_, sigma_s) = schedule(t), schedule(s)
    beta = 1 - (alpha_t / schedule(s).alpha) ** 2
    x = torch.full((200_000,), 0.7, dtype=torch.float64)
    estimate = Estimate(torch.full_like(x, 0.1), (x - alpha_t * 0.1) / sigma_t)
    generator = torch.Generator().manual_seed(0)
    x_s = sample(lambda x, t: estimate, schedule, x, torch.stack([t, s]), generator=generator, eta=1.0)
    variance = (sigma_s / sigma_t) ** 2 * beta
    mean = schedule(s).alpha * beta / sigma_t**2 * 0.1 + (1 - beta).sqrt() * sigma_s**2 / sigma_t**2 * 0.7
    assert x_s.var().item() == pytest.approx(variance.item(), rel=0.02)
    assert x_s.mean().item() == pytest.approx(mean.item(), abs=3e-4)


def tiny_denoiser(schedule, predicted, seed=0):
    torch.manual_seed(seed)
    network = DiT(input_size=4, in_channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    for p in network.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Denoiser(network, schedule, predicted).eval()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_with_every_prediction_draws_the_same_bytes_again(name, predicted, eta):
    schedule, grid = SCHEDULES[name]
    denoiser = tiny_denoiser(schedule, PREDICTIONS[predicted])

    def draw(num_images, batch_size):
        pipeline = Pipeline(
            denoiser,
            Label(3),
            Pixels(1, 4),
            lambda denoiser, null: ClassifierFree(denoiser, null, 2.0),
            lambda *args, **kwargs: sample(*args, **kwargs, eta=eta, clip=1.0),
            lambda schedule: grid(schedule, 5),
        )
        asked = {"label": [i % 3 for i in range(num_images)]}
        return pipeline(asked, num_images, seed=3, batch_size=batch_size)

    images = draw(6, 6)
    assert images.dtype == torch.uint8 and images.shape == (6, 1, 4, 4)
    assert torch.equal(images, draw(6, 6))
    assert images.float().std() > 0
    if eta == 0:  # picture i does not depend on how many are drawn together
        difference = (images[:4].int() - draw(4, 2).int()).abs().max()
        assert difference <= 1


def test_guidance_is_linear_costs_nothing_at_one_and_is_the_same_for_every_prediction():
    schedule = linear()
    x, t = torch.randn(4, 1, 4, 4), torch.tensor(0.7)
    cond = {"label": torch.tensor([0, 1, 2, 0])}
    denoiser = tiny_denoiser(schedule, prediction.eps)
    null = Label(3).null
    calls = []
    denoiser.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    plain = ClassifierFree(denoiser, null, 1.0)(x, t, **cond)
    assert calls == [4]
    guided = ClassifierFree(denoiser, null, 3.0)(x, t, **cond)
    assert calls == [4, 8]
    nothing = denoiser(x, t, **null(cond))
    for field in ("x0", "eps"):
        expected = getattr(nothing, field) + 3 * (getattr(plain, field) - getattr(nothing, field))
        torch.testing.assert_close(getattr(guided, field), expected, atol=1e-4, rtol=1e-4)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x, atol=1e-4, rtol=1e-4)


def test_bad_options_are_refused():
    schedule, layout = linear(), times.evenly(linear(), 2)
    x = torch.zeros(1, 1)
    for options, message in [({"eta": 2.0}, "eta=2"), ({"clip": -1.0}, "clip=-1")]:
        with pytest.raises(ValueError, match=message):
            sample(exact(schedule), schedule, x, layout, **options)
    with pytest.raises(ValueError, match="must decrease"):
        sample(exact(schedule), schedule, x, layout.flip(0))
    with pytest.raises(ValueError, match=r"guidance\.scale=-1"):
        ClassifierFree(None, None, -1.0)


def test_labels_and_their_dropout():
    label = Label(10, dropout=0.3)
    cond = label({"label": torch.arange(10)})
    dropped = label.drop(cond, torch.arange(10) / 10)
    assert dropped["label"].tolist() == [10, 10, 10, 3, 4, 5, 6, 7, 8, 9]
    assert label.null(cond)["label"].tolist() == [10] * 10
    with pytest.raises(ValueError, match="from 0 to 9"):
        label({"label": [10]})
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        Label(10, dropout=1.5)
