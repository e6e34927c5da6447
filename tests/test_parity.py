"""Against `diffusers`: the same network function, the same noise, the schedulers' own grids of times."""

import diffusers
import pytest
import torch

from dit.noise.denoiser import Denoiser
from dit.noise.edm import EDM
from dit.noise.flow import Flow
from dit.noise.grid import evenly, karras, respaced, shifted
from dit.noise.prediction import edm, eps, flow, v
from dit.noise.vp import cosine, linear, scaled_linear, sigmoid_betas
from dit.sampler import ancestral, dpmpp, heun, unipc

F64 = torch.float64
SCHEDULES = {
    "linear": (linear, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (scaled_linear, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid_betas": (sigmoid_betas, {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
}
# V on the cosine schedule, whose last alpha of 5e-5 makes the rounding of their float32 tables show in eps.
PREDICTED = {"cosine": (v, "v_prediction")}


class Network(torch.nn.Module):
    """Some smooth function of x and the time, not far from what a network would say."""

    def forward(self, x, time):
        index = time.reshape(time.shape + (1,) * (x.ndim - time.ndim)) / 1000
        return torch.tanh(x) * (0.2 + 0.7 * index) + 0.1 * torch.sin(3 * x + 3 * index)


network = Network()


def start(dtype=F64):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def theirs(scheduler, x, num_steps, **options):
    """The loop of a diffusers pipeline."""
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = torch.Generator().manual_seed(0)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, time.to(x)), time, x, **options).prev_sample
    return x


def close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def discrete(name, scheduler_class, num_steps, spacing="trailing", **options):
    """Our denoiser on a discrete schedule, their scheduler, and its grid as our times."""
    make, betas = SCHEDULES[name]
    prediction, prediction_type = PREDICTED.get(name, (eps, "epsilon"))
    betas = diffusers.DDPMScheduler(**betas).betas.numpy()
    options |= {"trained_betas": betas, "timestep_spacing": spacing, "prediction_type": prediction_type}
    scheduler = scheduler_class(**options)
    scheduler.alphas = 1 - torch.from_numpy(betas).double()  # their tables, less the rounding of a thousand products
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.set_timesteps(num_steps)
    indices = scheduler.timesteps.unique().flip(0).double()  # Heun's are doubled
    return Denoiser(network, make(), prediction), scheduler, torch.cat([(indices + 1) / 1000, indices.new_zeros(1)])


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, rescaled):
    make, options = SCHEDULES[name]
    scheduler = diffusers.DDPMScheduler(**options, rescale_betas_zero_snr=rescaled)
    alpha = make(zero_terminal_snr=rescaled)(torch.arange(1, 1001, dtype=F64) / 1000).alpha
    assert (alpha**2 - scheduler.alphas_cumprod).abs().max() < 1e-6


@pytest.mark.parametrize("num_steps", [10, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm(name, variance, num_steps):
    options = {"clip_sample": False, "variance_type": f"fixed_{variance}"}
    ours, scheduler, times = discrete(name, diffusers.DDPMScheduler, num_steps, "leading", **options)
    generator = torch.Generator().manual_seed(0)
    x = ancestral.sample(ours, ours.schedule, start(), times, generator=generator, eta=1.0, variance=variance)
    close(x, theirs(scheduler, start(), num_steps))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 250, 1000])
def test_the_respaced_grid_is_their_linspace_and_the_even_one_their_trailing(num_steps):
    schedule = linear()
    for grid, spacing in [(respaced, "linspace"), (evenly, "trailing")]:
        if num_steps == 1 and grid is respaced:
            continue  # theirs begins, and ends, at the least noise
        scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(num_steps)
        indices = (grid(schedule, num_steps)[:-1] * 1000).round() - 1
        assert (indices - scheduler.timesteps).abs().max() <= (0 if 1000 % num_steps == 0 or grid is respaced else 1)


