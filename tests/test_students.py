"""Few-step students: their targets are exact where the whole trajectory is known, and nothing else is trained."""

import itertools
import math
from functools import partial

import pytest
import torch
from exact import SCHEDULES
from test_sampler import PREDICTIONS, tiny_denoiser
from torch import nn

from dit.model.head import Head
from dit.noise import prediction, weight
from dit.noise.denoiser import Denoiser, Output, expand_like
from dit.noise.draw import Draw
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.grid import evenly, karras
from dit.noise.matched import Matched, on_path
from dit.noise.prediction import Estimate
from dit.noise.step import secant, step
from dit.noise.times import uniform
from dit.noise.trigonometric import Trigonometric
from dit.noise.vp import cosine, linear
from dit.objective.consistency import Consistency, doubling, fixed, shrinking
from dit.objective.continuous import ContinuousConsistency
from dit.objective.derivative import central, check_forward, is_forward, jvp
from dit.objective.dmd import DistributionMatching
from dit.objective.guidance_distillation import GuidanceDistillation
from dit.objective.meanflow import MeanFlow
from dit.objective.objective import Batch
from dit.objective.progressive import Progressive
from dit.objective.reflow import Reflow
from dit.objective.shortcut import Shortcut
from dit.objective.teacher import Teacher
from dit.sampler import consistency, flow_map, heun
from dit.sampler.guidance import ClassifierFree, Told
from dit.train.execution import arrange
from dit.weights.convert import fitted

MEAN, STD = 0.3, 0.5  # of the Gaussian data


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, STD^2) data, and the exact flow map of its trajectories."""

    def __init__(self, schedule, mean=MEAN):
        super().__init__()
        self.schedule, self.mean = schedule, mean

    def forward(self, x_t, t, **cond):
        alpha, sigma = (expand_like(c, x_t) for c in self.schedule(t))
        x0 = self.mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * self.mean)
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    def end(self, x_t, t, s):
        """Where the trajectory through x_t is at s."""
        (alpha, sigma), (alpha_s, sigma_s) = ([expand_like(c, x_t) for c in self.schedule(time)] for time in (t, s))
        std_t, std_s = ((a**2 * STD**2 + b**2).sqrt() for a, b in ((alpha, sigma), (alpha_s, sigma_s)))
        return alpha_s * MEAN + std_s / std_t * (x_t - alpha * MEAN)


class Student(nn.Module):
    """One that says exactly the end of the trajectory, up to `wrong`."""

    def __init__(self, schedule, wrong=0.0):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction.x0
        self.exact, self.wrong = Gaussian(schedule), wrong

    def forward(self, x_t, t, **cond):
        x0 = self.exact.end(x_t, t, torch.zeros_like(t)) + self.wrong * t.reshape(-1, 1, 1, 1)
        alpha, sigma = (expand_like(c, x_t) for c in self.schedule(t))
        return Estimate(x0, (x_t - alpha * x0) / sigma)


class Exact(Teacher):
    """A teacher whose steps have no error."""

    def __init__(self, schedule):
        self.gaussian = Gaussian(schedule)

    def step(self, schedule, x_t, t, s, cond):
        return self.gaussian.end(x_t, t, s)


class Net(nn.Module):
    """A network of a schedule that says its F of the Gaussian exactly."""

    def __init__(self, schedule, predicted, mean=MEAN):
        super().__init__()
        self.schedule, self.predicted, self.exact = schedule, predicted, Gaussian(schedule, mean)

    def forward(self, x, time, **cond):
        t = self.time_of_input(time)
        scale = expand_like(self.schedule.input_scale(t), x)
        a, b = (expand_like(c, x) for c in self.predicted(self.schedule, t))
        said = self.exact(x / scale, t)
        return a * said.x0 + b * said.eps

    def time_of_input(self, time):
        """By search, as what a network is told rises with t."""
        low, high = torch.zeros_like(time), torch.full_like(time, self.schedule.t_max)
        for _ in range(60):
            middle = (low + high) / 2
            late = self.schedule.time_input(middle) > time
            low, high = torch.where(late, low, middle), torch.where(late, middle, high)
        return low


def gaussian(schedule, predicted, mean=MEAN):
    """The Gaussian's denoiser, as one of a network; in float64."""
    return Denoiser(Net(schedule, PREDICTIONS[predicted], mean), schedule, PREDICTIONS[predicted])


def batch(size=64, seed=0, dtype=torch.float64, lent=None):
    x0 = MEAN + STD * torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    more = {} if lent is None else {"lent": lent}
    return Batch(x0, {"label": torch.arange(size) % 3}, Draw(seed, 0, range(4), size), **more)


class Straight(nn.Module):
    """Says exactly what a point on the line between the noise and its end is made of, up to `wrong`."""

    def __init__(self, schedule, predicted, wrong=0.0):
        super().__init__()
        self.schedule, self.prediction, self.exact, self.wrong = schedule, predicted, Gaussian(schedule), wrong

    def end(self, eps):
        """Where the trajectory of noise ends."""
        t = torch.full((len(eps),), self.schedule.t_max, dtype=torch.float64)
        return self.exact.end(expand_like(self.schedule(t).sigma, eps) * eps, t, torch.zeros_like(t))

    def output(self, x_t, t, **cond):
        alpha, sigma = (expand_like(c, x_t) for c in self.schedule(t.double()))
        a, b = (expand_like(c, x_t) for c in self.prediction(self.schedule, t.double()))
        least, slope = self.end(torch.zeros_like(x_t)), self.end(torch.ones_like(x_t))
        slope = slope - least
        eps = (x_t - alpha * least) / (alpha * slope + sigma)
        return Output(a * (least + slope * eps) + b * eps + self.wrong, None)


