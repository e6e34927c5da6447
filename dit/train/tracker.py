"""Weights & Biases as a sink: the local metrics.jsonl is the truth, and a run never waits for a server."""

import netrc
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse
from urllib.request import getproxies


class WandB:
    """Sends metrics and pictures to Weights & Biases.

    Offline unless the user is logged in or asks otherwise. A server that does not answer within seconds makes the run
    an offline one; any later failure ends the sending, with a line that says so, and training goes on.

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
        self._run: Any = None

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, the run of this folder."""
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        if mode == "disabled":
            return
        if mode == "online" and not _reachable():
            later = f"`wandb sync {folder}/wandb/offline-*` sends it later"
            print(f"dit: {_host().netloc} does not answer; W&B stays offline: {later}")
            mode = "offline"
        identity = folder / "wandb-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8])
        self._attempt(lambda: self._begin(folder, config, mode, identity.read_text().strip()))

    def _begin(self, folder: Path, config: Mapping[str, Any], mode: str, identity: str) -> None:
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=folder.name,
            id=identity,
            dir=folder,
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=10, finish_timeout=15, x_disable_stats=mode == "offline"
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send one line of metrics, `step` among them."""
        self._attempt(lambda: self._run and self._run.log(dict(metrics)))

    def image(self, name: str, path: Path, step: int) -> None:
        """Send a picture."""
        import wandb

        self._attempt(lambda: self._run and self._run.log({name: wandb.Image(str(path)), "step": step}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the final figures and end."""
        self._attempt(lambda: self._run and self._run.summary.update(dict(summary)))
        self._attempt(lambda: self._run and self._run.finish())
        self._run = None

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a tracker must never end a run
            print(f"dit: W&B failed and is left out from here on: {error}")
            self._run = None


def _host() -> ParseResult:
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_host().hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(timeout_seconds: float = 3.0) -> bool:
    if getproxies():  # then the way there is the proxy's affair
        return True
    host = _host()
    try:
        port = host.port or {"http": 80}.get(host.scheme, 443)
        socket.create_connection((host.hostname or "", port), timeout_seconds).close()
    except OSError:
        return False
    return True
