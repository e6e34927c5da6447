"""What a run or an export has learned: its parts and its weights."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from dit.noise.denoiser import Denoiser
from dit.objective.objective import FewStep
from dit.objective.teacher import Teacher
from dit.sampler.guidance import ClassifierFree, Told
from dit.train import checkpoint, saved
from dit.train.build import Parts
from dit.train.kind import check_denoiser
from dit.weights import manifest
from dit.weights.convert import diffusers_dit, read, unpadded_labels
from dit.weights.export import FEW_STEP, PROGRAMS, TRANSFORMER, weights_file
from dit.weights.lora import merged
from dit.weights.post_hoc import Average, fit, reconstruct


def newest(folder: Path, step: int | None = None) -> Path:
    """The newest intact checkpoint of a run's folder, or that of a step; an export is its own.

    Raises:
        ValueError: if there is none, or the export is a program.
        CheckpointError: if there are checkpoints but none is intact.
        DamagedError: if an export is not what was written.
    """
    if about := saved.exported(folder):
        if step not in (None, about["step"]):
            raise ValueError(f"{folder} is an export of step {about['step']}, and has no step={step}")
        if (kind := about.get("format")) in PROGRAMS:
            raise ValueError(
                f"{folder} holds the network as a program, which {PROGRAMS[kind]} reads, and no weights for dit: "
                "export the run anew, with format=native"
            )
        if about.get("manifest"):
            manifest.check(folder)
        return folder
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
    """The weights of a checkpoint by the network's names, whole, those of adapters merged, and on the CPU.

    Args:
        path: the checkpoint, or an export, which has but one of them.
        name: of an average, or `model` for the raw weights.

    Raises:
        ValueError: if an export has others.
    """
    if about := saved.exported(path):
        if name != about["weights"]:
            raise ValueError(f"weights={name}, but {path} is an export of weights={about['weights']}")
        if not (path / TRANSFORMER).is_dir():
            return read(weights_file(path))
        return unpadded_labels(diffusers_dit(path), about["config"]["condition"]["num_classes"])
    raw = checkpoint.load_weights(path, "model")  # with what is not averaged
    return merged(raw if name == "model" else raw | checkpoint.load_weights(path, name))


class State(NamedTuple):
    """What there is beside the weights of a checkpoint or an export."""

    step: int
    few_step: FewStep | None  # how a student is drawn


def state_of(path: Path) -> State:
    """That of a checkpoint or an export.

    Raises:
        ValueError: if it is damaged.
    """
    if about := saved.exported(path):
        file = path / FEW_STEP
        if not file.exists() and not about.get("student"):
            return State(about["step"], None)
        try:
            return State(about["step"], _few_step(json.loads(file.read_bytes())))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is missing or damaged, export it again: {error}") from error
    state = checkpoint.load_state(path)
    return State(state["step"], _few_step(state["few_step"]) if state.get("few_step") else None)


def student_of(folder: Path, num_steps: int) -> int | None:
    """The step of a run's newest checkpoint of a student that is drawn in so many steps; None: there is none."""
    for path in reversed([] if saved.exported(folder) else checkpoint.committed(folder / "checkpoints")):
        step, few_step = state_of(path)
        if few_step and few_step.takes(num_steps):
            return step
    return None


def few_step_at(folder: Path, step: int) -> FewStep | None:
    """How the student of a step is drawn, be there a checkpoint or a snapshot of it; None: it is none."""
    if saved.exported(folder):
        return state_of(folder).few_step
    paths = checkpoint.committed(folder / "checkpoints")
    return state_of(next((path for path in paths if checkpoint.step_of(path) >= step), paths[-1])).few_step


def _few_step(record: Mapping[str, Any]) -> FewStep:
    """What was noted of a student.

    Raises:
        ValueError: if it is no such note.
    """
    found = FewStep(**{name: record[name] for name in FewStep._fields})
    scales = found.guidance if isinstance(found.guidance, list) else [found.guidance]
    if not (
        isinstance(found.method, str)
        and isinstance(found.sampler, str | None)
        and (found.steps is None or (found.steps and all(isinstance(n, int) and n > 0 for n in found.steps)))
        and len(scales) in (1, 2)
        and all(isinstance(scale, int | float) for scale in scales)
    ):
        raise ValueError(f"{found} is not how a student is drawn")
    return found


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
    return Reconstructed(merged(rest | average), step, len(kept), found.misfit)