def alike(schedule, t):
    """The weight of errors of x0 that count alike."""
    return torch.ones_like(t)


def loss_of(objective, denoiser, batch, at=0):
    [(name, loss)] = objective.phases(denoiser, batch, at)
    assert name == "denoiser"
    return loss


INTERVALS = {
    "fixed": partial(fixed, grid=evenly, num_steps=8),
    "doubling": partial(doubling, grid=evenly, first=2, last=16),
    "shrinking": partial(shrinking, times=uniform, stages=4),
}


@pytest.mark.parametrize("predicted", ["eps", "v", "edm"])
@pytest.mark.parametrize("of", [name for name in SCHEDULES if name not in ("zero_terminal_snr", "trigonometric")])
@pytest.mark.parametrize("to", ["flow", "trigonometric", "edm", "cosine"])
def test_a_denoiser_on_another_path_says_the_same(of, to, predicted):
    of, to = SCHEDULES[of][0], SCHEDULES[to][0]
    if of.t_max == 1 and predicted == "eps" and isinstance(of, Flow):
        of = Flow(t_max=0.999)
    x0, eps = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * min(to.t_max, 3.0)
    alpha, sigma = (expand_like(c, x0) for c in to(t))
    x_t = alpha * x0 + sigma * eps
    ours = Teacher(gaussian(of, predicted)).on(to)(x_t, t)
    native = Gaussian(to)(x_t, t)
    torch.testing.assert_close(ours.x0, native.x0, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(ours.eps, native.eps, atol=1e-7, rtol=1e-7)


def test_more_noise_than_the_teacher_knows_is_explained():
    t = torch.ones(5, dtype=torch.float64)
    x_t = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    said = Teacher(gaussian(linear(), "eps")).on(Flow())(x_t, t)
    torch.testing.assert_close(said.eps, x_t)
    assert said.x0.isfinite().all() and (said.x0 - MEAN).abs().max() < 0.05


@pytest.mark.parametrize("of", ["linear", "cosine", "edm", "sigmoid_betas"])
def test_the_matching_time_has_a_derivative(of):
    schedule = Matched(Flow(), SCHEDULES[of][0])
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    rate = torch.func.jvp(schedule.there, (t,), (torch.ones_like(t),))[1]
    difference = (schedule.there(t + 1e-5) - schedule.there(t - 1e-5)) / 2e-5
    torch.testing.assert_close(rate, difference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["linear", "edm"])
def test_a_matched_denoiser_has_its_derivative_near_both_ends(of):
    """Differences look beyond them."""
    denoiser = on_path(
        tiny_denoiser(SCHEDULES[of][0], prediction.v if of == "linear" else prediction.edm).double(), Flow()
    )
    t = torch.tensor([5e-5, 0.5], dtype=torch.float64)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, along = (x, t), (torch.ones_like(x), torch.ones_like(t))
    label = torch.arange(2)
    exact, near = (d(lambda x, t: denoiser(x, t, label=label).x0, at, along) for d in (jvp, partial(central, h=1e-4)))
    assert near.isfinite().all()
    torch.testing.assert_close(near[1], exact[1], rtol=1e-2, atol=1e-3)  # between steps of VP the slope jumps
    ends = torch.tensor([0.0, denoiser.schedule.t_max], dtype=torch.float64)
    assert denoiser(x, ends, label=label).x0.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_secant_is_the_step_that_lands(name):
    schedule = SCHEDULES[name][0]
    x_t, x_s = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.3, 1, 5, dtype=torch.float64) * schedule.t_max
    for s in (t / 2, torch.zeros_like(t)):
        landed = step(schedule, x_t, t, s, secant(schedule, x_t, x_s, t, s))
        torch.testing.assert_close(landed, x_s, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_teachers_steps_converge_to_its_trajectory(solver):
    """At the order of the solver, on a path that is not its own."""
    teacher, schedule = Teacher(gaussian(EDM(), "edm"), solver=solver), Flow()
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, last = torch.full((8,), 0.8, dtype=torch.float64), torch.full((8,), 0.2, dtype=torch.float64)
    errors = []
    for num_steps in (10, 20):
        x_t, times = x, torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        for a, b in itertools.pairwise(times):
            x_t = teacher.step(schedule, x_t, torch.lerp(first, last, a), torch.lerp(first, last, b), {})
        errors.append((x_t - Gaussian(schedule).end(x, first, last)).abs().max())
    assert 0.8 * 2 ** (1 + (solver == "heun")) < errors[0] / errors[1] < 1.25 * 2 ** (1 + (solver == "heun"))


@pytest.mark.parametrize("at", [0, 60, 99])
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_consistency_has_no_error_at_the_flow_map_and_one_beside_it(name, interval, at):
    schedule = SCHEDULES[name][0]
    objective = Consistency(INTERVALS[interval], alike, 100, Exact(schedule), huber=None)
    assert loss_of(objective, Student(schedule), batch(), at) < 1e-16
    assert loss_of(objective, Student(schedule, wrong=0.1), batch(), at) > 1e-7


def test_without_a_teacher_consistency_is_that_of_the_same_noise():
    """And denoising, while s is 0."""
    schedule, given = Flow(), batch()
    denoiser = tiny_denoiser(schedule, prediction.flow).double()
    objective = Consistency(INTERVALS["shrinking"], alike, 100, huber=None)
    t = uniform(schedule, given.draw.uniform("t")).double()
    x_t = expand_like(1 - t, given.x0) * given.x0 + expand_like(t, given.x0) * given.draw.normal("eps", (1, 4, 4))
    error = (denoiser(x_t, t, **given.cond).x0 - given.x0).square().mean()
    torch.testing.assert_close(loss_of(objective, denoiser, given), error.float(), atol=0, rtol=1e-5)


def test_the_pseudo_huber_distance_is_between_a_square_and_a_norm():
    given, student = batch(), partial(Student, Flow())
    square, huber, norm = (
        loss_of(
            Consistency(INTERVALS["shrinking"], alike, 100, Exact(Flow()), huber=huber), student(wrong=1.0), given, 60
        )
        for huber in (None, 1e3, 0.0)
    )
    torch.testing.assert_close(huber, square / 2e3, rtol=1e-3, atol=1e-4)
    assert square < norm < square.sqrt()


def test_targets_are_asked_of_the_borrowed_weights():
    asked, denoiser = [], tiny_denoiser(Flow(), prediction.flow).double()

    class Lent:
        def __init__(self, profile):
            asked.append(profile)

        def __enter__(self):
            self.before = {name: value.clone() for name, value in denoiser.state_dict().items()}
            for p in denoiser.parameters():
                p.data.mul_(0)

        def __exit__(self, *_):
            denoiser.load_state_dict(self.before)

    objective = Consistency(INTERVALS["fixed"], alike, 100, Exact(Flow()), target="target", huber=None)
    given = batch(lent=Lent)
    assert objective.profiles == ("target",)
    loss = loss_of(objective, denoiser, given)
    assert asked == ["target"]
    assert abs(loss - loss_of(objective, denoiser, batch())) > 1e-6
    loss.backward()


@pytest.mark.parametrize("name", SCHEDULES)
def test_progressive_has_no_error_where_two_steps_of_the_teacher_land(name):
    """In its first stage its teacher's, later its own, of half the length."""
    schedule = SCHEDULES[name][0]

    class Halving(nn.Module):
        """Says where two exact steps of a grid land; and at times between them, where one does."""

        def __init__(self, num_steps, wrong=0.0):
            super().__init__()
            self.schedule, self.prediction, self.exact, self.wrong = schedule, prediction.x0, Gaussian(schedule), wrong
            self.times = evenly(schedule, num_steps=num_steps)

        def forward(self, x_t, t, **cond):
            n = (t[:, None] - self.times).abs().argmin(1)
            s = self.times[n + 1]
            said = secant(schedule, x_t, self.exact.end(x_t, t, s), t, s)
            return Estimate(said.x0 + self.wrong, said.eps)

    plain = partial(weight.mean_square, prediction=prediction.v)
    objective = Progressive(Exact(schedule), evenly, plain, num_stages=3, max_steps=30)
    for at, num_steps in ((0, 4), (9, 4), (10, 2), (20, 1), (29, 1)):
        given = batch()
        if at < 10:
            assert loss_of(objective, Halving(num_steps), given, at) < 1e-12
            assert loss_of(objective, Halving(num_steps, wrong=0.1), given, at) > 1e-4
            continue
        student = Halving(num_steps)

        class Before:
            """The student as it was, which took twice as many steps."""

            def __init__(self, profile):
                assert profile == "before"

            def __enter__(self):
                student.times = evenly(schedule, num_steps=2 * num_steps)  # noqa: B023

            def __exit__(self, *_):
                student.times = evenly(schedule, num_steps=num_steps)  # noqa: B023

        assert loss_of(objective, student, given._replace(lent=Before), at) < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_reflow_has_no_error_at_the_exact_coupling_and_one_beside_it(name):
    schedule, predicted = SCHEDULES[name][0], prediction.flow if name == "flow" else prediction.v
    eps = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = Straight(schedule, predicted)
    pairs = batch()._replace(x0=student.end(eps), eps=eps)
    assert pairs.x0.mean().item() == pytest.approx(MEAN, abs=0.05) and pairs.x0.std().item() == pytest.approx(STD, 0.05)
    objective = Reflow(uniform)
    assert loss_of(objective, student, pairs) < 1e-12
    assert loss_of(objective, Straight(schedule, predicted, wrong=0.1), pairs) > 1e-3
    assert loss_of(objective, student, pairs._replace(eps=eps.flip(0))) > 1e-2
    if name == "flow":  # in one step from the noise
        velocity = student.output(eps, torch.ones(64)).f
        torch.testing.assert_close(eps - velocity, pairs.x0)


@pytest.mark.parametrize("objective", ["consistency", "progressive"])
def test_a_loss_reaches_the_student_alone(objective):
    teacher = Teacher(tiny_denoiser(linear(), prediction.eps))
    made = {
        "consistency": lambda: Consistency(INTERVALS["fixed"], alike, 100, teacher),
        "progressive": lambda: Progressive(
            teacher, evenly, partial(weight.mean_square, prediction=prediction.flow), 2, 10
        ),
    }[objective]()
    assert not list(made.parameters()) and not made.state_dict()
    student = tiny_denoiser(Flow(), prediction.flow, seed=1)
    loss_of(made, student, batch(dtype=torch.float32)).backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.parameters())


