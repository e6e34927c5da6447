"""dit schedule: draw a recipe's noise schedule, training times, loss weight and sampling grid."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dit.command.compose import check_least, user_errors
from dit.command.existing import check_picture, check_writable
from dit.train.kind import check_denoiser

if TYPE_CHECKING:
    from numpy import ndarray as Array

GROUPS = ("noise", "prediction", "times", "weight", "objective", "grid", "sampler")
FAR = 25.0  # no axis of log SNR goes beyond
ALPHA, SIGMA, TRAINING, SAMPLING = "tab:green", "tab:purple", "tab:blue", "tab:red"
FILLED = {"color": TRAINING, "alpha": 0.5, "fill": True}


class Curves(NamedTuple):
    """What is drawn."""

    steps: "Array"  # (N + 1,), the sampling grid
    steps_log_snr: "Array"
    t: "Array"  # (T,), from data to noise
    alpha: "Array"
    sigma: "Array"
    log_snr: "Array"
    trained: "Array"  # (U,), rising: log SNR of training times
    mass: "Array"  # the share of each
    f_weight: "Array"  # what an error of F and of x0 counts there
    x0_weight: "Array"
    white_loss: "Array"  # the loss there of the best guess, if the data were white noise

    def quantiles(self, *q: float) -> "Array":
        """Of the log SNR of training."""
        import numpy as np

        return np.interp(q, self.mass.cumsum() - self.mass / 2, self.trained)


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration without importing torch.

    Raises:
        ConfigError: naming the value and the way out.
    """
    with user_errors():
        check_denoiser(cfg)
    check_least(cfg, {"sampler.num_steps": 1, "noise.num_steps": 1}, ["objective.max_weight"])
    check_picture(cfg.out)


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Give a job of a multirun a picture of its own."""
    if "out=" not in suffix:
        cfg.out = str(Path(cfg.out).with_name(f"{Path(cfg.out).stem}-{suffix}.png"))


def main(cfg: DictConfig) -> int:
    """Draw, write one picture, and say where it is; the exit code."""
    with user_errors():
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("dit schedule needs matplotlib: pip install 'ditforge[plot]'") from error
        check_writable(Path(cfg.out))
        curves = _curves(cfg)
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(_names(cfg), fontsize=11)
    figure.supxlabel(textwrap.fill(_values(cfg), 190), fontsize=7.5, color="0.4")
    _draw(figure.subplots(2, 3), curves)
    figure.savefig(cfg.out, dpi=120)
    low, middle, high = curves.quantiles(0.05, 0.5, 0.95)
    first, last = curves.steps_log_snr[0], curves.steps_log_snr[-2]
    print(f"{cfg.out}: {_names(cfg)}")
    print(f"log SNR: 90 % of training lies in {low:.2f} to {high:.2f}, half above {middle:.2f}; ", end="")
    print(f"the first step of sampling is at {first:.2f}, the last at {last:.2f}")
    return 0


def _names(cfg: DictConfig) -> str:
    """What was chosen."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    names = [f"{group}={choices.get(group, cfg[group]._target_.rpartition('.')[2])}" for group in GROUPS]
    return "  ".join([*names, f"num_steps={cfg.sampler.num_steps}"])


def _values(cfg: DictConfig) -> str:
    """The numbers of what was chosen, and what of the loss is not drawn."""
    text = []
    for group in ("noise", "times", "weight", "grid"):
        values = {k: v for k, v in cfg[group].items() if isinstance(v, int | float) and k != "_partial_"}
        text += [f"{group}: {', '.join(f'{key}={value}' for key, value in values.items())}"] if values else []
    if cfg.objective.get("max_weight") is not None:
        text.append(f"objective: max_weight={cfg.objective.max_weight}")
    missing = [f"objective.{name}" for name in ("bound_weight", "uncertainty") if cfg.objective.get(name)]
    return "    ".join([*text, f"not drawn: {', '.join(missing)}"] if missing else text)


def _curves(cfg: DictConfig) -> Curves:
    """Build what is drawn, and evaluate it."""
    import torch

    from dit.noise.denoiser import Denoiser
    from dit.noise.prediction import determinant
    from dit.objective.denoising import Denoising
    from dit.train.build import build

    schedule, objective = build(cfg.noise), build(cfg.objective)
    if not isinstance(objective, Denoising):
        raise ValueError(f"{cfg.objective._target_} has no weight to draw: choose objective=denoising")
    denoiser = Denoiser(torch.nn.Identity(), schedule, build(cfg.prediction))
    steps = build(cfg.grid)(schedule, num_steps=cfg.sampler.num_steps)
    edges = torch.cat([torch.arange(20_001).double() / 20_000, torch.linspace(-16, 16, 2_001).double().sigmoid()])
    edges = edges.sort().values  # even, and finer at both ends, where few times may have large weights
    times = objective.times(schedule, (edges[1:] + edges[:-1]) / 2)
    trained, order = schedule.log_snr(times).clamp(-99, 99).sort()
    times, mass = times[order], edges.diff()[order]
    if not mass[trained.abs() < FAR].sum() > 0.5:
        raise ValueError(f"half of the training times or more lie beyond a log SNR of {FAR:g}: choose other times")
    if schedule.t_max > 3:  # the time is a noise level, and most happens early
        first = torch.cat([steps[steps > 0], times[mass.cumsum(0) < 0.998]]).min()
        t = torch.logspace(math.log10(first / 3), math.log10(schedule.t_max), 1000, dtype=torch.float64)
    else:
        t = torch.linspace(0, schedule.t_max, 1001, dtype=torch.float64)
    f_weight = objective.weight_of_f(denoiser, times)
    alpha, sigma = level = schedule(times)
    det = determinant(denoiser.prediction(schedule, times), level)
    white_loss = f_weight * det**2 / (alpha**2 + sigma**2 / schedule.sigma_data**2)
    sampling = (steps, schedule.log_snr(steps), t, *schedule(t), schedule.log_snr(t))
    training = (trained, mass, f_weight, f_weight * (det / sigma) ** 2, white_loss)
    return Curves(*(x.numpy() for x in (*sampling, *training)))


