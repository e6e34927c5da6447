import math

import pytest
import torch
from exact import SCHEDULES, Mixture

from dit.noise import bound, grid, prediction, times, weight
from dit.noise.ddpm import VP
from dit.noise.denoiser import Denoiser
from dit.noise.draw import SPREADS, Draw
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.prediction import Estimate
from dit.noise.schedule import NoiseLevel, Schedule
from dit.noise.trigonometric import Trigonometric
from dit.noise.vp import cosine, linear, scaled_linear, sigmoid

SCHEDULES = {name: schedule for name, (schedule, _) in SCHEDULES.items()}
PREDICTIONS = {name: getattr(prediction, name) for name in ("eps", "x0", "v", "flow", "edm")}
F64 = torch.float64


def inner_times(schedule, number=50):
    return torch.linspace(0.01, 0.99, number, dtype=F64) * schedule.t_max


def betas(schedule):
    alpha = schedule(torch.arange(schedule.num_steps + 1, dtype=F64) / schedule.num_steps).alpha
    return 1 - (alpha[1:] / alpha[:-1]) ** 2


def test_the_primers_worked_example():
    """One step of DDPM: sqrt(0.9) 0.8 + sqrt(0.1) (-0.3) = 0.6641."""
    alpha, sigma = VP(torch.tensor([0.1]))(torch.tensor(1.0, dtype=F64))
    assert float(alpha * 0.8 + sigma * -0.3) == pytest.approx(0.6641, abs=5e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "sigmoid", "sigmoid_betas"])
def test_the_jump_agrees_with_iterating(name):
    """x_k = sqrt(1 - beta) x_{k-1} + sqrt(beta) z, iterated in mean and variance, is the closed form at t = k / N."""
    schedule = SCHEDULES[name]
    mean, variance = 1.0, 0.0
    for k, beta in enumerate(betas(schedule).tolist(), start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        alpha, sigma = schedule(torch.tensor(k / 1000, dtype=F64))
        assert float(alpha) == pytest.approx(mean, abs=1e-10)
        assert float(sigma**2) == pytest.approx(variance, abs=1e-10)


def test_betas_are_the_published_ones():
    torch.testing.assert_close(betas(linear()), torch.linspace(1e-4, 0.02, 1000, dtype=F64), atol=1e-12, rtol=0)
    assert float(linear()(torch.tensor(1.0, dtype=F64)).alpha ** 2) == pytest.approx(4.0358e-5, rel=1e-4)
    assert betas(scaled_linear())[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])


def test_the_sigmoid_is_the_papers():
    """gamma(t) = (s(end) - s(start + t (end - start))) / (s(end) - s(start)), s a sigmoid over tau, but for the cap."""
    t = torch.arange(1, 900, dtype=F64) / 1000
    end, start = torch.tensor(3.0, dtype=F64).sigmoid(), torch.tensor(-3.0, dtype=F64).sigmoid()
    gamma = (end - (6 * t - 3).sigmoid()) / (end - start)
    torch.testing.assert_close(sigmoid()(t).alpha ** 2, gamma, atol=1e-9, rtol=0)


def test_zero_terminal_snr_leaves_nothing_and_the_first_step_as_it_was():
    before, after = scaled_linear(), scaled_linear(zero_terminal_snr=True)
    t = torch.tensor([0.001, 1.0], dtype=F64)
    assert after(t).alpha[1] < 1e-15
    torch.testing.assert_close(after(t).alpha[0], before(t).alpha[0])


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
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, atol=1e-9, rtol=1e-9)


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


def test_on_the_circle_v_is_the_velocity():
    schedule = Trigonometric()
    t = inner_times(schedule)
    for ours, theirs in zip(prediction.v(schedule, t), prediction.flow(schedule, t), strict=True):
        torch.testing.assert_close(ours, theirs)


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
    assert linear().time_input(torch.tensor([1.0, 0.001, 1e-5], dtype=F64)).tolist() == pytest.approx([999, 0, 0])


@pytest.mark.parametrize(
    ("schedule", "way_out"),
    [
        (Flow(), r"noise\.t_max=0\.999"),
        (Trigonometric(), r"noise\.t_max=1\.569"),
        (linear(zero_terminal_snr=True), "v works"),
    ],
)
def test_a_prediction_that_says_nothing_of_x0_is_refused(schedule, way_out):
    with pytest.raises(ValueError, match=way_out):
        Denoiser(torch.nn.Identity(), schedule, prediction.eps)
    for name in ("x0", "v", "flow", "edm"):
        Denoiser(torch.nn.Identity(), schedule, PREDICTIONS[name])
    Denoiser(torch.nn.Identity(), Flow(t_max=0.999), prediction.eps)
    Denoiser(torch.nn.Identity(), Trigonometric(t_max=1.569), prediction.eps)