@pytest.mark.parametrize("predicted", PREDICTIONS)
def test_one_step_of_the_sampler_is_what_is_said_at_the_beginning(predicted):
    denoiser = tiny_denoiser(cosine(), PREDICTIONS[predicted])
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    told = {"label": torch.arange(3)}
    one = consistency.sample(lambda x_t, t: denoiser(x_t, t, **told), cosine(), x, evenly(cosine(), num_steps=1))
    torch.testing.assert_close(one, denoiser(x, torch.tensor(cosine().t_max, dtype=torch.float64), **told).x0)


def test_the_sampler_keeps_the_distribution_of_an_exact_student():
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = Student(Flow())
    drawn = consistency.sample(
        lambda x_t, t: student(x_t, t.expand(len(x_t))),
        Flow(),
        x,
        evenly(Flow(), num_steps=4),
        generator=torch.Generator().manual_seed(1),
    )
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02) and drawn.std().item() == pytest.approx(STD, rel=0.02)


def test_a_teacher_on_another_path_ends_where_it_does_on_its_own():
    """The same trajectory, in the coordinates of flow."""
    own, there = EDM(), Flow(t_max=80 / 81)
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    native = heun.sample(Gaussian(own), own, 80 * x, karras(own, num_steps=400))
    ours = heun.sample(Teacher(gaussian(own, "edm")).on(there), there, 80 / 81 * x, evenly(there, num_steps=2000))
    torch.testing.assert_close(ours, native, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Consistency(INTERVALS["fixed"], alike, 10, huber=-1.0), "objective.huber=-1.0"),
        (lambda: Teacher(gaussian(Flow(), "flow"), solver="rk4"), "objective.teacher.solver=rk4"),
        (lambda: Progressive(Exact(Flow()), evenly, weight.truncated_snr, 3, 10), "must be a multiple"),
        (lambda: Progressive(None, evenly, weight.truncated_snr, 5, 10), "take objective/teacher=run"),
        (lambda: doubling(Flow(), torch.zeros(1), 0.0, grid=evenly, first=0), "objective.interval.first=0"),
        (lambda: shrinking(Flow(), torch.zeros(1), 0.0, times=uniform, q=1.0), "q=1.0"),
        (
            lambda: Consistency(INTERVALS["fixed"], alike, 10).check(tiny_denoiser(cosine(), prediction.eps)),
            "times as large in x0",
        ),
    ],
)
def test_mistakes(made, message):
    with pytest.raises(ValueError, match=message):
        made()


