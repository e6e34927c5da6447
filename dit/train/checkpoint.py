"""Checkpoints that are either whole or not there: written aside, synced, committed by rename, verified when read.

A checkpoint is a folder that torch.distributed.checkpoint (DCP) wrote, each rank its own parts, and that any number of
ranks can read: names, whole shapes, and nothing of how they were divided.

    step-00000040/  __0_0.distcp ...   tensors, one file a rank; keys are `<group>/<name>`
                    .metadata          which tensor lies where
                    state.json         what else there is
                    manifest.json      sizes and sha256 of all of these, and of itself
    latest                             the name of the newest
"""

import json
import os
import re
import shutil
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dit import __version__
from dit.train.untrusted import Reader
from dit.weights.export import sync
from dit.weights.manifest import MANIFEST, fingerprint, sealed

STATE = "state.json"
METADATA = ".metadata"
LATEST = "latest"
FORMAT = 1
SLOW_BYTES = 2e8  # a second, of a disk that is slow and hashed
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)  # of files that hold anything

Tensors = Mapping[str, Mapping[str, Tensor]]  # group -> name -> tensor, plain or DTensor

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP's, in a single process


class CheckpointError(RuntimeError):
    """There are checkpoints, but none is intact; or the one that a run was to leave could not be written."""

    exit_code = 4