def initial(path: str, weights: str = "ema") -> dict[str, Tensor]:
    """The weights of a run, for another to begin with: what conf/init/run.yaml names.

    Args:
        path: the run's folder, or an export's.
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
    scale: float = 1.0,
    **guidance: Any,
) -> Teacher:
    """A run by its name, guided, for a student to follow.

    Args:
        run: its name; or that of an export's folder.
        runs_dir: the folder of runs.
        weights: the name of an average, or `model` for the raw weights.
        step: of the checkpoint; None: the newest.
        needs: what the student has of the configuration, by dotted keys, and the teacher must have, too.
        solver: of its trajectories, see `Teacher`.
        num_substeps: the same.
        scale: of guidance, 1 is none; of one that is told it, what it is told.
        **guidance: the other options of `ClassifierFree`.

    Raises:
        ValueError: if there is no such run or checkpoint, or the student is of another kind, or guidance would be
            applied twice.
    """
    path, parts, had = _of_the_same_kind("teacher", run, runs_dir, weights, step, needs)
    kind: type[ClassifierFree | Told] = ClassifierFree
    its_own = 1.0 if had is None else had.guidance
    if isinstance(its_own, Sequence):
        first, last = its_own
        if not first <= scale <= last:
            raise ValueError(
                f"objective.teacher.scale={scale}: {run} is told a scale of {first:g} to {last:g}: take one"
            )
        kind, guidance = Told, {}
    elif its_own != 1:
        if scale != 1:
            raise ValueError(
                f"objective.teacher.scale={scale} would guide twice: {run} has guidance of scale {its_own:g} for good; "
                "take objective.teacher.scale=1"
            )
        return Teacher(load(parts, path, weights), None, solver, num_substeps, its_own)
    guided = partial(kind, null=parts.condition.null, scale=scale, **guidance)
    return Teacher(load(parts, path, weights), guided, solver, num_substeps, scale)


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
    path, parts, _ = _of_the_same_kind("critic", run, runs_dir, weights, step, needs)
    return _loaded(parts, path, weights)


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


def _of_the_same_kind(
    role: str, run: str, runs_dir: str, weights: str, step: int | None, needs: Mapping[str, Any] | None
) -> tuple[Path, Parts, FewStep | None]:
    """The checkpoint of a run that is told and draws what the student is at all times, its parts, and how it is drawn.

    Raises:
        ValueError: if there is no such run or checkpoint, or it is of another kind.
    """
    named = f"objective.{role}.run={run}"
    if not isinstance(run, str):
        raise ValueError(f"{named}: give the name of a run")
    folder = Path(runs_dir) / run
    try:
        parts, path = _parts(folder), newest(folder, step)
        few_step = state_of(path).few_step
    except (ValueError, checkpoint.CheckpointError) as error:
        raise ValueError(
            f"objective.{role}.{error}" if str(error).startswith("run=") else f"{named}: {error}"
        ) from error
    if not saved.exported(folder) and weights not in (there := saved.averages(parts.cfg)):
        raise ValueError(f"objective.{role}.weights={weights}: {run} has {', '.join(there)}")
    for key, ours in (needs or {}).items():
        if (theirs := OmegaConf.select(parts.cfg, key)) != ours:
            raise ValueError(
                f"{named} was trained with {key}={theirs}, but this run has {ours}: a student is told and draws what "
                f"its {role} is; take the same, or another {role}"
            )
    if few_step and few_step.sampler and not OmegaConf.select(parts.cfg, "model.lands"):
        raise ValueError(
            f"{named} is a student of {few_step.method}, which knows where its steps end, and not where a trajectory "
            f"goes: take its teacher"
        )
    return path, parts, few_step


def _parts(folder: Path) -> Parts:
    """The parts of a run that serves another, unguided, as its own guidance may name a weaker run in its turn."""
    cfg = saved.config(folder)
    check_denoiser(cfg)
    cfg.guidance = {"_target_": "dit.sampler.guidance.ClassifierFree", "_partial_": True}
    return Parts(cfg)