class Landing(nn.Module):
    """The exact flow map of the Gaussian on the straight path, up to `wrong`."""

    def __init__(self, wrong=0.0):
        super().__init__()
        self.schedule, self.exact, self.wrong = Flow(), Gaussian(Flow()), wrong

    def forward(self, x_t, t, s=None, **cond):
        s = t if s is None else s
        gap = expand_like(t - s, x_t)
        said = self.exact(x_t, t)
        short = gap.abs() < 1e-9
        u = torch.where(short, said.eps - said.x0, (x_t - self.exact.end(x_t, t, s)) / torch.where(short, 1.0, gap))
        u = u + self.wrong * gap
        return Estimate(x_t - expand_like(t, x_t) * u, x_t + expand_like(1 - t, x_t) * u)


def inner(schedule, u):
    """Away from the ends, where differences would look beyond."""
    return 0.1 + 0.8 * u


DERIVATIVES = {"jvp": (jvp, 1e-16), "central": (partial(central, h=1e-4), 1e-12)}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("own_direction", [False, True])
def test_meanflow_has_no_error_at_the_flow_map_and_one_beside_it(own_direction, derivative):
    derivative, most = DERIVATIVES[derivative]
    objective = MeanFlow(inner, derivative, Teacher(gaussian(Flow(), "flow")), own_direction=own_direction, power=0.0)
    assert loss_of(objective, Landing(), batch()) < most
    assert loss_of(objective, Landing(wrong=0.1), batch()) > 1e-5