U = (torch.arange(100_000) + 0.5) / 100_000


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "log_normal", "cosine_interpolated"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_densities_stay_in_range(name, density):
    schedule = SCHEDULES[name]
    options = {"size": 64} if density == "cosine_interpolated" else {}
    t = getattr(times, density)(schedule, U[::50], **options)
    assert (t > 0).all() and (t <= schedule.t_max).all() and t.std() > 0


def test_densities_have_their_shape():
    with pytest.raises(ValueError, match="Flow has no discrete steps: choose times=uniform"):
        times.discrete(Flow(), U)
    steps = times.discrete(linear(), U) * 1000
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.round().unique().tolist() == list(range(1, 1001))
    for schedule in (EDM(), Flow(), cosine()):
        ratio = -schedule.log_snr(times.log_normal(schedule, U.double())) / 2
        assert ratio.mean().item() == pytest.approx(-1.2, abs=1e-2) and ratio.std().item() == pytest.approx(
            1.2, abs=1e-2
        )
    assert times.logit_normal(Flow(), U).logit().std().item() == pytest.approx(1, abs=1e-2)
    assert times.logit_normal(Flow(), U, shift=3.0).logit().mean().item() == pytest.approx(math.log(3), abs=1e-2)
    assert times.uniform(Flow(), U, shift=3.0).median().item() == pytest.approx(0.75, abs=1e-3)
    with pytest.raises(ValueError, match="shift=0"):
        times.uniform(Flow(), U, shift=0.0)


def test_cosine_interpolated_is_the_shifted_cosine_schedule():
    """Where nothing is shifted, cosine in log SNR; otherwise the resolution of the noise moves from low to high."""
    u = torch.linspace(0.01, 0.99, 9, dtype=F64)
    plain = EDM(sigma_max=1e4).log_snr(times.cosine_interpolated(EDM(sigma_max=1e4), u, size=64, size_low=64))
    angle = math.atan(1e-3) + u * (math.atan(1e3) - math.atan(1e-3))
    torch.testing.assert_close(plain, -2 * angle.tan().log())
    moved = EDM(sigma_max=1e4).log_snr(times.cosine_interpolated(EDM(sigma_max=1e4), u, size=256, size_high=256))
    torch.testing.assert_close(moved - plain, 2 * u * math.log(32 / 256))  # fine detail as it is, much noise more so


@pytest.mark.parametrize("lay_out", ["evenly", "quadratic", "shifted", "karras", "log_snr", "respaced"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_grids_decrease_to_zero(name, lay_out):
    schedule, lay_out = SCHEDULES[name], getattr(grid, lay_out)
    if lay_out is grid.respaced and schedule.num_steps is None:
        with pytest.raises(ValueError, match="has no discrete steps: choose grid=evenly"):
            lay_out(schedule, 5)
        return
    for number in (1, 2, 20):
        layout = lay_out(schedule, number)
        assert layout.dtype == F64 and len(layout) == number + 1
        assert layout[-1] == 0 and (layout.diff() < 0).all()
        assert len(list(grid.pairs(layout))) == number
        first = schedule(layout[0])
        assert layout[0] == pytest.approx(schedule.t_max) or first.sigma / first.alpha == pytest.approx(1000)
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"num_steps={number}"):
            lay_out(schedule, number)


def test_grids_have_their_shape():
    assert grid.karras(EDM(), 18)[[0, 17]].tolist() == pytest.approx([80, 0.002])
    assert (grid.karras(EDM(), 18)[:-1] ** (1 / 7)).diff().std() < 1e-9
    assert EDM().log_snr(grid.log_snr(EDM(), 9)[:-1]).diff().std() < 1e-9
    assert grid.log_snr(linear(), 9)[8] == pytest.approx(0.001)  # nothing is asked of the network below its first step
    assert grid.quadratic(linear(), 4).tolist() == [1, 9 / 16, 1 / 4, 1 / 16, 0]
    assert grid.shifted(Flow(), 2, shift=3.0).tolist() == [1, 0.75, 0]
    assert (grid.respaced(linear(), 5)[:-1] * 1000 - 1).round().tolist() == [999, 749, 500, 250, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: grid.karras(EDM(), 5, rho=0.0), "grid.rho=0"),
        (lambda: grid.karras(EDM(), 5, sigma_min=90.0), "grid.sigma_min=90"),
        (lambda: grid.log_snr(EDM(), 5, sigma_min=-1.0), "grid.sigma_min=-1"),
        (lambda: grid.shifted(Flow(), 5, shift=-1.0), "shift=-1"),
        (lambda: grid.respaced(linear(), 1001), "between 1 and noise.num_steps=1000"),
        (lambda: VP(torch.tensor([1.0, 0.1])), "betas must lie in"),
        (lambda: VP(torch.tensor([0.1, 1.1])), "betas must lie in"),
        (lambda: linear(num_steps=0), "at least 1"),
        (lambda: scaled_linear(beta_start=-1.0), "beta_start=-1"),
        (lambda: Flow(2.0), r"t_max=2\.0"),
        (lambda: Trigonometric(2.0), r"t_max=2\.0"),
        (lambda: EDM(sigma_max=-1.0), "sigma_max=-1"),
        (lambda: weight.min_snr(linear(), U, gamma=0.0), "weight.gamma=0"),
        (lambda: weight.p2(linear(), U, k=0.0), "weight.k=0"),
    ],
)
def test_bad_values_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()


