"""Runs by several processes, all in the same ones, as starting them takes longer than what they do."""

import json
import shutil
from pathlib import Path

import torch

from dit.command.compose import exit_code_of
from dit.command.train import train
from dit.train import checkpoint, devices
from dit.train.launch import launch
from dit.train.world import World


def train_together(cfgs, num_processes):
    """Train each to its end; the exit code."""
    cfgs = [devices.settled(cfg) for cfg in cfgs]
    return launch(_train_each, cfgs, num_processes) if num_processes > 1 else _train_each(cfgs)


def _train_each(cfgs):
    world = World()
    if world.size > 1:
        world.join("cpu")  # once for all, as DeepSpeed wants it
    for cfg in cfgs:
        if code := exit_code_of(lambda cfg=cfg: train(cfg)):
            return code
    return 0


def lines(cfg):
    path = Path(cfg.runs_dir) / cfg.run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(cfg):
    """All that the newest checkpoint has, by group and name."""
    path = checkpoint.committed(Path(cfg.runs_dir) / cfg.run / "checkpoints")[-1]
    groups = ("model", "ema", "optimizer", "objective", "optimizer-critic")  # the last, if there are some
    return {group: checkpoint.load_weights(path, group) for group in groups if checkpoint.layout(path, group)}


def copied(cfg, run):
    """The run of a configuration so far, under another name."""
    shutil.copytree(Path(cfg.runs_dir) / cfg.run, Path(cfg.runs_dir) / run)
    return run


def differences(cfg, reference):
    """The largest relative differences between two runs: losses at every step, gradient norms, and averaged weights."""
    ours, theirs = lines(cfg), lines(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    found = {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))
        for key in ("loss", "grad_norm")
    }
    ours, theirs = weights(cfg), weights(reference)
    for group, tensors in theirs.items():
        assert ours[group].keys() == tensors.keys()
        flat = {
            name: torch.cat([held[n].flatten().double() for n in tensors])
            for name, held in (("ours", ours[group]), ("theirs", tensors))
        }
        found[group] = ((flat["ours"] - flat["theirs"]).norm() / flat["theirs"].norm()).item()
    return found