def test_the_direction_of_the_derivative_matters():
    """Without the part along x a network that is right has an error."""

    def time_alone(function, at, along):
        return jvp(function, at, (torch.zeros_like(along[0]), *along[1:]))

    objective = MeanFlow(inner, time_alone, Teacher(gaussian(Flow(), "flow")), power=0.0)
    assert loss_of(objective, Landing(), batch()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_derivatives_agree(dtype):
    """That of a transformer, attention included, along all that it is told."""
    denoiser = tiny_denoiser(Flow(), prediction.flow, lands=True).to(dtype)
    x, d = torch.randn(2, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    t, s = torch.linspace(0.3, 0.9, 6, dtype=dtype), torch.linspace(0.1, 0.3, 6, dtype=dtype)
    told = {"label": torch.arange(6) % 3}

    def velocity(x, t, s):
        return denoiser(x, t, s, **told).eps

    along = (d, torch.ones_like(t), torch.full_like(s, 0.5))
    exact, least = jvp(velocity, (x, t, s), along), 1e-4 if dtype == torch.float64 else 5e-3
    difference = central(velocity, (x, t, s), along, h=least)
    assert (difference - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float64 else 1e-3)
    h = torch.zeros((), dtype=dtype, requires_grad=True)
    through = torch.autograd.functional.jacobian(
        lambda h: velocity(x + h * along[0], t + h * along[1], s + h * along[2]), h
    )
    torch.testing.assert_close(through, exact, rtol=1e-4, atol=1e-5)
    assert not exact.requires_grad


def test_a_shortcut_has_no_error_where_two_steps_land():
    """The flow map is one: it makes two steps of one. Its velocity is the teacher's."""
    objective = Shortcut(inner, Teacher(gaussian(Flow(), "flow")), share=0.5, most=3, target=None, clip=None)
    # The shortest step is learned from velocities, which are no flow map: none of these is drawn with most=30.
    never = Shortcut(inner, Teacher(gaussian(Flow(), "flow")), share=0.5, most=0, target=None, clip=None)
    assert loss_of(never, Landing(), batch()) > 1e-5
    given = batch()
    steps = 2 ** (given.draw.uniform("steps") * 4).long()
    long = torch.arange(64) % 16 < 8
    given.draw.uniform = lambda purpose, uniform=given.draw.uniform: (
        torch.where(long & (steps == 8), 0.0, uniform(purpose)) if purpose == "steps" else uniform(purpose)
    )
    assert loss_of(objective, Landing(), given) < 1e-12
    assert loss_of(objective, Landing(wrong=0.1), given) > 1e-5


def test_flow_maps_land_where_they_are_told_in_any_number_of_steps():
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = Gaussian(Flow()).end(x, torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    for num_steps in (1, 2, 5):
        drawn = flow_map.sample(Landing(), Flow(), x, evenly(Flow(), num_steps=num_steps))
        torch.testing.assert_close(drawn, there)


class Dropping(nn.Module):
    """A network that is nothing but dropout, and keeps the masks."""

    lands = True

    def __init__(self):
        super().__init__()
        self.dropout, self.share, self.masks = nn.Dropout(0.5), nn.Parameter(torch.ones(())), []

    def forward(self, x, time, **cond):
        mask = self.dropout(torch.ones_like(x))
        torch.rand(7)  # whatever else draws of the stream
        self.masks.append(mask.detach().clone())
        return self.share * x * mask


@pytest.mark.parametrize(
    ("objective", "schedule", "passes"),
    [
        (lambda: Consistency(INTERVALS["fixed"], alike, 100), Flow(), 2),
        (lambda: MeanFlow(inner, jvp, own_direction=True), Flow(), 3),
        (lambda: MeanFlow(inner, partial(central, h=1e-4)), Flow(), 3),
        (lambda: ContinuousConsistency(inner, jvp), Trigonometric(), 2),
        (lambda: ContinuousConsistency(inner, partial(central, h=1e-4)), Trigonometric(), 3),
    ],
)
def test_all_passes_of_a_step_have_the_same_dropout(objective, schedule, passes):
    """Or the difference of two passes would be that of two networks."""

    def masks(given):
        network = Dropping().double()
        loss_of(objective(), Denoiser(network, schedule, prediction.v), given).backward()
        assert len(network.masks) == passes
        assert all(torch.equal(mask, network.masks[0]) for mask in network.masks)
        assert 0.3 < (network.masks[0] == 0).float().mean() < 0.7
        return network.masks[0]

    first = batch()
    assert torch.equal(masks(first), masks(first))
    for other in (Draw(0, 1, range(4), 64), Draw(0, 0, range(4, 8), 64), Draw(1, 0, range(4), 64)):
        assert not torch.equal(masks(first._replace(draw=other)), masks(first))  # of a step, a process, a seed


@pytest.mark.parametrize("objective", ["progressive", "shortcut"])
def test_a_student_teaches_itself_without_dropout(objective):
    plain = partial(weight.mean_square, prediction=prediction.flow)
    made, at = {
        "progressive": (Progressive(Exact(Flow()), evenly, plain, num_stages=2, max_steps=2), 1),
        "shortcut": (Shortcut(inner, share=0.5), 0),
    }[objective]
    network = Dropping().double()
    denoiser = Denoiser(network, Flow(), prediction.flow)
    loss_of(made, denoiser, batch(), at)
    *taught, learned = [(mask == 0).any() for mask in network.masks]
    assert len(taught) == 2 and not any(taught) and learned and denoiser.training and network.training


@pytest.mark.parametrize("objective", [partial(MeanFlow, derivative=jvp), Shortcut])
def test_flow_maps_want_a_network_that_lands(objective):
    objective = objective(uniform)
    with pytest.raises(ValueError, match=r"model\.lands=true"):
        objective.check(tiny_denoiser(Flow(), prediction.flow))
    with pytest.raises(ValueError, match="noise=flow"):
        objective.check(tiny_denoiser(cosine(), prediction.v, lands=True))
    objective.check(tiny_denoiser(Flow(), prediction.flow, lands=True))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("at", [0, 50, 200])
def test_continuous_consistency_has_no_error_at_the_flow_map_and_one_beside_it(at, derivative):
    derivative, most = DERIVATIVES[derivative]
    schedule = Trigonometric()
    objective = ContinuousConsistency(inner, derivative, Teacher(gaussian(Flow(), "flow")), warmup_steps=100)
    # Before r has risen the tangent is that of denoising, too.
    right = ContinuousConsistency(inner, derivative, Teacher(gaussian(Flow(), "flow")), warmup_steps=0)
    assert loss_of(right, Student(schedule), batch(), at) < 1e3 * most
    assert loss_of(right, Student(schedule, wrong=0.1), batch(), at) > 1e-3
    early, late = loss_of(objective, Student(schedule), batch(), 0), loss_of(objective, Student(schedule), batch(), 100)
    assert late < 1e3 * most < early


def test_continuous_consistency_learns_towards_the_flow_map():
    """The gradient of a student that says too much says less: a wrong sign would not show in the loss."""
    student = Student(Trigonometric(), wrong=torch.tensor(0.1, requires_grad=True, dtype=torch.float64))
    objective = ContinuousConsistency(inner, jvp, Teacher(gaussian(Flow(), "flow")), warmup_steps=0)
    loss_of(objective, student, batch()).backward()
    assert student.wrong.grad > 0


class Guided(Net):
    """Says its F of a Gaussian whose mean is its label, or of what guidance makes of those, up to a convention."""

    def __init__(self, schedule, predicted, scale=None, wrong=0.0):
        super().__init__(schedule, predicted)
        self.scale, self.wrong, self.guided = scale, wrong, scale == "told"

    def forward(self, x, time, label=None, scale=None):
        t = self.time_of_input(time)
        x_t = x / expand_like(self.schedule.input_scale(t), x)
        (alpha, sigma), (a, b) = ([expand_like(c, x) for c in pair(t)] for pair in (self.schedule, self._coefficients))

        def said(mean):
            x0 = mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * mean)
            return a * x0 + b * (x_t - alpha * x0) / sigma

        told, nothing = said(expand_like(label.to(x), x)), said(torch.full_like(expand_like(t, x), 3.0))
        if self.scale is None:
            return torch.where(expand_like(label == 3, x), nothing, told)
        w = (expand_like(scale, x) if self.guided else self.scale) + self.wrong
        return nothing + w * (told - nothing)

    def _coefficients(self, t):
        return self.predicted(self.schedule, t)


def nobody(cond):
    """Nothing told, which is label 3."""
    return {name: torch.full_like(value, 3) for name, value in cond.items()}


@pytest.mark.parametrize("scale", [2.0, "told"])
@pytest.mark.parametrize(("of", "to"), [("flow", "flow"), ("linear", "flow"), ("cosine", "cosine"), ("edm", "cosine")])
def test_guidance_is_distilled_where_the_student_says_what_its_guided_teacher_does(of, to, scale):
    """Of another convention, w for 1 + w, it is not."""
    of, to = SCHEDULES[of][0], SCHEDULES[to][0]
    own = torch.float64
    guided = partial(
        ClassifierFree,
        null=nobody,
        scale=1.0 if scale == "told" else scale,
    )
    teacher = Teacher(
        Denoiser(Guided(of, prediction.v), of, prediction.v), guided, scale=1.0 if scale == "told" else scale
    )
    objective = GuidanceDistillation(teacher, inner, [1.0, 4.0] if scale == "told" else None)
    for wrong in (0.0, 1.0):
        student = Denoiser(Guided(to, prediction.v, scale, wrong), to, prediction.v)
        objective.check(student)
        loss = loss_of(objective, student, batch(dtype=own))
        assert loss > 1e-3 if wrong else loss < 1e-12
    assert objective.few_step().guidance == ([1.0, 4.0] if scale == "told" else 2.0)


def test_a_network_that_is_told_a_scale_begins_as_one_that_is_not():
    plain, guided = (tiny_denoiser(Flow(), prediction.flow, guided=guided) for guided in (False, True))
    guided.network.load_state_dict(fitted(plain.network.state_dict(), guided.network))
    x, t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 3)
    told = {"label": torch.arange(3)}
    for scale in (1.0, 4.0):
        assert torch.equal(Told(guided, null=None, scale=scale)(x, t, **told).x0, plain(x, t, **told).x0)
    torch.nn.init.normal_(guided.network.scale_embedder.mlp[2].weight)
    four = Told(guided, null=None, scale=4.0)(x, t, **told).x0
    assert torch.equal(Told(guided, null=None)(x, t, **told).x0, guided(x, t, **told).x0)
    assert not torch.equal(four, guided(x, t, **told).x0)
    with pytest.raises(ValueError, match=r"model\.guided=true"):
        Told(plain, null=None)


def test_scales_for_each_sample_guide_as_one_for_all():
    denoiser = tiny_denoiser(cosine(), prediction.v)
    x, t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])

    def guided(scale):
        options = {"interval": [0.3, 0.95], "rescale": 0.5, "scale": scale}
        return ClassifierFree(denoiser, nobody, **options)

    each = guided(1.0)(x, t, label=torch.arange(3), scale=torch.tensor([2.0, 3.0, 0.5]))
    for i, scale in enumerate((2.0, 3.0, 0.5)):
        one = guided(scale)(x, t, label=torch.arange(3))
        torch.testing.assert_close(each.x0[i], one.x0[i])


