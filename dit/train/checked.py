"""What a run is made of, checked as far as can be without data, weights and GPUs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from dit.objective.derivative import check_forward, is_forward
from dit.objective.objective import Objective
from dit.train import float8
from dit.train.build import build, parts_of
from dit.train.devices import strategy_of
from dit.train.drawn import check_drawn, check_guided_once
from dit.train.judging import check_metrics
from dit.train.layout import Layout, divided
from dit.train.strategy import Strategy, trained


class Checked(NamedTuple):
    """What fits together."""

    data: Any
    parts: Any
    objective: Objective
    denoiser: Any  # on the meta device
    strategy: type[Strategy]
    num_micro_batches: int  # of a process


def checked(cfg: DictConfig, layout: Layout) -> Checked:
    """The parts of a run, none of which has written anything; a teacher's weights have been read.

    Args:
        cfg: settled.
        layout: how devices share the work.

    Raises:
        ValueError: if they do not fit together, with the way out.
        ImportError: if an optional dependency is missing.
    """
    options = cfg.trainer
    _, num_micro_batches = divided(layout, options.batch_size, options.micro_batch_size, options.lanes)
    data, objective = build(cfg.data), build(cfg.objective)
    if few_step := objective.few_step():
        check_guided_once(few_step, cfg.guidance)  # before its parts, which know guidance by dropout alone
    parts, strategy = parts_of(cfg), strategy_of(options)
    denoiser = parts.learner("meta")
    objective.check(denoiser)
    if teacher := getattr(objective, "teacher", None):
        teacher.on(denoiser.schedule)  # which makes its guidance
    if few_step:
        check_drawn(few_step, cfg)
    if (rows := options.batch_size // options.lanes) < objective.least_rows:
        raise ValueError(
            f"trainer.lanes={options.lanes} leaves each {rows} of trainer.batch_size={options.batch_size} samples, "
            f"but the objective needs {objective.least_rows}: take fewer lanes, or a larger batch"
        )
    _check_pairs(objective, cfg.data.get("fields", []))
    for name in objective.profiles:
        if name not in (there := cfg.ema.profiles):
            raise ValueError(
                f"the objective borrows the weights of ema.profiles.{name}, but there are {', '.join(there)}: take the "
                "ema= that conf/objective names for it, or leave the target to the network's own weights"
            )
    strategy.check(options, denoiser, objective)
    float8.check(options)
    if times := getattr(objective, "times", None):
        times(denoiser.schedule, torch.full((1,), 0.5))  # which sees its own options
    if derivative := getattr(objective, "derivative", None):
        derivative(torch.sin, [torch.zeros(())], [torch.ones(())])  # the same
        if is_forward(derivative):
            _check_derivative(parts, options)
    strategy.arrange(denoiser.network, options)
    build(cfg.learning_rate)(0)
    if cfg.metric:
        check_metrics(cfg.metric, cfg.data.get("fields", ["label"]), cfg.latent)
        if data.held_out is None:
            raise ValueError("data.held_out=null, but the metric needs held-out images: give a folder, or metric=none")
    return Checked(data, parts, objective, denoiser, strategy, num_micro_batches)


def _check_derivative(parts: Any, options: DictConfig) -> None:
    """See that the network, spread so, can be differentiated forward.

    Raises:
        ValueError: if not, with the way out.
    """
    from dit.train.cost import inputs_of  # which takes a while to import

    # All three compute by functions that have a gradient, but no forward derivative.
    split = f"tensor_parallel_size={options.tensor_parallel_size}" if options.tensor_parallel_size > 1 else ""
    rounded = f"float8={options.float8}" if options.float8 != "none" else ""
    if through := "strategy=zero3" if options.strategy == "zero3" else split or rounded:
        raise ValueError(
            f"objective/derivative=jvp does not reach through trainer.{through}: take objective/derivative=central, or "
            + ("trainer.float8=none" if through == rounded else "trainer=fsdp without tensor parallelism")
        )
    (x, _), cond = inputs_of(parts, 1, "meta")
    check_forward(parts.denoiser("meta"), x, cond)


def _check_pairs(objective: Objective, fields: Sequence[str]) -> None:
    """See that pairs are there if they are learned from, and learned from if they are there.

    Raises:
        ValueError: if not.
    """
    if objective.paired and "noise" not in fields:
        raise ValueError(
            f"the objective learns from pairs, but data.fields={list(fields)} has no noise: write them by dit encode "
            "run=<a teacher> num_images=<how many> out=<folder>, and read them by data=pairs data.path=<folder>"
        )
    if "noise" in fields and not objective.paired:
        raise ValueError(
            f"data.fields={list(fields)} are those of pairs, but the objective draws noise of its own: take "
            "objective=reflow, or data of images"
        )


def build_trained(cfg: DictConfig, denoiser: Any) -> None:
    """Try to make what follows the weights; making an optimizer takes seconds, so that other mistakes come first.

    Raises:
        ValueError: if one of their values is out of range.
    """
    build(cfg.optimizer)(denoiser.network.parameters())
    build(cfg.ema)(trained(denoiser.network))
