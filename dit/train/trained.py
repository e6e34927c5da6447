"""What a run has learned: its parts and its weights."""

from pathlib import Path

from dit.noise.denoiser import Denoiser
from dit.train import checkpoint, saved
from dit.train.build import Parts
from dit.train.kind import check_denoiser


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
    denoiser = parts.denoiser()
    denoiser.network.load_state_dict(checkpoint.load_weights(path, "model"))
    denoiser.network.load_state_dict(checkpoint.load_weights(path, weights), strict=False)
    return denoiser.eval().requires_grad_(False)


def denoiser(run: str, runs_dir: str = "runs", weights: str = "ema", step: int | None = None) -> Denoiser:
    """The denoiser of a run by its name: a weaker guide, a teacher.

    Raises:
        ValueError: if there is no such run or checkpoint, or it is an autoencoder.
    """
    folder = Path(runs_dir) / run
    cfg = saved.config(folder)
    check_denoiser(cfg)
    # That of the run may name a weaker run in its turn.
    cfg.guidance = {"_target_": "dit.sampler.guidance.ClassifierFree", "_partial_": True}
    return load(Parts(cfg), newest(folder, step), weights)