class Flash(torch.autograd.Function):
    """A kernel with a gradient and no forward derivative."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_jvp_is_refused_where_there_is_no_forward_derivative():
    denoiser = tiny_denoiser(Flow(), prediction.flow, lands=True).to("meta")
    with torch.device("meta"):
        x, told = torch.empty(1, 1, 4, 4), {"label": torch.empty(1, dtype=torch.long)}
    assert is_forward(partial(jvp)) and not is_forward(partial(central, h=1e-2)) and not is_forward(None)
    check_forward(denoiser, x, told)
    forward = denoiser.network.blocks[0].attn.forward
    denoiser.network.blocks[0].attn.forward = lambda x, rotation=None: Flash.apply(forward(x, rotation))
    with pytest.raises(ValueError, match=r"DiT has no forward derivative .*: take objective/derivative=central"):
        check_forward(denoiser, x, told)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activation_checkpointing_keeps_the_derivative(checkpointing):
    denoiser = tiny_denoiser(Flow(), prediction.flow)
    x, d = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    at, along = (x, torch.linspace(0.1, 0.9, 3)), (d, torch.ones(3))

    def velocity(x, t):
        return denoiser(x, t, label=torch.arange(3)).eps

    exact = jvp(velocity, at, along)
    arrange(denoiser.network, checkpointing=checkpointing)
    assert torch.equal(jvp(velocity, at, along), exact)


def matching(teacher, critic, every=1, num_steps=1, **options):
    """Distribution matching with the usual times."""
    plain = partial(weight.mean_square, prediction=prediction.flow)
    return DistributionMatching(teacher, evenly, num_steps, uniform, plain, critic, every, **options)


@pytest.mark.parametrize(("of", "predicted"), [("flow", "flow"), ("cosine", "v"), ("linear", "eps"), ("edm", "edm")])
def test_distributions_match_where_critic_and_teacher_agree(of, predicted):
    """The critic of what a student draws N(MEAN + wrong, STD^2) tells it, and only then, to draw N(MEAN, STD^2)."""
    of, grads = SCHEDULES[of][0], []
    teacher = Teacher(gaussian(of, predicted))
    for wrong in (0.0, 0.1, -0.1):
        student = Student(Flow(), wrong=torch.tensor(wrong, requires_grad=True, dtype=torch.float64))
        (name, loss), _ = matching(teacher, gaussian(of, predicted, MEAN + wrong)).phases(student, batch(), 0)
        loss.backward()
        assert name == "denoiser"
        grads.append(student.wrong.grad.item())
        assert (loss < 1e-16) == (wrong == 0)
    assert abs(grads[0]) < 1e-8 and grads[1] > 1e-3 and grads[2] < -1e-3


def test_a_critic_has_the_error_of_denoising_what_the_student_draws():
    """None but the noise's where it is exact for that, and more where it is the teacher still."""
    student, teacher, given = Student(Flow(), wrong=0.5), Teacher(gaussian(Flow(), "flow")), batch(1024)
    losses = {}
    for mean in (MEAN, MEAN + 0.5):
        (_, loss), *rest = matching(teacher, gaussian(Flow(), "flow", mean), every=2).phases(student, given, 0)
        assert not rest
        losses[mean] = loss.item()
    x = Student(Flow(), wrong=0.5)(given.draw.normal("x", (1, 4, 4)).double(), torch.ones(1024).double()).x0
    t, eps = 0.02 + 0.96 * given.draw.uniform("t"), given.draw.normal("eps", (1, 4, 4))
    t = 1 - t.double()
    x_t = expand_like(1 - t, x) * x + expand_like(t, x) * eps
    said = Gaussian(Flow(), MEAN + 0.5)(x_t, t)
    assert losses[MEAN + 0.5] == pytest.approx((said.eps - said.x0 - eps + x).square().mean().item(), rel=1e-5)
    assert losses[MEAN] > 1.05 * losses[MEAN + 0.5]


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_each_phase_reaches_its_own_network(features):
    teacher = Teacher(tiny_denoiser(linear(), prediction.eps, depth=3))
    critic, student = (tiny_denoiser(Flow(), prediction.flow, seed=seed, depth=3) for seed in (1, 2))
    head = Head(16)
    objective = matching(teacher, critic, every=3, head=head, features=features)
    given = batch(dtype=torch.float32)

    def reached(*modules):
        return [any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()) for module in modules]

    everyone = (student, critic, head, teacher.denoiser)
    assert [name for name, _ in objective.phases(student, given, 0)] == ["critic"]
    (first, moved), (second, learned) = objective.phases(student, given, 5)
    assert (first, second) == ("denoiser", "critic") and list(objective.networks) == ["critic"]
    moved.backward()
    assert reached(*everyone) == [True, False, False, False]
    assert all(p.grad is None for module in everyone[1:] for p in module.parameters())
    before = [p.grad.clone() for p in student.parameters() if p.requires_grad]
    learned.backward()
    assert reached(*everyone) == [True, True, True, False]
    assert all(torch.equal(p.grad, kept) for p, kept in zip(trained(student), before, strict=True))
    own = {id(p) for p in objective.networks["critic"].parameters()}
    assert own == {id(p) for module in (critic, head) for p in module.parameters()}


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_a_discriminator_is_heard_and_learns(features):
    """Whatever the scores say: adversarial distillation alone has no critic."""
    critic = tiny_denoiser(Flow(), prediction.flow, seed=1) if features == "critic" else None
    teacher, student = Teacher(tiny_denoiser(Flow(), prediction.flow)), tiny_denoiser(Flow(), prediction.flow, seed=2)
    options = {"matching_weight": 0.0, "adversarial_weight": 1.0, "head_weight": 1.0}
    objective = matching(teacher, critic, head=Head(16), features=features, **options)
    given, losses = batch(16, dtype=torch.float32), []
    optimizer = torch.optim.Adam(trained(objective), lr=1e-2)
    for _ in range(30):
        (_, deceit), (_, error) = objective.phases(student, given, 0)
        error.backward()
        losses.append((deceit.item(), error.item()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][0] > losses[0][0] and losses[-1][1] < 0.95 * losses[0][1]


@pytest.mark.parametrize("name", ["flow", "edm", "cosine"])
def test_backward_simulation_is_the_samplers_own_steps(name, monkeypatch):
    """To any of its steps, and as many in all processes."""
    schedule, rungs = SCHEDULES[name][0], set()
    objective = matching(Teacher(gaussian(schedule, "v")), gaussian(schedule, "v"), num_steps=3)
    times = evenly(schedule, num_steps=3)
    student = gaussian(schedule, "v", mean=1.0)
    asked = []
    student.register_forward_pre_hook(lambda module, args: asked.append(float(args[1])))
    for at in range(12):
        x0, draw = torch.zeros(8, 1, 4, 4, dtype=torch.float64), Draw(0, at, range(4), 8)
        drawn = objective.drawn(student, Batch(x0, {}, draw))
        rung = len(asked) - 1
        assert asked == times[: rung + 1].tolist()
        asked.clear()
        objective.drawn(student, Batch(x0[:4], {}, Draw(0, at, range(2, 4), 4, num_lanes=4)))
        assert len(asked) == rung + 1
        x = schedule(times[0]).sigma * draw.normal("x", (1, 4, 4)).double()
        noises = iter([draw.normal(f"z{i}", (1, 4, 4)).double() for i in range(rung)])
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda *_, noises=noises, **__: next(noises))
            sampled = consistency.sample(student, schedule, x, torch.cat([times[: rung + 1], torch.zeros(1)]))
        asked.clear()
        torch.testing.assert_close(drawn, sampled)
        rungs.add(rung)
    assert rungs == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"objective\.every=0"),
        ({"critic": None}, "objective/critic=run"),
        ({"matching_weight": 0.0}, "would learn nothing"),
        ({"matching_weight": 0.0, "head": Head(16), "adversarial_weight": 0.0}, "would learn nothing"),
        ({"critic": None, "matching_weight": 0.0, "head": Head(16)}, "objective=ladd"),
        ({"features": "student"}, "objective.features=student: choose one of critic, teacher"),
        ({"adversarial_weight": -1.0}, "objective.adversarial_weight=-1.0"),
        ({"critic_rate": -1.0}, "objective.critic_rate=-1.0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"grid": lambda schedule, num_steps: torch.tensor([0.5, 1.0, 0.0])}, "times must decrease"),
        ({"student": tiny_denoiser(cosine(), prediction.eps)}, "times as large in x0"),
    ],
)
def test_mistakes_of_distribution_matching(options, message):
    denoiser = tiny_denoiser(Flow(), prediction.flow)
    given = {"critic": denoiser, "grid": evenly, "num_steps": 1} | options
    student = given.pop("student", denoiser)
    with pytest.raises(ValueError, match=message):
        DistributionMatching(Teacher(denoiser), times=uniform, weight=alike, **given).check(student)


