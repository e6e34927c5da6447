"""What each step of a run saw, by every process, for those who must prove that nothing was lost or repeated."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from dit.train.callbacks import Recorder
from dit.train.files import append
from dit.train.module import DiffusionModule


class Ledger(Callback):
    """Appends a line a step to `rank-<r>.jsonl`, which is never rewritten: a step that was redone has several.

    A line has `attempt`, the number of the run's start; `step`, 1 the first; `keys` of the samples that this process
    saw; `loss` of these, exactly, as float.hex; `applied`, whether the step was taken (`guard.py`). Each step waits for
    its device.

    Args:
        folder: of the lines.
        attempt: see above.
        recorder: says what cannot be written.
    """

    def __init__(self, folder: Path, attempt: int, recorder: Recorder):
        with recorder.forgiven():
            folder.mkdir(exist_ok=True)
        self.path = folder / f"rank-{recorder.world.rank}.jsonl"
        self.attempt = attempt
        self.recorder = recorder

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line, which a process that is killed then leaves behind."""
        loss: torch.Tensor = outputs["loss"]
        line = {"attempt": self.attempt, "step": pl_module.step, "keys": list(batch["key"])}
        line |= {"loss": float(loss).hex(), "applied": bool(outputs["applied"])}
        with self.recorder.forgiven():
            append(self.path, line)
