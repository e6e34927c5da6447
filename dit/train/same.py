"""Whether a run that goes on is the run that was begun."""

from typing import Any

from dit.weights.identity import sha256

# What may differ when a run goes on: where things are, and everything below these nodes but what decides its numbers.
FREE = {
    "run",
    "runs_dir",
    "data_dir",
    "resume",
    "trainer",
    "sampler",
    "grid",
    "guidance",
    "guard",
    "metric",
    "evaluation",
    "extractor",
    "logger",
}
FREE |= {
    f"data.{name}" for name in ("path", "held_out", "images", "index", "cache", "cache_gb", "num_workers", "max_bad")
}
FREE |= {"init"}
FREE |= {"ema.device", "ema.snapshot_every_steps"}
FREE |= {"ema.profiles.ema.decay", "ema.profiles.ema.warmup"}  # which repeat ema.decay and ema.warmup
FREE |= {f"objective.{name}" for name in ("teacher.runs_dir", "critic.runs_dir", "teacher.init.path")}
FREE |= {"condition.name"}  # of a text encoder, which may move; its width is checked
FIXED = {f"trainer.{name}" for name in ("batch_size", "lanes", "precision", "float8", "max_grad_norm")}


def differences(before: Any, now: Any) -> list[str]:
    """What a configuration has otherwise than before, of what decides a run's numbers; each as "key=new, was old"."""
    before, now = _flat(before), _flat(now)
    # A key that only one version knows changes nothing, but what came later has no beginning: an average, an adapter.
    compared = before.keys() & now.keys()
    compared |= {key for key in before.keys() ^ now.keys() if key.startswith(("ema.profiles.", "adapter."))}
    return [
        f"{key}={now.get(key)}, was {before.get(key)}"
        for key in sorted(compared)
        if before.get(key) != now.get(key) and (key in FIXED or not {key, key.split(".")[0]} & FREE)
    ]


def taught_by(objective: Any) -> str | None:
    """What tells the weights of an objective's teacher from others; None: it has no teacher."""
    teacher = getattr(objective, "teacher", None)
    return sha256(teacher.denoiser.network) if teacher else None


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys."""
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