def test_a_head_must_have_the_width_of_its_features():
    with pytest.raises(ValueError, match=r"objective\.head\.width=0"):
        Head(0)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(Head(16)(x), Head(16)(x.flatten(2).mT))  # of convolutions, and of a transformer
    with pytest.raises(ValueError, match=r"objective\.head\.width=8, but the features are 16 wide"):
        Head(8)(x)


class Residual(nn.Module):
    """The exact velocity of eight Gaussians on a circle, at first, and what is learned besides; x is (B, 2, 1, 1)."""

    CENTRES = 1.5 * torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(8) * math.pi / 4])  # (8, 2)
    STD = 0.15

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, time, **cond):
        x, t = x.flatten(1), time[:, None].clamp(1e-3, 1 - 1e-3)
        variance = ((1 - t) * self.STD) ** 2 + t**2
        away = x[:, None] - (1 - t)[..., None] * self.CENTRES  # (B, 8, 2)
        share = (-away.square().sum(-1) / (2 * variance)).softmax(dim=1)[..., None]
        x0 = (share * (self.CENTRES + ((1 - t) * self.STD**2 / variance)[..., None] * away)).sum(1)
        told = torch.cat([x, t, (2 * math.pi * t).sin(), (2 * math.pi * t).cos(), t**2], dim=1)
        return ((x - x0) / t + self.layers(told))[..., None, None]

    @classmethod
    def data(cls, size, seed):
        generator = torch.Generator().manual_seed(seed)
        centres = cls.CENTRES[torch.randint(8, (size,), generator=generator)]
        return (centres + cls.STD * torch.randn(size, 2, generator=generator))[..., None, None]


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|."""
    x, y = x.flatten(1), y.flatten(1)
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


@pytest.mark.slow
def test_a_student_matches_the_distribution_by_a_critic_that_learns_and_by_no_other():
    """In one step. A critic that is the teacher for good finds nothing to mend, and the student stays as it began."""
    real, found = Residual.data(2000, 1), {}
    for rate in (1.0, 0.0):
        torch.manual_seed(0)
        student, critic, teacher = (Denoiser(Residual(), Flow(), prediction.flow) for _ in range(3))
        objective = matching(Teacher(teacher), critic, every=3, critic_rate=rate)
        optimizers = {
            name: torch.optim.Adam(trained(module), lr=1e-3 * objective.rates.get(name, 1.0), betas=(0.0, 0.99))
            for name, module in {"denoiser": student, **objective.networks}.items()
        }
        for at in range(2000):
            given = Batch(real[:256], {}, Draw(0, at, range(1), 256))
            for name, loss in objective.phases(student, given, at):
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                loss.backward()
                optimizers[name].step()
        with torch.no_grad():
            x = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(2))
            found[rate] = energy_distance(consistency.sample(student, Flow(), x, evenly(Flow(), num_steps=1)), real)
    assert found[1.0] < 0.1 and found[0.0] > 0.5, found
