"""What happens beside the training step: lines of metrics, previews, checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dit.data.image import encode_png, grid
from dit.train import checkpoint
from dit.train.attempts import Attempts
from dit.train.checkpoint import Saver
from dit.train.files import append, rewound
from dit.train.goodput import duration
from dit.train.guard import ADVICE, Bad, NumericError
from dit.train.module import DiffusionModule
from dit.train.preemption import Preemption
from dit.train.same import taught_by
from dit.train.world import World


class Recorder(Callback):
    """Averages the loss between log lines, and writes the lines: metrics.jsonl, the terminal.

    Args:
        path: the metrics.jsonl, to which lines are appended.
        max_steps: where the run ends, for the time left.
        batch_size: images a step.
        every_steps: a line every so many steps, and after the last.
        world: the processes over which the loss is averaged; the first one writes.
        attempts: is told each step; its clock is that of the speed.
        beside: what else a line says.
    """

    def __init__(
        self,
        path: Path,
        max_steps: int,
        batch_size: int,
        every_steps: int,
        world: World,
        attempts: Attempts,
        beside: Callable[[], dict[str, Any]] = dict,
    ):
        self.path = path
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.every_steps = every_steps
        self.world = world
        self.attempts = attempts
        self.clock = attempts.clock
        self.beside = beside
        self.last: dict[str, Any] = {}
        self.loss_sum = torch.zeros(())
        self.num_losses = torch.zeros(())
        self.total_images = 0
        self.total_seconds = 0.0
        self._failed = False

    def state(self) -> dict[str, Any]:
        """What is already summed of the next line, averaged over processes, all of which must ask."""
        return {"loss_sum": self.world.mean(self.loss_sum).item(), "num_losses": int(self.num_losses)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on summing where a checkpoint was made."""
        self.loss_sum = torch.tensor(state["loss_sum"])
        self.num_losses = torch.tensor(float(state["num_losses"]))

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, which will be written again."""
        if self.world.is_first:
            kept = rewound(self.path, step)
            self.last = next((line for line in reversed(kept) if "loss" in line), {})

    @property
    def images_per_second(self) -> float:
        """The mean speed of training proper since this process began; the last line's if it had no step to do."""
        return self.total_images / self.total_seconds if self.total_seconds else self.last.get("images_per_second", 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.loss_sum, self.num_losses = self.loss_sum.to(pl_module.device), self.num_losses.to(pl_module.device)
        self.clock.enter("step")
        self._since = self.clock.training
        self._images = 0

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DiffusionModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step that begins; if its data could not be had, it is where this ends."""
        pl_module.step = self.attempts.passed_over(pl_module.step)
        self.attempts.begins(pl_module.step + 1)
        if isinstance(batch, Exception):
            raise batch

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Mapping[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        """Sum the loss of steps that were taken, and write a line where one is due."""
        if self.attempts.passed_over(pl_module.step) == self.max_steps:
            pl_module.step = self.max_steps
        self.loss_sum = self.loss_sum + torch.where(outputs["applied"], outputs["loss"], 0)
        self.num_losses = self.num_losses + outputs["applied"]
        if not self.total_images + self._images:
            self.world.say(f"dit: the first step after {time.time() - self.clock.began:.1f} s")
        self._images += self.batch_size
        step = pl_module.step
        if step % self.every_steps == 0 or step == self.max_steps:
            self._write(step, outputs["grad_norm"].item(), pl_module.lr)

    def _write(self, step: int, grad_norm: float, lr: float) -> None:
        number = int(self.num_losses)
        loss = self.world.mean(self.loss_sum).item() / number if number else None
        now = self.clock.training
        rate = self._images / (now - self._since)
        self.total_images += self._images
        self.total_seconds += now - self._since
        self.loss_sum, self.num_losses = torch.zeros_like(self.loss_sum), torch.zeros_like(self.num_losses)
        self._since, self._images = now, 0

        self.last = {"step": step, "images": step * self.batch_size, "loss": loss}
        self.last |= {"grad_norm": grad_norm if math.isfinite(grad_norm) else None, "lr": lr}
        self.last |= {"images_per_second": round(rate, 1), **self.beside()}
        self.attempts.replaced = self.last.get("replaced", 0)
        if not self.world.is_first:
            return
        with self.forgiven():
            append(self.path, self.last)

        shown = "-" if loss is None else f"{loss:.4f}"
        left = duration((self.max_steps - step) * self.batch_size / rate)
        line = f"step {step}/{self.max_steps}  loss {shown}  {rate:,.0f} images/s  {left} left"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="" if step < self.max_steps else "\n", flush=True)
        else:
            print(line, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        """Stop the clock of training."""
        pl_module.step = self.attempts.passed_over(pl_module.step)
        self.clock.enter("other")
        self.attempts.trained(pl_module.step)

    @contextmanager
    def forgiven(self) -> Iterator[None]:
        """What cannot be written within, as on a full disk, is said once and left out; training goes on."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(f"dit: WARNING: {error}; lines and pictures are left out until there is room", flush=True)
            self._failed = True
        else:
            self._failed = False


class Preview(Callback):
    """Draws the same picture again and again, so that one sees it sharpen: EMA weights, fixed noise, fixed conditions.

    Args:
        folder: for `step-*.png`.
        draw: () -> uint8 images (N, C, H, W), the same each time but for the weights.
        columns: how many stand side by side.
        every_steps: a picture every so many steps.
        recorder: whose clock stops meanwhile.
        preemption: does not wait for a picture.
    """

    def __init__(
        self,
        folder: Path,
        draw: Callable[[], Tensor],
        columns: int,
        every_steps: int,
        recorder: Recorder,
        preemption: Preemption,
    ):
        self.folder = folder
        self.draw = draw
        self.columns = columns
        self.every_steps = every_steps
        self.recorder = recorder
        self.preemption = preemption

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw where a picture is due, and after the last step."""
        step = pl_module.step
        if step % self.every_steps == 0 or step == self.recorder.max_steps:
            with self.recorder.clock.of("preview"):
                images = self._drawn(pl_module)
                if images is None or not self.recorder.world.is_first:
                    return
                path = self.folder / f"step-{step:08d}.png"
                with self.recorder.forgiven():
                    path.write_bytes(encode_png(grid(images, self.columns)))

    def _drawn(self, module: DiffusionModule) -> Tensor | None:
        """The images, in all processes, as each may have but a share of the weights; None if the run is to stop."""

        def look(*_: Any) -> None:
            if self.preemption.agree(self.recorder.world.most):
                raise _Stopped

        hook = module.denoiser.register_forward_pre_hook(look)
        try:
            return self.draw()
        except _Stopped:
            return None
        finally:
            hook.remove()


class Figures(Callback):
    """Judges few samples now and then, with the averaged weights; a line of the figures in metrics.jsonl.

    All its randomness is keyed, so that training goes on as it would without.

    Args:
        judged: () -> the figures, by all processes.
        every_steps: how often; None: never. The last step is judged when the run ends.
        recorder: whose clock stops meanwhile, and beside whose lines the figures stand.
    """

    def __init__(self, judged: Callable[[], Mapping[str, float]], every_steps: int | None, recorder: Recorder):
        self.judged = judged
        self.every_steps = every_steps
        self.recorder = recorder

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge where it is due."""
        step, recorder = pl_module.step, self.recorder
        if not self.every_steps or step % self.every_steps or step == recorder.max_steps or trainer.should_stop:
            return
        with recorder.clock.of("evaluation"):
            try:
                figures = self.judged()
            except ValueError as error:  # of all processes alike; figures can be had later, too
                return recorder.world.say(f"dit: WARNING: step {step} is not judged: {error}")
        if recorder.world.is_first:
            with recorder.forgiven():
                append(recorder.path, {"step": step, **figures})
            print(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


class _Stopped(Exception):
    """A picture is not waited for."""


class Skips:
    """Reports the steps that the guard left out.

    Args:
        path: the skipped.jsonl, to which lines are appended: `step`, `reason` (loss, gradient, spike), `norm`, `ranks`
            whose loss was not finite, and `keys` of the samples of these, or of all.
        recorder: says what cannot be written.
    """

    def __init__(self, path: Path, recorder: Recorder):
        self.path = path
        self.recorder = recorder

    def rolled_back(self, step: int, to: int) -> None:
        """Note that the run goes on after a step with the weights of an earlier one."""
        text = f"too many steps in a row were left out; after step {step} the weights are those of step {to} again"
        self._write({"step": step, "reason": "rolled back", "to": to}, text)

    def left_out(self, bad: Bad) -> None:
        """Name the step, and its samples, in all processes."""
        mine = (math.isfinite(bad.loss), list(bad.keys))
        everyone = self.recorder.world.gathered(mine)
        accused = [(rank, keys) for rank, (finite, keys) in enumerate(everyone) if not finite]
        reason = "loss" if accused else "spike" if math.isfinite(bad.norm) else "gradient"
        keys = [key for _, keys in accused or enumerate(keys for _, keys in everyone) for key in keys]
        norm = bad.norm if math.isfinite(bad.norm) else None
        line = {"step": bad.step, "reason": reason, "norm": norm, "ranks": [rank for rank, _ in accused], "keys": keys}
        what = f"its gradient's norm {bad.norm:.3g} is a spike" if norm is not None else f"its {reason} is not finite"
        few = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        self._write(line, f"step {bad.step} was left out, as {what}; samples {few}")

    def _write(self, line: Mapping[str, Any], text: str) -> None:
        self.recorder.world.say(f"dit: WARNING: {text}, see {self.path}")
        if self.recorder.world.is_first:
            with self.recorder.forgiven():
                append(self.path, line)


class Checkpoints(Callback):
    """Loads the checkpoint to go on from, and commits new ones.

    Args:
        root: the folder of the run's checkpoints.
        resume_from: one of them, or None.
        every_steps: a checkpoint every so many steps, and after the last, and when asked to stop.
        keep: how many to keep.
        recorder: whose clock stops meanwhile, and whose sums are part of the state.
        skips: is told what the guard leaves out.
        preemption: says when to stop.
        data: the fingerprint of the training data.
        keep_every_steps: keep, too, those of multiples of so many steps.
        asynchronous: write while training goes on.
        snapshot_every_steps: keep the averaged weights alone of every so many steps, in `snapshots` beside root.
    """

    def __init__(
        self,
        root: Path,
        resume_from: Path | None,
        every_steps: int,
        keep: int,
        recorder: Recorder,
        skips: Skips,
        preemption: Preemption,
        data: str,
        *,
        keep_every_steps: int | None = None,
        asynchronous: bool = True,
        snapshot_every_steps: int | None = None,
    ):
        self.root = root
        self.resume_from = resume_from
        self.every_steps = every_steps
        self.recorder = recorder
        self.skips = skips
        self.preemption = preemption
        self.snapshot_every_steps = snapshot_every_steps
        self._saver = partial(
            Saver, root, data=data, keep=keep, keep_every_steps=keep_every_steps, asynchronous=asynchronous
        )
        self._snapshooter = partial(Saver, root.parent / "snapshots", data=data, keep=None, asynchronous=asynchronous)
        self.saver: Saver | None = None
        self.snapshooter: Saver | None = None
        self._checked = False
        self._teacher: str | None = None  # what tells its weights from others

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:  # type: ignore[override]
        """Load the state."""
        self.saver = self._saver()  # now that there is a process group, if there is to be one
        self.snapshooter = self._snapshooter() if self.snapshot_every_steps else None
        if self.snapshooter and self.snapshooter.rank == 0:
            checkpoint.clean(self.snapshooter.root, None)
        if self.resume_from is None:
            return self.recorder.rewind(0)
        pl_module.strategy.restore(pl_module, self.resume_from)
        state = checkpoint.load_state(self.resume_from)
        pl_module.step = state["step"]
        self.recorder.load_state(state["recorder"])
        if guard := state.get("guard"):
            pl_module.guard.load_state(guard)
        return self.recorder.rewind(state["step"])

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Commit a checkpoint where one is due; leave if asked to; roll back where leaving steps out is no help."""
        assert self.saver
        if not self._checked:  # what cannot be saved is said after the first step
            self.saver.expect(pl_module.strategy.saved(pl_module))
            self._checked = True
            self._teacher = taught_by(pl_module.objective)
        step, guard, clock = pl_module.step, pl_module.guard, self.recorder.clock
        with clock.of("agree", step):  # the one message of a step that asks no device
            stop = self.preemption.agree(self.recorder.world.most, self.saver.save_seconds)
        last = stop or step == self.recorder.max_steps
        due = last or step % self.every_steps == 0
        guard.note(step, outputs["applied"], outputs["grad_norm"], outputs["loss"], batch["key"])
        for bad in guard.bad(to_the_last=due):
            self.skips.left_out(bad)
        with clock.of("checkpoint"):
            if guard.broken:
                self._roll_back(pl_module)
            if self.snapshooter and self.snapshot_every_steps and step % self.snapshot_every_steps == 0:
                self.snapshooter.save(step, pl_module.strategy.saved(pl_module, averages_only=True), {"step": step})
            if due and (last or guard.good):  # others would take the place of those that one can roll back to
                if guard.good:
                    guard.forgive()
                state = {"step": step, "recorder": self.recorder.state(), "guard": guard.state()}
                if few_step := pl_module.objective.few_step(step):
                    state["few_step"] = few_step._asdict()
                if self._teacher:
                    state["teacher"] = self._teacher
                self.saver.save(step, pl_module.strategy.saved(pl_module), state, wait=last)
            if last and self.snapshooter:
                self.snapshooter.wait()
        trainer.should_stop = stop

    def _roll_back(self, module: DiffusionModule) -> None:
        """Take up the newest checkpoint from before the steps that were left out; the data go on.

        Raises:
            NumericError: if there is none, or it was done too often.
        """
        assert self.saver
        before = module.guard.roll_back()
        self.saver.wait()
        path = self.recorder.world.once(lambda: checkpoint.newest(self.root, before))
        if path is None:
            raise NumericError(
                f"there is no checkpoint from before step {before} to roll back to, and leaving steps out is no help: "
                f"{ADVICE}"
            )
        module.strategy.restore(module, path)
        if guard := checkpoint.load_state(path).get("guard"):
            module.guard.load_usual(guard)
        module.guard.rolled_to = checkpoint.step_of(path)
        self.skips.rolled_back(module.step, checkpoint.step_of(path))

    def close(self) -> None:
        """Wait for what is being written."""
        for saver in (self.saver, self.snapshooter):
            if saver:
                saver.wait()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what checkpoints have cost."""
        if self.saver and self.saver.rank == 0:
            seconds = self.saver.stall_seconds + (self.snapshooter.stall_seconds if self.snapshooter else 0)
            print(f"dit: checkpoints held training up for {seconds:.1f} s in all", flush=True)