def test_keyed_numbers_do_not_depend_on_the_partition():
    whole = Draw(7, 3, range(8), 32)
    parts = [Draw(7, 3, range(first, first + 2), 8, num_lanes=8) for first in range(0, 8, 2)]
    assert torch.equal(whole.normal("eps", (2, 3)), torch.cat([part.normal("eps", (2, 3)) for part in parts]))
    for spread in SPREADS:
        assert torch.equal(whole.uniform("t", spread), torch.cat([part.uniform("t", spread) for part in parts]))
    assert not torch.equal(whole.uniform("t"), whole.uniform("drop"))
    assert not torch.equal(whole.uniform("t"), Draw(7, 4, range(8), 32).uniform("t"))
    assert not torch.equal(whole.uniform("t"), Draw(8, 3, range(8), 32).uniform("t"))
    assert whole.normal("eps", (1000,)).std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("spread", ["stratified", "low_discrepancy"])
def test_spread_numbers_are_even_over_the_batch_and_uniform_for_each_sample(spread):
    drawn = torch.stack([Draw(0, step, range(4), 32).uniform("t", spread) for step in range(2000)])  # (steps, B)
    bins = (drawn * 32).floor().sort(1).values
    distinct = torch.tensor([len(row.unique()) for row in bins]).float().mean()
    independent = torch.stack([Draw(0, step, range(4), 32).uniform("t") for step in range(100)])
    assert distinct > (31.9 if spread == "low_discrepancy" else 23)  # of 32; independent numbers fill 20
    assert len((independent * 32).floor()[0].unique()) < 26
    assert (drawn >= 0).all() and (drawn < 1).all()
    torch.testing.assert_close(drawn.mean(0), torch.full((32,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((32,), 12**-0.5), atol=0.02, rtol=0)
    assert drawn.mean(1).std() < independent.mean(1).std() / 3


# What papers and their code write down, for the error of what is predicted there.
PUBLISHED = {
    "min-SNR, eps": ("eps", weight.min_snr, lambda snr: snr.clamp(max=5) / snr),
    "min-SNR, x0": ("x0", weight.min_snr, lambda snr: snr.clamp(max=5)),
    "min-SNR, v": ("v", weight.min_snr, lambda snr: snr.clamp(max=5) / (snr + 1)),
    "P2, eps": ("eps", weight.p2, lambda snr: 1 / (1 + snr)),
    "truncated SNR, x0": ("x0", weight.truncated_snr, lambda snr: snr.clamp(min=1)),
    "SNR, x0": ("x0", lambda s, t: weight.mean_square(s, t, prediction=prediction.eps), lambda snr: snr),
    "SNR + 1, x0": ("x0", lambda s, t: weight.mean_square(s, t, prediction=prediction.v), lambda snr: snr + 1),
}


def weight_of_f(schedule, predicted, weighted, t):
    level = schedule(t)
    return (
        weighted(schedule, t) * (level.sigma / prediction.determinant(PREDICTIONS[predicted](schedule, t), level)) ** 2
    )


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("name", ["linear", "cosine", "trigonometric"])
def test_weights_are_the_published_ones(name, case):
    schedule, (predicted, weighted, published) = SCHEDULES[name], PUBLISHED[case]
    t = inner_times(schedule)
    snr = schedule.log_snr(t).exp()
    torch.testing.assert_close(weight_of_f(schedule, predicted, weighted, t), published(snr))


@pytest.mark.parametrize("weighted", [weight.min_snr, weight.soft_min_snr, weight.truncated_snr, weight.p2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_are_finite_at_the_ends_of_every_density(name, weighted):
    schedule, u = SCHEDULES[name], torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    for density in (times.uniform, times.logit_normal, times.log_normal):
        t = density(schedule, u)
        assert (weight_of_f(schedule, "v", weighted, t.double()) >= 0).all()
        assert weight_of_f(schedule, "v", weighted, t.double()).isfinite().all()
        assert not schedule.log_snr(t).isnan().any()


def test_edms_weight_and_the_soft_min_snr_are_the_published_ones():
    sigma, sd = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=F64), 0.5
    edm = weight.mean_square(EDM(), sigma, prediction=prediction.edm)
    torch.testing.assert_close(edm, (sigma**2 + sd**2) / (sigma * sd) ** 2)
    torch.testing.assert_close(weight.soft_min_snr(EDM(), sigma), 1 / (sigma**2 + sd**2))


@pytest.mark.parametrize("space", PREDICTIONS)
@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_loss_in_another_space_is_a_weight(name, predicted, space):
    """|F'_hat - F'|^2, with F'_hat from the (x0, eps) that the network's F says, is the weight times |F_hat - F|^2."""
    schedule = SCHEDULES[name]
    t = inner_times(schedule)
    level, ours, other = schedule(t), PREDICTIONS[predicted](schedule, t), PREDICTIONS[space](schedule, t)
    x0, eps, wrong = torch.randn(3, len(t), generator=torch.Generator().manual_seed(0), dtype=F64)
    x_t, f = level.alpha * x0 + level.sigma * eps, ours.a * x0 + ours.b * eps
    said = prediction.solve(ours, level, f + wrong, x_t)
    error = other.a * (said.x0 - x0) + other.b * (said.eps - eps)
    weighted = weight_of_f(schedule, predicted, lambda s, t: weight.mean_square(s, t, prediction=PREDICTIONS[space]), t)
    torch.testing.assert_close(weighted * wrong**2, error**2, atol=1e-6, rtol=1e-5)


def test_the_bounds_term_is_the_divergence_of_two_normals():
    schedule = linear()
    t, s = torch.tensor([0.5, 0.2], dtype=F64), torch.tensor([0.499, 0.1], dtype=F64)
    x0, x_t, said, learned = torch.randn(4, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    learned = learned.tanh()
    level = [NoiseLevel(*(c.reshape(2, 1, 1, 1) for c in schedule(at))) for at in (t, s)]
    now, following = level
    least, greatest = bound.variances(now, following)
    ratio = now.alpha / following.alpha

    def step(x0, variance):
        mean = ratio * following.sigma**2 / now.sigma**2 * x_t + following.alpha * greatest / now.sigma**2 * x0
        return torch.distributions.Normal(mean, variance.sqrt().expand_as(mean))

    for variance in (None, learned):
        theirs = least if variance is None else bound.log_variance(variance, least, greatest).exp()
        expected = torch.distributions.kl_divergence(step(x0, least), step(said, theirs))
        ours = bound.nats(schedule, Estimate(said, said, variance), x0, t, s)
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-6)
    # The difference of SNRs (arXiv:2107.00630).
    snr = [schedule.log_snr(at).exp().reshape(2, 1, 1, 1) for at in (t, s)]
    simple = (snr[1] - snr[0]) / 2 * (x0 - said) ** 2
    torch.testing.assert_close(bound.nats(schedule, Estimate(said, said), x0, t, s), simple, atol=1e-9, rtol=1e-6)


def test_the_last_term_of_the_bound_is_a_share_of_grey_levels():
    """Over all 256 levels the shares of a pixel add up to one; wrong ones far away stay finite."""
    schedule = linear()
    x0 = (torch.arange(256, dtype=F64) / 127.5 - 1).reshape(256, 1, 1, 1)
    t, s = torch.full((256,), 0.001, dtype=F64), torch.zeros(256, dtype=F64)
    for said in (-1.0, 0.013, 0.7):
        nats = bound.nats(schedule, Estimate(torch.full_like(x0, said), x0, None), x0, t, s)
        assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert nats.isfinite().all()


def test_writing_call_is_enough_for_a_new_schedule():
    class Half(Schedule):
        def __call__(self, t):
            return NoiseLevel(1 - 0.5 * t, t)

    schedule, data = Half(), Mixture([[0.3]], 0.5)
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t)
    assert schedule.straight(t).tolist() == schedule(t).alpha.tolist()
    assert data.denoise(schedule)(torch.zeros(50, 1, dtype=F64), t[:, None]).x0.shape == (50, 1)