class Saver:
    """Commits the checkpoints of a run, of which training waits for a copy in memory only.

    Parts are copied to buffers of the CPU, which are kept from save to save and pinned for a GPU; a thread writes them.
    At most one save is under way. One that fails, as on a full disk, leaves nothing, is said once, and the next is
    tried as usual. With several ranks, all must make it and call its methods in the same order, and the folder must be
    one that they share.

    Args:
        root: the folder of the checkpoints.
        data: the fingerprint of the training data.
        keep: how many of the newest to keep; None keeps all.
        keep_every_steps: keep, too, what is of a multiple of so many steps.
        asynchronous: False writes while training waits, without the buffers.

    Attributes:
        stall_seconds: for how long callers have waited for its methods.
        save_seconds: the longest that a save has taken, from its beginning to its commit.
        problem: why the last save failed; None if it did not.
    """

    def __init__(
        self,
        root: Path,
        *,
        data: str = "",
        keep: int | None = 2,
        keep_every_steps: int | None = None,
        asynchronous: bool = True,
    ):
        self.root = root
        self.data = data
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        self.asynchronous = asynchronous
        self.stall_seconds = 0.0
        self.save_seconds = 0.0
        self.problem: str | None = None
        # A group of its own, since the thread's messages must not mix with those of training.
        self.group: Any = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self.rank = dist.get_rank() if self.group else 0
        self.world_size = dist.get_world_size() if self.group else 1
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self._plan: SavePlan | None = None
        self._planned: dict[str, Any] = {}

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Commit `root/step-<step>`, unless it is there; then remove those that are not to be kept.

        Args:
            step: finished optimizer steps.
            tensors: of any device. A DTensor is saved as the parts of all ranks, a plain tensor once, since it must be
                the same on all. All may change as soon as this returns.
            state: what JSON can say.
            wait: return when it is committed.

        Raises:
            ValueError: if something in tensors is none.
            CheckpointError: if it was waited for, and could not be written.
        """
        self.wait()
        began = time.perf_counter()
        with self._stalling():
            text = json.dumps(state, indent=1) + "\n"
            named = _named(tensors)
            if others := [name for name, value in named.items() if not isinstance(value, Tensor)]:
                raise ValueError(f"{others[0]} is no tensor: checkpoints hold tensors, and what JSON can say")
            plan = self._plan_of(named)
            parts = {name: _part(value) for name, value in named.items()}
            if self.asynchronous and not wait:
                arguments = (step, plan, self._staged(parts), text, began)
                self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
                self._thread.start()
                return
            self._write(step, plan, parts, text, began, alert=not wait)
        if wait and self.problem:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written ({self.problem}): mend that, and the same command "
                "goes on from the one before"
            )

    def expect(self, tensors: Tensors) -> None:
        """Guess how long a save of these takes, before there has been one."""
        num_bytes = sum(_part(value).nbytes for values in tensors.values() for value in values.values())
        self.save_seconds = max(self.save_seconds, num_bytes / SLOW_BYTES)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no save is under way."""
        with self._stalling():
            if self._thread:
                self._thread.join()
                self._thread = None

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stall_seconds += time.perf_counter() - began

    def _plan_of(self, tensors: Mapping[str, Tensor]) -> SavePlan:
        """Which parts this rank has of which tensors: the same at each save, as a rule."""
        planned = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        if self._plan is None or planned != self._planned:
            self._plan = create_default_local_save_plan(dict(tensors), self.rank == 0)
            self._planned = planned
        return self._plan

    def _staged(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of parts in the buffers."""
        buffers = {}
        for name, part in parts.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            buffers[name] = buffer.copy_(part, non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.synchronize()
        self._buffers = buffers
        return buffers

    def _write(
        self, step: int, plan: SavePlan, parts: dict[str, Tensor], state: str, began: float, *, alert: bool = True
    ) -> None:
        """Write and commit; what goes wrong, on whichever rank, is the problem of all."""
        final = self.root / f"step-{step:08d}"
        partial = final.with_suffix(".tmp")
        crc32 = torch.serialization.get_crc32_options()  # of this thread
        try:
            # torch would hold the interpreter, and so training, for it; the sha256 of the file says more.
            torch.serialization.set_crc32_options(False)
            if self._agreed(lambda: self.rank == 0 and _begun(partial, final))[0]:
                dcp.save(
                    parts,
                    storage_writer=_Writer(partial, per_thread_copy_ahead=0),
                    planner=_Planner(plan),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
                files = {k: v for own in self._agreed(lambda: self._finished(partial, state)) for k, v in own.items()}
                self._agreed(lambda: self._commit(partial, final, files) if self.rank == 0 else None)
        except (Exception, dcp.CheckpointException) as error:  # a run outlives whatever befalls its checkpoints
            failures = getattr(error, "failures", None)  # DCP's, by rank
            reason = next(iter(failures.values()))[0] if failures else error
            problem = " ".join(str(reason).split())[:300] or type(reason).__name__
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                if alert and self.problem is None:
                    print(
                        f"dit: WARNING: {final} could not be written ({problem}); training goes on, older checkpoints "
                        "stay, and the next one is tried as usual",
                        flush=True,
                    )
            self.problem = problem
        else:
            if self.problem and self.rank == 0:
                print(f"dit: checkpoints are written again, {final}", flush=True)
            self.problem = None
        finally:
            torch.serialization.set_crc32_options(crc32)
            self.save_seconds = max(self.save_seconds, time.perf_counter() - began)

    def _agreed(self, function: Callable[[], Any]) -> list[Any]:
        """What a function returns on each rank; where it fails on one, it fails on all."""
        mine: tuple[Any, str | None]
        try:
            mine = function(), None
        except Exception as error:
            mine = None, f"{error}"
        everyone: list[Any] = [mine]
        if self.group:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, mine, group=self.group)
        for _, problem in everyone:
            if problem is not None:
                raise OSError(problem)
        return [result for result, _ in everyone]

    def _finished(self, partial: Path, state: str) -> dict[str, Any]:
        """The fingerprints of the files of this rank, which are synced then."""
        own = sorted(partial.glob(f"__{self.rank}_*.distcp"))
        if self.rank == 0:
            (partial / STATE).write_text(state)
            own += [partial / STATE, partial / METADATA]
        for path in own:
            sync(path)
        return {path.name: fingerprint(path) for path in own}

    def _commit(self, partial: Path, final: Path, files: Mapping[str, Any]) -> None:
        manifest = {
            "format": FORMAT,
            "step": step_of(final),
            "data": self.data,
            "world_size": self.world_size,
            "versions": {"dit": __version__, "torch": torch.__version__, "lightning": version("lightning")},
            "files": dict(sorted(files.items())),
        }
        (partial / MANIFEST).write_text(sealed(manifest))
        sync(partial / MANIFEST)
        sync(partial)
        pointer = _pointer(final)  # while the disk may still be full without harm
        partial.rename(final)
        sync(self.root)
        pointer.replace(self.root / LATEST)
        sync(self.root)
        if self.keep is not None:
            for old in committed(self.root)[: -self.keep]:
                if not self.keep_every_steps or step_of(old) % self.keep_every_steps:
                    _removed(old)


class _Planner(DefaultSavePlanner):
    """Where parts belong was planned of the tensors themselves; what is written of them are plain parts."""

    def __init__(self, plan: SavePlan):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.planned = plan

    def create_local_plan(self) -> SavePlan:
        self.plan = self.planned
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]


class _Writer(dcp.FileSystemWriter):
    """DCP's, without the paths of this machine in the metadata, and with the causes of its failures."""

    def storage_meta(self) -> StorageMeta | None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):  # of a full disk torch says "unexpected pos 704 vs 598"
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from None


def committed(root: Path) -> list[Path]:
    """The checkpoints that were committed, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def newest(root: Path, before: int | None = None) -> Path | None:
    """The newest intact checkpoint; None where there never was one. What is not intact is passed over, loudly.

    Args:
        root: the folder of the checkpoints.
        before: only of those of earlier steps than this.

    Raises:
        CheckpointError: if there are checkpoints but none is intact.
    """
    found = [path for path in committed(root) if before is None or step_of(path) < before]
    for path in reversed(found):
        if not (problem := verify(path)):
            return path
        print(f"dit: WARNING: passing over the checkpoint {path}: {problem}", flush=True)
    if found:
        raise CheckpointError(f"no checkpoint in {root} is intact; move the folder away to start anew")
    return None


def clean(root: Path, resume_from: Path | None) -> None:
    """Remove what a killed save left, and put aside as `step-*.corrupt` what was passed over for resume_from.

    Only for the process that trains the run.
    """
    for stale in root.glob("step-*.tmp"):
        shutil.rmtree(stale)
    if resume_from:
        for path in committed(root):
            if step_of(path) > step_of(resume_from):
                _put_aside(path)
        with suppress(OSError):  # a full disk; what is gone on from is found without it
            _pointer(resume_from).replace(root / LATEST)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is what was saved."""
    try:
        files = _manifest(path)["files"]
        if missing := {METADATA, STATE} - files.keys():
            return f"{MANIFEST} does not list {missing.pop()}"
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter to others
            for name, found in zip(files, pool.map(lambda name: _found(path, name), files), strict=True):
                if found != files[name]:
                    return f"{name} is {'not what was saved' if found else 'missing'}"
        _reader(path)
        load_state(path)
    except UNREADABLE as error:
        return f"{error}"
    return None


