"""Weights & Biases as a sink: the run's folder is the truth, and a run never waits for a server."""

import json
import netrc
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dit.train import attempts, sender
from dit.train.files import rewound, steps

FINISH_SECONDS = 12.0
SCHEDULE_POINTS = 101
FAR = 25.0  # log SNR is infinite at the ends


class WandB:
    """Has a process of its own send metrics and pictures to Weights & Biases.

    It reads them in the run's folder, so that training hands nothing over and waits for nothing. Offline unless the
    user is logged in or asks otherwise. If the server cannot be reached a line says so, and how to send it later.
    A run that goes on from an earlier step than the server has is rewound there, if that server can.

    Args:
        project: the project's name there.
        mode: online, offline or disabled; None: WANDB_MODE, else online if logged in, else offline.

    Raises:
        ValueError: if mode is another.
    """

    def __init__(self, project: str, mode: str | None = None):
        if mode not in (None, "online", "offline", "disabled"):
            raise ValueError(f"logger.mode={mode} must be online, offline, disabled or null")
        self.project = project
        self.mode = mode
        self._process: subprocess.Popen[str] | None = None
        self._later = ""

    def start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin, or go on with, the run of this folder, which stands at a step."""
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        if mode == "disabled":
            return
        runs_dir = "" if str(folder.parent) == "runs" else f" runs_dir={folder.parent}"
        self._later = f"dit sync run={folder.name}{runs_dir}"
        order = {"live": True, "mode": mode, "after": step, "finish_seconds": FINISH_SECONDS, "later": self._later}
        try:
            order |= {"rewind_to": _rewound_to(folder, step), "goes_on": _goes_on(folder)}
            skipped = folder / "skipped.jsonl"
            order["skipped_bytes"] = skipped.stat().st_size if skipped.exists() else 0
            self._process = _sender(folder, config, self.project, order)
        except Exception as error:  # a tracker must never end a run
            print(f"dit: W&B is left out ({error}); `{self._later}` sends it later")

    def finish(self) -> None:
        """Have the rest sent, as far as that takes seconds."""
        if self._process and not _ended(self._process, 1.5 * FINISH_SECONDS):
            print(f"dit: W&B does not come to an end; `{self._later}` sends what it lacks")
        self._process = None


def sync(folder: Path, config: Mapping[str, Any], project: str, timeout_seconds: float) -> bool:
    """Send what the server does not have of a run; whether it now has everything."""
    order = {"live": False, "mode": "online", "after": 0, "finish_seconds": timeout_seconds, "later": ""}
    order |= {"rewind_to": None, "goes_on": None, "skipped_bytes": 0}
    process = _sender(folder, config, project, order)
    return _ended(process, None) and process.returncode == 0


def _sender(folder: Path, config: Mapping[str, Any], project: str, order: Mapping[str, Any]) -> "subprocess.Popen[str]":
    """The process that does as an order says."""
    identity = folder / "wandb-id"
    if not identity.exists():
        of_sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        identity.write_text(of_sweep or uuid.uuid4().hex[:8])
    run = {"folder": str(folder), "id": identity.read_text().strip(), "config": dict(config), "project": project}
    run["schedule"] = _schedule(config)
    here = {"command": sys.argv, "pid": os.getpid(), "host": _host()}
    process = subprocess.Popen(
        [sys.executable, "-P", sender.__file__],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it
        env={"WANDB_ERROR_REPORTING": "false", **os.environ},
    )
    assert process.stdin
    process.stdin.write(json.dumps({**order, **run, **here}) + "\n")
    process.stdin.flush()
    return process


def _rewound_to(folder: Path, step: int) -> int | None:
    """The step of the last line that stays, if there are lines after the step at which a run goes on.

    They are cut off already here, as training will do: what is about to be written again must not be sent.
    """
    lines = folder / "metrics.jsonl"
    if max((line["step"] for line in steps(lines)), default=0) <= step:
        return None
    kept = rewound(lines, step)
    return kept[-1]["step"] if kept else 0


def _goes_on(folder: Path) -> str | None:
    """How a run came to be started again; None if it was not."""
    starts = attempts.read(folder)
    if len(starts) < 2:
        return None
    now, before = starts[-1], attempts.how_ended(starts[-2])
    requeued = f", requeue {now['restarts']}" if now.get("restarts") else ""
    return f"from step {now['from_step']}: start {len(starts)}{requeued}; the one before: {before}"


def _schedule(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """The noise schedule as a curve; nothing, where there is none."""
    from omegaconf import OmegaConf

    if "_target_" not in (noise := config.get("noise") or {}):
        return {}
    import torch

    from dit.train.build import build

    schedule = build(OmegaConf.create(noise))
    t = torch.linspace(0, schedule.t_max, SCHEDULE_POINTS, dtype=torch.float64)
    level = schedule(t)
    curves = {"t": t, "alpha": level.alpha, "sigma": level.sigma, "log SNR": schedule.log_snr(t).clamp(-FAR, FAR)}
    return {name: curve.tolist() for name, curve in curves.items()}


def _ended(process: "subprocess.Popen[str]", timeout_seconds: float | None) -> bool:
    """Whether a process has ended by itself, after it was told that the run is over."""
    try:
        process.communicate("over\n", timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def logged_in() -> bool:
    """Whether there is a key for the server, of the environment or of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_host()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _host() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
