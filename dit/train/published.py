"""Published weights: for a run to begin with, and as a teacher."""

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from dit.noise.denoiser import Denoiser
from dit.objective.teacher import Teacher
from dit.sampler.guidance import ClassifierFree
from dit.train.build import build
from dit.train.saved import config
from dit.weights.convert import fitted

MATCHED = "dit.noise.matched.Matched"
INITIAL = "dit.train.trained.initial"  # of conf/init/run.yaml


def known(noise: Any, prediction: Any) -> tuple[Any, Any]:
    """The nodes of the schedule and the prediction that a network knows, whatever path it is on."""
    return (noise.of, prediction.get("prediction", prediction)) if noise._target_ == MATCHED else (noise, prediction)


def unlike(init: DictConfig, noise: Any, prediction: Any) -> str:
    """What a run knew, if it is a run that `init` names and a network of this one is to know something else; or ""."""
    if init._target_ != INITIAL:
        return ""
    cfg = config(Path(init.path))
    theirs, ours = (
        [node._target_.rpartition(".")[2].lower() for node in known(*nodes)]
        for nodes in ((cfg.noise, cfg.prediction), (noise, prediction))
    )
    if theirs == ours:
        return ""
    told = "init.path={} knows noise={} prediction={}, and this network is to know noise={} prediction={}"
    return told.format(init.path, *theirs, *ours)


def beginning(init: DictConfig, noise: Any, prediction: Any, network: nn.Module) -> dict[str, Tensor]:
    """The weights that a node of conf/init names, as a network needs them.

    Args:
        init: the node.
        noise: that of the run; what the weights were trained with must be the same.
        prediction: the same.
        network: on any device.

    Raises:
        ValueError: if they are of another kind, cannot be read, or do not fit.
    """
    there = dict(zip(("noise", "prediction"), known(noise, prediction), strict=True))
    for key, value in init.get("needs", {}).items():
        if (found := there[key]._target_) != value:
            wanted, other = (target.rpartition(".")[2] for target in (value, found))
            raise ValueError(
                f"init.path={init.path} was trained with {key}={wanted.lower()}, but this run has {other.lower()}: "
                "take the same, or other weights"
            )
    try:
        return fitted(build({name: value for name, value in init.items() if name != "needs"})(), network)
    except ValueError as error:
        raise ValueError(f"init.path={init.path}: {error}") from error


def teacher(
    init: DictConfig,
    noise: DictConfig,
    prediction: DictConfig,
    model: DictConfig,
    condition: DictConfig,
    solver: str = "heun",
    num_substeps: int = 1,
    scale: float = 1.0,
    run: str | None = None,
    **guidance: Any,
) -> Teacher:
    """Weights that are no run of ours, guided, for a student to follow.

    Args:
        init: a node of conf/init.
        noise: a node of conf/noise; of `matched`, the schedule that the network knows.
        prediction: a node of conf/prediction; the same.
        model: a node of conf/model: what the student has and its teacher has not is not heeded, a learned variance of
            the teacher that the student has not is left out.
        condition: a node of conf/condition.
        solver: of its trajectories, see `Teacher`.
        num_substeps: the same.
        scale: of guidance, 1 is none.
        run: unused: the one that an experiment names, in whose place these weights are.
        **guidance: the other options of `ClassifierFree`.

    Raises:
        ValueError: if the weights cannot be read, or are of other classes or sizes.
    """
    # Whether nothing was learned of it is theirs to say: a student, which is told what its teacher is, drops nothing.
    told = build({**condition, "dropout": 0.1} if "dropout" in condition else condition)
    guided = partial(ClassifierFree, null=told.null, scale=scale, **guidance)
    return Teacher(critic(init, noise, prediction, model, condition, "teacher"), guided, solver, num_substeps, scale)


def critic(
    init: DictConfig,
    noise: DictConfig,
    prediction: DictConfig,
    model: DictConfig,
    condition: DictConfig,
    role: str = "critic",
) -> Denoiser:
    """The denoiser that such weights are, which goes on learning; as for `teacher`.

    Raises:
        ValueError: if the weights cannot be read, are of other classes or sizes, or it is not said what they predict.
    """
    if noise._target_ == MATCHED and "prediction" not in prediction:
        raise ValueError(
            f"objective.{role}: with noise=matched, prediction=matched names what published weights predict, like "
            f"prediction@prediction.prediction=eps; another student wants a run or an export as its {role}"
        )
    of, predicted = known(noise, prediction)
    network: nn.Module = build(model)(**build(condition).sizes)
    try:
        network.load_state_dict(beginning(init, noise, prediction, network))
    except ValueError as error:
        raise ValueError(f"objective.{role}.{error}") from error
    return Denoiser(network, build(of), build(predicted))
