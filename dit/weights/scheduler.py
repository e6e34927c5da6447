"""The stock scheduler of diffusers that takes the steps which a run's sampler takes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dit.noise.ddpm import VP
from dit.noise.flow import Flow
from dit.noise.schedule import Schedule

PREDICTED = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear"}  # with beta_start and beta_end
COSINE = {"offset": 0.008, "beta_max": 0.999}
NEGLIGIBLE = 1e9  # the factor of times with which LCMScheduler's boundary condition is x0 alone


class NotStockError(ValueError):
    """What diffusers' own parts cannot do exactly, which needs a pipeline of ours."""


class Scheduler(NamedTuple):
    """A scheduler of diffusers."""

    name: str  # of the class
    options: dict[str, Any]


def stock(cfg: Mapping[str, Any], schedule: Schedule, steps: Sequence[int]) -> Scheduler:
    """The scheduler with which `DiTPipeline` draws as a run does, but for the order of random numbers.

    Args:
        cfg: with noise, prediction, sampler and grid.
        schedule: that of cfg.
        steps: numbers of steps at which it must do so.

    Raises:
        NotStockError: if there is none, and why.
    """
    prediction, grid = _name(cfg, "prediction"), _name(cfg, "grid")
    if isinstance(schedule, VP):
        return _of_vp(cfg, schedule, steps, prediction, grid)
    if not isinstance(schedule, Flow):
        raise NotStockError(f"DiTPipeline has no scheduler for noise={type(schedule).__name__.lower()}")
    sampler = cfg["sampler"]["_target_"].split(".")[-2]
    deterministic = sampler == "flow_map" or (sampler == "ancestral" and cfg["sampler"]["eta"] == 0)
    if not (deterministic or (sampler == "consistency" and max(steps) == 1)):
        raise NotStockError(f"DiTPipeline has no scheduler on flow for sampler={sampler}, but for Euler's method")
    if prediction != "flow" or schedule.t_max != 1 or grid not in ("evenly", "shifted"):
        raise NotStockError(
            f"DiTPipeline's scheduler for flow wants prediction=flow, noise.t_max=1 and grid=evenly or shifted, not "
            f"{prediction}, {schedule.t_max:g} and {grid}"
        )
    # Of one training step, so that the network is told t itself, and not 1000 t.
    shift = cfg["grid"]["shift"] if grid == "shifted" else 1.0
    return Scheduler("FlowMapEulerDiscreteScheduler", {"num_train_timesteps": 1, "shift": shift})


def _of_vp(cfg: Mapping[str, Any], schedule: VP, steps: Sequence[int], prediction: str, grid: str) -> Scheduler:
    if prediction not in PREDICTED:
        raise NotStockError(f"DiTPipeline has no scheduler for prediction={prediction} on this noise")
    if grid not in ("evenly", "respaced"):
        raise NotStockError(f"schedulers round the times of grid={grid}")
    if grid == "evenly" and (uneven := [n for n in steps if schedule.num_steps % n]):
        raise NotStockError(
            f"schedulers round the times of {uneven[0]} steps, which do not divide {schedule.num_steps}"
        )
    spacing = {"timestep_spacing": "trailing" if grid == "evenly" else "linspace"}
    name, options = _sampler(cfg["sampler"], grid, steps, schedule)
    return Scheduler(name, {**_betas(cfg, schedule), "prediction_type": PREDICTED[prediction], **spacing, **options})


def _sampler(sampler: Mapping[str, Any], grid: str, steps: Sequence[int], schedule: VP) -> tuple[str, dict[str, Any]]:
    """The class, and the options that are a sampler's own."""
    kind, eta = sampler["_target_"].split(".")[-2], sampler.get("eta", 0)
    # Theirs ends without fresh noise of variance beta at the first discrete step alone.
    ends = sampler.get("variance") == "small" or grid == "respaced"
    if kind == "ancestral" and eta == 1 and sampler["variance"] != "learned" and ends and min(steps) > 1:
        return "DDPMScheduler", {"variance_type": f"fixed_{sampler['variance']}", "clip_sample": False}
    if grid == "evenly":
        if kind == "flow_map" or (kind == "ancestral" and eta == 0):
            return "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}
        if kind == "consistency":
            lcm = {"original_inference_steps": schedule.num_steps, "timestep_scaling": NEGLIGIBLE}
            return "LCMScheduler", {**lcm, "clip_sample": False}
        solver = {"solver_order": 2, "final_sigmas_type": "zero"}
        ends_in_noise = schedule(torch.tensor(1.0, dtype=torch.float64)).alpha == 0  # their log SNR is -inf there
        if kind == "dpmpp" and eta in (0, 1) and not ends_in_noise:
            return "DPMSolverMultistepScheduler", {
                **solver,
                "algorithm_type": "sde-dpmsolver++" if eta else "dpmsolver++",
            }
        if kind == "unipc" and not ends_in_noise:
            return "UniPCMultistepScheduler", {**solver, "solver_type": "bh2"}
    said = f"sampler={kind}" + (f" with eta={eta:g} and variance={sampler['variance']}" if kind == "ancestral" else "")
    raise NotStockError(f"DiTPipeline has no scheduler for {said} on grid={grid}")


def _betas(cfg: Mapping[str, Any], schedule: VP) -> dict[str, Any]:
    """By the name that diffusers has for them, if any, or one by one."""
    noise, name = cfg["noise"], _name(cfg, "noise")
    known: dict[str, Any] = {"num_train_timesteps": schedule.num_steps}
    if not noise["zero_terminal_snr"]:
        if name in BETAS:
            ends = {key: noise[key] for key in ("beta_start", "beta_end")}
            return known | {"beta_schedule": BETAS[name], **ends}
        if name == "cosine" and all(noise[key] == value for key, value in COSINE.items()):
            return known | {"beta_schedule": "squaredcos_cap_v2"}
    t = torch.arange(schedule.num_steps + 1, dtype=torch.float64) / schedule.num_steps
    alpha = schedule(t).alpha
    return known | {"trained_betas": (1 - (alpha[1:] / alpha[:-1]) ** 2).tolist()}


def _name(cfg: Mapping[str, Any], group: str) -> str:
    name: str = cfg[group]["_target_"].rpartition(".")[2]
    return name
