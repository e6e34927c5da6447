"""Processes that benches measure beside each other."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dit.train.launch import end_with_parent


def ranks(number: int, work: Callable[..., Any], *args: Any, gpus: bool = False) -> list[Any]:
    """What each of so many processes of this machine returns; several are a group, by gloo, or by NCCL.

    Args:
        number: of processes, of which one needs no group.
        work: can be pickled, as what it takes and returns.
        *args: of it.
        gpus: each has one.

    Raises:
        ValueError: if there are fewer GPUs.
    """
    if gpus and number > torch.cuda.device_count():
        raise ValueError(f"--processes {number}, but there are {torch.cuda.device_count()} GPUs: take as many at most")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), end_with_parent) as pool,
    ):
        futures = [pool.submit(_rank, rank, number, gpus, folder, work, args) for rank in range(number)]
        return [future.result() for future in futures]


def _rank(rank: int, number: int, gpus: bool, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(rank)
    if number == 1:
        return work(*args)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, number, number)), strict=True))
    where = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("nccl" if gpus else "gloo", init_method=where, rank=rank, world_size=number)
    try:
        return work(*args)
    finally:
        dist.destroy_process_group()