def step_of(path: Path) -> int:
    """The finished optimizer steps of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def data_of(path: Path) -> str:
    """The fingerprint of the data with which a checkpoint was trained."""
    fingerprint: str = _manifest(path)["data"]
    return fingerprint


def load_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors."""
    state = json.loads((path / STATE).read_text())
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds no state")
    return state


def layout(path: Path, group: str) -> dict[str, Tensor]:
    """The tensors of a group without their numbers, on the meta device; none where there is no such group.

    Raises:
        CheckpointError: if the checkpoint is not one.
    """
    try:
        entries: Mapping[str, Any] = _reader(path).metadata.state_dict_metadata
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = {name.partition("/"): entry for name, entry in entries.items()}
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for (prefix, _, name), entry in found.items()
        if prefix == group
    }


def load_weights(path: Path, group: str) -> dict[str, Tensor]:
    """The tensors of a group, whole and on the CPU, in one process of however many.

    Raises:
        CheckpointError: if there is no such group, or they cannot be read.
    """
    tensors = {name: torch.empty_like(value, device="cpu") for name, value in layout(path, group).items()}
    if not tensors:
        raise CheckpointError(f"{path} has no {group}")
    load_into(path, {group: tensors})
    return tensors


def load_into(path: Path, tensors: Tensors) -> None:
    """Read the numbers of tensors in place, of a DTensor this rank's part, however it was divided when it was saved.

    Args:
        path: the checkpoint.
        tensors: of any device, each of the shape it was saved with; its dtype may be another.

    Raises:
        CheckpointError: if one is not there, has another shape, or cannot be read.
    """
    try:
        with torch.no_grad():
            dcp.load(
                _named(tensors),
                storage_reader=_reader(path),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,  # each rank finds its parts by itself
            )
    except (dcp.CheckpointException, *UNREADABLE) as error:
        failures = getattr(error, "failures", None)
        reason = next(iter(failures.values()))[0] if failures else error
        short = re.split(r"\. |Re-running|\n", f"{type(reason).__name__}: {reason}")[0][:200]  # of torch's long advice
        raise CheckpointError(f"{path} cannot be read ({short})") from error


def _begun(partial: Path, final: Path) -> bool:
    """Make the folder to write in; False if the checkpoint is there already."""
    if final.exists():
        if verify(final) is None:
            return False
        _put_aside(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return True


def _pointer(path: Path) -> Path:
    """What is to replace `latest`, for it to name a checkpoint."""
    pointer = path.parent / f"{LATEST}.tmp"
    pointer.write_text(f"{path.name}\n")
    sync(pointer)
    return pointer


def _removed(path: Path) -> None:
    """Remove an old checkpoint, which is never half there under its own name; one that stays does no harm."""
    aside = path.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        shutil.rmtree(path.rename(aside))


def _put_aside(path: Path) -> None:
    aside = path.with_suffix(".corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _named(tensors: Tensors) -> dict[str, Tensor]:
    """By the keys that DCP is given."""
    return {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}


def _part(value: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    part: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return part.detach()


def _reader(path: Path) -> Reader:
    return Reader(path, {name: found["bytes"] for name, found in _manifest(path)["files"].items()})


def _manifest(path: Path) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        ValueError: if it is not what was saved, or of another format.
    """
    if not _own(path / MANIFEST):
        raise ValueError(f"{MANIFEST} is missing")
    try:
        text = (path / MANIFEST).read_text()
        manifest: dict[str, Any] = json.loads(text)
        number = manifest.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not what was saved") from error
    if number != FORMAT:
        raise ValueError(
            f"{MANIFEST} is of format {number}, which another version of dit reads; this one reads {FORMAT}"
        )
    if sealed({name: value for name, value in manifest.items() if name != "sha256"}) != text:
        raise ValueError(f"{MANIFEST} is not what was saved")
    return manifest


def _found(path: Path, name: str) -> dict[str, Any] | None:
    """The fingerprint of a file of a checkpoint; None if there is none, or it is none of the folder's own."""
    return fingerprint(path / name) if re.fullmatch(r"[\w.-]+", name) and _own(path / name) else None


def _own(path: Path) -> bool:
    """Whether there is such a file, which is no link, nor anything that would not answer."""
    return path.exists() and stat.S_ISREG(path.lstat().st_mode)