def _draw(axes: Any, c: Curves) -> None:
    """Six panels: over the time, and over the log SNR."""
    import numpy as np

    (levels, snr, density), (weight, effort, grid) = axes
    seen = np.concatenate([c.steps_log_snr[abs(c.steps_log_snr) < FAR], c.quantiles(0.002, 0.998)])
    low, high = seen.clip(-FAR, FAR).min(), seen.clip(-FAR, FAR).max()
    ends = (low - 0.5 - 0.08 * (high - low), high + 0.5 + 0.08 * (high - low))
    logarithmic = c.t[0] > 0
    time = {"scale": "log" if logarithmic else "linear", "label": "t (t = 0 is off the axis)" if logarithmic else "t"}
    span = (c.t[0], 1.2 * c.t[-1]) if logarithmic else (-0.03 * c.t[-1], 1.03 * c.t[-1])

    levels.plot(c.t, c.alpha, color=ALPHA, label="alpha")
    levels.plot(c.t, c.sigma, color=SIGMA, label="sigma")
    levels.set(title="x_t = alpha x0 + sigma eps", yscale="log" if c.sigma.max() > 3 else "linear")
    snr.plot(c.t, c.log_snr, color="k", lw=1)
    on = c.steps > span[0]
    _dots(snr, c.steps[on], c.steps_log_snr[on], ends, SAMPLING)
    snr.set(title="log SNR = 2 log(alpha / sigma)")
    for panel in (levels, snr):
        panel.set(xscale=time["scale"], xlim=span, xlabel=time["label"])

    shown = (c.trained >= ends[0]) & (c.trained <= ends[1])
    log_snr, mass = c.trained[shown], c.mass[shown]
    pad = 0.5 if np.ptp(log_snr) < 0.5 else 1e-6
    bins = np.linspace(log_snr.min() - pad, log_snr.max() + pad, 49)
    for panel, weights, label, style in (
        (density, 1, "training times", FILLED),
        (effort, c.f_weight[shown], "density x weight of F", FILLED),
        (effort, c.white_loss[shown], "x the least error, were the data white noise", {"color": "k"}),
    ):
        counts, _ = np.histogram(log_snr, bins, weights=mass * weights)
        panel.stairs(counts / counts.sum() / np.diff(bins), bins, label=label, **style)
        panel.set_ylabel("share for each unit of log SNR")
    density.set(title="density of the training times")
    effort.set(title="where the loss comes from")
    weight.semilogy(log_snr, c.f_weight[shown], color=TRAINING, label="of the network's output F")
    weight.semilogy(log_snr, c.x0_weight[shown], color=ALPHA, ls="--", label="of x0, implied")
    weight.set(title="what a squared error counts in the loss")
    for panel in (density, weight, effort):
        panel.set(xlim=ends, xlabel="noise  <-  log SNR  ->  data")

    number = np.arange(len(c.steps))
    _dots(grid, number, c.steps, span, SAMPLING)
    grid.set(title="the sampling grid", xlabel="step", yscale=time["scale"])
    grid.set_ylabel("t", color=SAMPLING)
    grid.tick_params(axis="y", colors=SAMPLING)
    right = grid.twinx()
    _dots(right, number, c.steps_log_snr, ends, "k")
    right.set_ylabel("log SNR")

    for panel, x in ((levels, c.steps), (density, c.steps_log_snr)):
        x = x[(x > panel.get_xlim()[0]) & (x < panel.get_xlim()[1])]
        style = {"ls": "", "marker": "|", "color": SAMPLING, "alpha": 0.7, "label": "sampling steps"}
        panel.plot(x, np.zeros(len(x)), ms=12, transform=panel.get_xaxis_transform(), **style)
    for panel, room in ((levels, 10 if c.sigma.max() > 3 else 1.15), (density, 1.3), (effort, 1.3)):
        panel.set_ylim(top=room * panel.get_ylim()[1])
        panel.legend(fontsize=8, loc="upper left", ncols=3 if panel is levels else 1)
    for panel in (snr, weight):
        panel.legend(fontsize=8)


def _dots(panel: Any, x: "Array", y: "Array", ends: tuple[float, float], color: str) -> None:
    """The steps; what is off the axis is an arrow at its end, with the value."""
    inside = (y > ends[0]) & (y < ends[1])
    panel.plot(x[inside], y[inside], ".", ms=5 if len(x) < 100 else 2, color=color, label="sampling steps")
    for off, end, marker, up in ((y <= ends[0], ends[0], "v", 5), (y >= ends[1], ends[1], "^", -11)):
        for at, value in zip(x[off], y[off], strict=True):
            side = "left" if at < x.mean() else "right"
            panel.plot(at, end, marker, color=color, clip_on=False, zorder=3)
            at_marker = {"xytext": (6 if side == "left" else -6, up), "textcoords": "offset points", "ha": side}
            panel.annotate(f"{value:.3g}", (at, end), fontsize=8, color=color, **at_marker)
    panel.set_ylim(*ends)
