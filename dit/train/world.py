"""The processes that train one run together, one a device."""

import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

LEAST_PATIENCE_SECONDS = 1800.0  # of a collective, before gloo and NCCL give up


class EnvironmentMistake(ValueError):
    """Of a launcher, which is said by every process."""

    everywhere = True


class Lost(RuntimeError):
    """Another process is gone, and this one cannot go on."""

    exit_code = 1


def is_connection(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached."""
    return bool(re.search("onnection (reset|closed|refused)|timed out", str(error), re.IGNORECASE))


class World:
    """Which of how many processes this is, as torchrun, srun or `launch` said in the environment; else the only one.

    Attributes:
        rank: of this process among all, 0 the first.
        size: number of processes.
        local_rank: of this process among those of its node.
        local_size: number of processes on its node.

    Raises:
        ValueError: if the environment says something else than numbers.
    """

    def __init__(self) -> None:
        try:
            env = _environment()
            address, port = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", 29500))
            self.rank, self.size = int(env["RANK"]), int(env["WORLD_SIZE"])
            self.local_rank, self.local_size = int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"])
            if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size):
                raise ValueError(f"rank {self.rank} of {self.size}, locally {self.local_rank} of {self.local_size}")
            if self.size % self.local_size:
                raise ValueError(f"{self.size} processes, of which {self.local_size} are on this node")
        except (KeyError, ValueError, ZeroDivisionError) as error:
            what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise EnvironmentMistake(
                f"the launcher's environment makes no sense ({what}): use torchrun or srun"
            ) from None
        self._address = address, str(port)
        self._patient: Any = None
        self._joined = False

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process as one of several."""
        return self.size > 1

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self.size // self.local_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_first:
            print(text, flush=True)

    def device(self, kind: str) -> torch.device:
        """That of this process, `cpu` or `cuda`; it may see all GPUs of its node, or its own alone."""
        return torch.device(kind, self.local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)

    def join(self, device: str, timeout_seconds: float | None = None) -> None:
        """Connect the processes: gloo, and NCCL where tensors lie on GPUs.

        Args:
            device: `cpu` or `cuda`.
            timeout_seconds: after which the watchdog ends a run that hangs; the backends' own patience is greater.
        """
        if dist.is_initialized():
            return
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = (self.rank, self.size, self.local_rank, self.local_size)
        os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
        if device == "cuda":
            torch.cuda.set_device(self.device(device))
        if self.size > 1:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = self._address
            # Long enough, too, for what the first process does alone within training, such as to judge.
            patience = timedelta(seconds=max(LEAST_PATIENCE_SECONDS, 1.2 * (timeout_seconds or 0)))
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=patience)
            except dist.DistError as error:
                where = ":".join(self._address)
                raise EnvironmentMistake(f"no meeting at MASTER_ADDR:MASTER_PORT={where} ({error})"[:300]) from error
        else:  # sharding wants a group even of one, which needs no port
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        # What only the first process does may take long, such as to pack data; a step may not.
        self._patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12)) if self.size > 1 else None
        self._joined = True

    def store(self) -> dist.Store:
        """A connection of its own, for another thread, to where the processes have met."""
        return dist.TCPStore(self._address[0], int(self._address[1]), is_master=False, wait_for_workers=False)

    def leave(self) -> None:
        """Disconnect."""
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()
        self._joined = False

    def once(self, function: Callable[[], T]) -> T:
        """What a function gives in the first process, in all of them; if it fails there, all stop.

        Raises:
            Exception: in the first process, the function's own; in others SystemExit with its exit code, silently.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        failed: Exception | None = None
        if self.is_first:
            try:
                answer[0] = function()
            except Exception as error:
                failed, answer[1] = error, getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
        dist.broadcast_object_list(answer, device=torch.device("cpu"), group=self._patient)
        if failed is not None:
            raise failed
        if answer[1] is not None:
            sys.stdout.flush()
            raise SystemExit(answer[1])
        value: T = answer[0]
        return value

    def most(self, value: int) -> int:
        """The largest of the processes' values; on the CPU, so that no device is waited for."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gathered(self, value: T) -> list[T]:
        """The processes' values, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return value if self.size == 1 else self.sum(value) / self.size

    def total(self, value: int) -> int:
        """The sum of the processes' values."""
        return round(self.sum(torch.tensor(float(value), dtype=torch.float64)).item())


def _environment() -> dict[str, str]:
    """RANK and so on, in torchrun's words."""
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        env["RANK"], env["WORLD_SIZE"]  # both, or KeyError
        local = {"LOCAL_RANK": env["RANK"], "LOCAL_WORLD_SIZE": env["WORLD_SIZE"]}  # one node, unless it is said
        return local | dict(env)
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # a step of srun, not the batch script around it
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(int(env["SLURM_STEP_NUM_TASKS"]) // int(env["SLURM_STEP_NUM_NODES"])),
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + int(env["SLURM_JOB_ID"]) % 10000),
        }
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _first_host(nodes: str) -> str:
    """Of SLURM's list, such as node[01-04,07],other3."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.resolve_root_node_address(nodes)
