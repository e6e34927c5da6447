"""Students of eight Gaussians in a plane, whose velocity is known: the whole trajectory is there to compare with."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from dit.noise.denoiser import Denoiser
from dit.noise.draw import Draw
from dit.noise.flow import Flow
from dit.noise.grid import evenly
from dit.noise.prediction import flow
from dit.noise.step import point
from dit.noise.times import uniform
from dit.noise.weight import mean_square
from dit.objective.consistency import Consistency, fixed, shrinking
from dit.objective.derivative import central, jvp
from dit.objective.meanflow import MeanFlow
from dit.objective.objective import Batch
from dit.objective.teacher import Teacher
from dit.sampler import ancestral, consistency, flow_map, heun

RADIUS, STD, STEPS, BATCH = 1.5, 0.15, 3000, 512
# The straight velocity of one step has an energy distance of 1.1, a wrong derivative still one of 0.04.
ENERGY, TRAJECTORY = 0.015, 0.16


class Exact(nn.Module):
    """The velocity E[eps - x0 | x_t] of eight Gaussians on a circle."""

    def __init__(self):
        super().__init__()
        angles = torch.arange(8) * math.pi / 4
        self.register_buffer("means", RADIUS * torch.stack([angles.cos(), angles.sin()], 1).double())

    def forward(self, x, time):
        t = time.double().reshape(-1, 1, 1)
        beside = x.double().flatten(1)[:, None] - (1 - t) * self.means  # (B, 8, 2)
        variance = ((1 - t) * STD) ** 2 + t**2
        of = (-beside.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)
        x0 = (of * (self.means + (1 - t) * STD**2 / variance * beside)).sum(1)
        eps = (of * t / variance * beside).sum(1)
        return (eps - x0).reshape(x.shape).to(x)


class Net(nn.Module):
    """A residual network of x, t and the gap, which begins at no velocity."""

    lands = True

    def __init__(self, width=128, depth=3):
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-1, 3) * math.pi)
        self.first = nn.Linear(2 + 2 * 8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, time, gap=None):
        gap = torch.zeros_like(time) if gap is None else gap
        angles = torch.stack([time, gap], 1).to(x)[:, :, None] * self.frequencies  # (B, 2, 4)
        h = self.first(torch.cat([x.flatten(1), angles.sin().flatten(1), angles.cos().flatten(1)], 1))
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return self.last(h).reshape(x.shape)


def data(size, seed):
    generator = torch.Generator().manual_seed(seed)
    means = Exact().means[torch.randint(8, (size,), generator=generator)]
    return (means + STD * torch.randn(size, 2, generator=generator, dtype=torch.float64)).reshape(size, 2, 1, 1)


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


class Toy:
    """The exact trajectories from the same noise, and how far from them and from the data samples lie."""

    def __init__(self):
        self.teacher = Teacher(Denoiser(Exact(), Flow(), flow))
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(4000, 2, 1, 1, generator=generator, dtype=torch.float64)
        self.ends = heun.sample(self.teacher.denoiser, Flow(), self.noise, evenly(Flow(), num_steps=400))
        self.data = data(4000, seed=2)
        self.spread = (self.ends - self.ends.flip(0)).square().sum(1).mean().sqrt().item()

    def figures(self, samples):
        """(energy distance to the data, root mean square distance from the exact ends over that of unrelated ones)."""
        far = (samples - self.ends).square().sum(1).mean().sqrt().item() / self.spread
        return energy_distance(samples, self.data), far


@pytest.fixture(scope="module")
def toy():
    return Toy()


def student(objective, seed=0):
    """The denoiser that an objective trains, its weights averaged."""
    torch.manual_seed(seed)
    denoiser = Denoiser(Net(), Flow(), flow)
    average = copy.deepcopy(denoiser)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        batch = Batch(data(BATCH, seed=10 + step).float(), {}, Draw(seed, step, range(1), BATCH))
        [(_, loss)] = objective.phases(denoiser, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), denoiser.parameters(), strict=True):
                kept.lerp_(new, 0.005)
    return average.double()


def without_space(function, at, along):
    """A wrong derivative: by t alone, not along the trajectory."""
    return jvp(function, at, (torch.zeros_like(along[0]), *along[1:]))


of_velocity = partial(mean_square, prediction=flow)


def meanflow(teacher, derivative):
    return MeanFlow(uniform, derivative, teacher=teacher, equal=0.5, power=0.5)


def test_the_exact_trajectories_are_the_floor_and_one_straight_step_is_far_from_it(toy):
    floor, _ = toy.figures(toy.ends)
    one, far = toy.figures(
        ancestral.sample(toy.teacher.denoiser, Flow(), toy.noise, evenly(Flow(), num_steps=1), eta=0.0)
    )
    assert floor < 0.006 and one > 1 and far > 0.5


@pytest.mark.slow
def test_a_consistency_student_follows_the_trajectories(toy):
    objective = Consistency(partial(fixed, grid=evenly, num_steps=16), of_velocity, STEPS, toy.teacher)
    energy, far = toy.figures(consistency.sample(student(objective), Flow(), toy.noise, evenly(Flow(), num_steps=1)))
    assert energy <= ENERGY and far <= TRAJECTORY


@pytest.mark.slow
@pytest.mark.parametrize("derivative", [jvp, central])
def test_a_flow_map_follows_the_trajectories(toy, derivative):
    denoiser = student(meanflow(toy.teacher, derivative))
    for num_steps in (1, 2, 4):
        energy, far = toy.figures(flow_map.sample(denoiser, Flow(), toy.noise, evenly(Flow(), num_steps=num_steps)))
        assert energy <= ENERGY and far <= TRAJECTORY, num_steps


@pytest.mark.slow
def test_a_flow_map_of_a_wrong_derivative_misses(toy):
    denoiser = student(meanflow(toy.teacher, without_space))
    energy, far = toy.figures(flow_map.sample(denoiser, Flow(), toy.noise, evenly(Flow(), num_steps=1)))
    assert energy > ENERGY and far > TRAJECTORY


@pytest.mark.slow
def test_consistency_from_data_wants_one_noise_at_both_points(toy, monkeypatch):
    def figures():
        objective = Consistency(partial(shrinking, times=uniform, stages=8), of_velocity, STEPS)
        one = evenly(Flow(), num_steps=1)
        return toy.figures(consistency.sample(student(objective), Flow(), toy.noise, one))

    calls = itertools.count()

    def anew(schedule, t, x0, eps):
        return point(schedule, t, x0, torch.randn_like(eps) if next(calls) % 2 else eps)

    energy, far = figures()
    assert energy <= 2 * ENERGY and far <= 2 * TRAJECTORY
    monkeypatch.setattr("dit.objective.consistency.point", anew)
    energy, far = figures()
    assert energy > 2 * ENERGY and far > 2 * TRAJECTORY
