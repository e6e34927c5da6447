"""What a run has learned: its parts and its weights."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from dit.noise.denoiser import Denoiser
from dit.objective.teacher import Teacher
from dit.sampler.guidance import ClassifierFree
from dit.train import checkpoint, saved
from dit.train.build import Parts
from dit.train.kind import check_denoiser
from dit.weights.post_hoc import Average, fit, reconstruct


def newest(folder: Path, step: int | None = None) -> Path:
    """The newest intact checkpoint of a run's folder, or that of a step.

    Raises:
        ValueError: if there is none.
        CheckpointError: if there are checkpoints but none is intact.
    """
    root = folder / "checkpoints"
    if step is None:
        path = checkpoint.newest(root)
        if path is None:
            raise ValueError(f"{folder} has no checkpoint yet: train it first, with dit train run={folder.name} ...")
        return path
    there = {checkpoint.step_of(path): path for path in checkpoint.committed(root)}
    if step not in there:
        raise ValueError(f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, there)) or 'none'}")
    if problem := checkpoint.verify(there[step]):
        raise ValueError(f"{there[step]}: {problem}")
    return there[step]


def load(parts: Parts, path: Path, weights: str = "ema") -> Denoiser:
    """The denoiser of a checkpoint, for sampling; on the CPU.

    Args:
        parts: of the run.
        path: the checkpoint.
        weights: the name of an average, or `model` for the raw weights.
    """
    return _loaded(parts, path, weights).eval().requires_grad_(False)


def weights_of(path: Path, name: str = "ema") -> dict[str, Tensor]:
    """The weights of a checkpoint by the network's names, whole and on the CPU.

    Args:
        path: the checkpoint.
        name: of an average, or `model` for the raw weights.
    """
    raw = checkpoint.load_weights(path, "model")  # with what is not averaged
    return raw if name == "model" else raw | checkpoint.load_weights(path, name)


class Reconstructed(NamedTuple):
    """An average that was not kept."""

    weights: dict[str, Tensor]
    step: int
    num_snapshots: int  # of averages, of which it was made
    misfit: float  # see post_hoc


def reconstructed(folder: Path, std: float, step: int | None = None) -> Reconstructed:
    """An average by a power profile of another length than those of the run, made of its snapshots.

    Args:
        folder: of the run.
        std: of the profile, in (0, 0.288].
        step: after which step; None: of the newest snapshot.

    Raises:
        ValueError: if there are no snapshots, or none of the step.
        CheckpointError: if there is no intact checkpoint.
    """
    profiles: Any = OmegaConf.select(saved.config(folder), "ema.profiles", default={})
    stds = {name: profile.std for name, profile in profiles.items() if "std" in profile}
    paths = checkpoint.committed(folder / "snapshots") if stds else []
    if not paths:
        raise ValueError(
            f"run={folder.name} kept no snapshots, of which an average of ema_std={std} could be made: train with "
            "ema=power ema.snapshot_every_steps=N, some ten of them or more"
        )
    there = {}
    for path in paths:
        if problem := checkpoint.verify(path):
            print(f"dit: WARNING: passing over the snapshot {path}: {problem}", flush=True)
        else:
            there[checkpoint.step_of(path)] = path
    step = max(there, default=0) if step is None else step
    if step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise ValueError(f"{folder} has no intact snapshot of step {step}; there are {steps}")
    kept = {(Average(at, stds[name])): (path, name) for at, path in there.items() if at <= step for name in stds}
    found = fit(list(kept), Average(step, std))
    loaded = (checkpoint.load_weights(path, name) for path, name in kept.values())
    average = reconstruct(zip(found.coefficients, loaded, strict=True))
    rest = checkpoint.load_weights(newest(folder), "model")  # what is not averaged
    return Reconstructed(rest | average, step, len(kept), found.misfit)


def initial(path: str, weights: str = "ema") -> dict[str, Tensor]:
    """The weights of a run, for another to begin with: what conf/init/run.yaml names.

    Args:
        path: the run's folder.
        weights: the name of an average, or `model` for the raw weights.

    Raises:
        ValueError: if there is no such run, checkpoint or average.
    """
    folder = Path(path)
    check_denoiser(saved.config(folder))
    return weights_of(newest(folder), weights)


def teacher(
    run: str,
    runs_dir: str = "runs",
    weights: str = "ema",
    step: int | None = None,
    needs: Mapping[str, Any] | None = None,
    solver: str = "heun",
    num_substeps: int = 1,
    **guidance: Any,
) -> Teacher:
    """A run by its name, guided, for a student to follow.

    Args:
        run: its name.
        runs_dir: the folder of runs.
        weights: the name of an average, or `model` for the raw weights.
        step: of the checkpoint; None: the newest.
        needs: what the student has of the configuration, by dotted keys, and the teacher must have, too.
        solver: of its trajectories, see `Teacher`.
        num_substeps: the same.
        **guidance: of `ClassifierFree`: scale, 1 is none, interval and so on.

    Raises:
        ValueError: if there is no such run or checkpoint, or the student is of another kind.
    """
    folder = Path(runs_dir) / run
    parts = _of_the_same_kind("teacher", folder, needs)
    guided = partial(ClassifierFree, null=parts.condition.null, **guidance)
    return Teacher(load(parts, newest(folder, step), weights), guided, solver, num_substeps)


def critic(
    run: str,
    runs_dir: str = "runs",
    weights: str = "ema",
    step: int | None = None,
    needs: Mapping[str, Any] | None = None,
) -> Denoiser:
    """A copy of a run's denoiser, which goes on learning; as for `teacher`.

    Raises:
        ValueError: if there is no such run or checkpoint, or the student is of another kind.
    """
    folder = Path(runs_dir) / run
    return _loaded(_of_the_same_kind("critic", folder, needs), newest(folder, step), weights)


def denoiser(run: str, runs_dir: str = "runs", weights: str = "ema", step: int | None = None) -> Denoiser:
    """The denoiser of a run by its name: a weaker guide.

    Raises:
        ValueError: if there is no such run or checkpoint, or it is an autoencoder.
    """
    folder = Path(runs_dir) / run
    return load(_parts(folder), newest(folder, step), weights)


def _loaded(parts: Parts, path: Path, weights: str) -> Denoiser:
    """The denoiser of a checkpoint, as it was trained."""
    denoiser = parts.denoiser()
    denoiser.network.load_state_dict(weights_of(path, weights))
    return denoiser


def _of_the_same_kind(role: str, folder: Path, needs: Mapping[str, Any] | None) -> Parts:
    """The parts of a run that is told and draws what the student is."""
    parts = _parts(folder)
    for key, ours in (needs or {}).items():
        if (theirs := OmegaConf.select(parts.cfg, key)) != ours:
            raise ValueError(
                f"objective.{role}.run={folder.name} was trained with {key}={theirs}, but this run has {ours}: a "
                f"student is told and draws what its {role} is; take the same, or another {role}"
            )
    return parts


def _parts(folder: Path) -> Parts:
    """The parts of a run that serves another, unguided, as its own guidance may name a weaker run in its turn."""
    cfg = saved.config(folder)
    check_denoiser(cfg)
    cfg.guidance = {"_target_": "dit.sampler.guidance.ClassifierFree", "_partial_": True}
    return Parts(cfg)