def test_ddpm_on_the_respaced_grid():
    ours, scheduler, times = discrete("linear", diffusers.DDPMScheduler, 250, "linspace", clip_sample=False)
    torch.testing.assert_close(times, respaced(ours.schedule, 250))
    generator = torch.Generator().manual_seed(0)
    x = ancestral.sample(ours, ours.schedule, start(), times, generator=generator, eta=1.0)
    close(x, theirs(scheduler, start(), 250))


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim(name, spacing, eta):
    options = {"clip_sample": False, "steps_offset": 0}
    ours, scheduler, times = discrete(name, diffusers.DDIMScheduler, 20, spacing, **options)
    generator = torch.Generator().manual_seed(0)
    x = ancestral.sample(ours, ours.schedule, start(), times, generator=generator, eta=eta)
    close(x, theirs(scheduler, start(), 20, eta=eta))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_and_euler_ancestral(name, eta):
    their_class = diffusers.EulerAncestralDiscreteScheduler if eta else diffusers.EulerDiscreteScheduler
    ours, scheduler, times = discrete(name, their_class, 20)
    generator = torch.Generator().manual_seed(0)
    x = ours.schedule(times[0]).sigma * start()
    close(ancestral.sample(ours, ours.schedule, x, times, generator=generator, eta=eta), theirs(scheduler, start(), 20))


@pytest.mark.parametrize("name", SCHEDULES)
def test_heun(name):
    ours, scheduler, times = discrete(name, diffusers.HeunDiscreteScheduler, 20)
    schedule = ours.schedule
    if name == "cosine":  # its first step, from sigma / alpha = 20,291 to 12, is better not taken in those coordinates
        assert (schedule.straight(times) > schedule(times).alpha)[:-1].all()
        schedule.straight = lambda t: schedule(t).alpha
        sigmas = scheduler.sigmas.unique().double().flip(0)  # and float32 shows in it
        times = torch.cat([schedule.time_of(-2 * sigmas[:-1].log()), times[-1:]])
    x = schedule(times[0]).sigma * start()
    close(heun.sample(ours, schedule, x, times), theirs(scheduler, start(), 20))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_dpmpp(name, eta):
    dtype = torch.float32 if eta else F64  # they draw noise in float32 only
    options = {"algorithm_type": "sde-dpmsolver++" if eta else "dpmsolver++", "final_sigmas_type": "zero"}
    ours, scheduler, times = discrete(name, diffusers.DPMSolverMultistepScheduler, 20, **options)
    generator = torch.Generator().manual_seed(0)
    x = dpmpp.sample(ours, ours.schedule, start(dtype), times, generator=generator, eta=eta)
    close(x, theirs(scheduler, start(dtype), 20))


@pytest.mark.parametrize("name", SCHEDULES)
def test_unipc(name):
    options = {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
    ours, scheduler, times = discrete(name, diffusers.UniPCMultistepScheduler, 20, **options)
    close(unipc.sample(ours, ours.schedule, start(), times), theirs(scheduler, start(), 20))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_flow(sampler, shift):
    """Their grid ends at 1 / 1000 before 0; ours, of the same shift, is evenly spaced."""
    their_class = {"euler": diffusers.FlowMatchEulerDiscreteScheduler, "heun": diffusers.FlowMatchHeunDiscreteScheduler}
    scheduler = their_class[sampler](shift=shift)
    scheduler.set_timesteps(20)
    times = scheduler.sigmas.double().unique().flip(0)
    ours = Denoiser(network, Flow(), flow)
    ours.schedule.time_input = lambda t: 1000 * t
    x = (ancestral if sampler == "euler" else heun).sample(ours, ours.schedule, start(), times)
    close(x, theirs(scheduler, start(), 20))
    grid = torch.linspace(1, 0, 21, dtype=F64)
    torch.testing.assert_close(shifted(Flow(), 20, shift=shift), shift * grid / (1 + (shift - 1) * grid))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp"])
def test_edm(sampler):
    their_class = {"euler": diffusers.EDMEulerScheduler, "dpmpp": diffusers.EDMDPMSolverMultistepScheduler}[sampler]
    scheduler = their_class(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon")
    scheduler.set_timesteps(18)
    ours = Denoiser(network, EDM(), edm)
    times = karras(ours.schedule, 18)
    torch.testing.assert_close(times[:-1], scheduler.sigmas[:18].double(), rtol=1e-5, atol=0)
    x = 80.0 * start()
    x = (ancestral if sampler == "euler" else dpmpp).sample(ours, ours.schedule, x, times)
    theirs_x = theirs(scheduler, 80.0 * start() / scheduler.init_noise_sigma, 18)
    close(x, theirs_x)
