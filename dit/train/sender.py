"""Sends what a run's folder holds to Weights & Biases: a script that `tracker` starts as a process of its own.

Whatever wandb does there, waits for or breaks, training does not notice; and what was missed is still in the folder.
The order stands on the first line of stdin, as JSON. A second line says that the run is over; the end of stdin without
one, that the process that trains is gone.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

LOOK_EVERY_SECONDS = 2.0


class Backlog:
    """The lines of metrics.jsonl and the pictures that are not sent yet.

    Args:
        folder: the run's.
        after: the last step of which all is sent.
    """

    def __init__(self, folder: Path, after: int):
        self.after = after
        self.last_line: dict[str, Any] = {}
        self._lines = folder / "metrics.jsonl"
        self._samples = folder / "samples"
        self._place = (0, 0)  # in the file of this inode, so many bytes are read
        self._rows: dict[int, dict[str, Any]] = {}

    def rows(self, over: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """What is new, a row a step, in order; a picture is the path of its file.

        The last line waits for the next, unless the run is over: its step's picture may be drawn just now.
        """
        if not self._read() and not over:
            return
        for path in self._samples.glob("step-*.png"):
            step = int(path.stem.removeprefix("step-"))
            self._rows.setdefault(step, {"step": step})["preview"] = path
        complete = sorted(step for step in self._rows if over or step < self.last_line["step"])
        for step, row in [(step, self._rows.pop(step)) for step in complete]:
            if step > self.after:
                yield step, row
                self.after = step

    def _read(self) -> bool:
        """Take in new lines; whether there are any."""
        try:
            file = self._lines.open("rb")
        except FileNotFoundError:
            return False
        with file:
            stat = os.fstat(file.fileno())
            inode, place = self._place
            if inode != stat.st_ino or place > stat.st_size:  # written anew, without the lines after a checkpoint
                place = 0
                self._rows.clear()
            file.seek(place)
            before = place
            for text in file:
                if not text.endswith(b"\n"):
                    break
                place += len(text)
                try:
                    self.last_line = json.loads(text)
                    self._rows[self.last_line["step"]] = self.last_line
                except (ValueError, KeyError, TypeError):
                    continue  # half a line, as a full disk leaves it
            self._place = (stat.st_ino, place)
            return place > before


def begin(order: Mapping[str, Any]) -> Any:
    """The run at W&B; one that is there already is continued.

    Raises:
        Exception: of many kinds, if W&B does not want it or does not answer.
    """
    online = order["mode"] == "online"
    if online:
        check_reachable(order["host"])
    sys.argv = order["command"]  # which W&B shows
    import wandb

    live: bool = order["live"]  # else what W&B knows of the machine and the code is to stay as it was
    run = wandb.init(
        project=order["project"],
        name=Path(order["folder"]).name,
        id=order["id"],
        dir=order["folder"],
        config=order["config"],
        mode=order["mode"],
        resume="allow" if online else None,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=30,
            finish_timeout=order["finish_seconds"],
            finish_timeout_raises=True,
            x_disable_stats=not (online and live),
            disable_git=not live,
            x_disable_meta=not live,
            x_disable_machine_info=not live,
            x_stats_pid=order["pid"],
            x_file_stream_retry_max=10**6,  # it keeps on disk what it could not send, and so outlasts a server's outage
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def check_reachable(url: str, timeout_seconds: float = 3.0) -> None:
    """See whether a server is there at all, which wandb would try for minutes.

    Raises:
        OSError: if not.
    """
    host = urlparse(url)
    if not getproxies():  # with one the way there is its affair
        port = host.port or {"http": 80}.get(host.scheme, 443)
        socket.create_connection((host.hostname or "", port), timeout_seconds).close()


def summary_of(folder: Path, last_line: Mapping[str, Any]) -> dict[str, Any]:
    """The final figures, if they are those of the last line and not of a shorter run before it."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if summary.get("step") == last_line.get("step") else {}


def main() -> None:
    """Do as the order says, and end with 0 if W&B has got everything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they reach all processes of a job, but are meant for training
    if not (text := sys.stdin.readline()):
        return
    order = json.loads(text)
    terminal = os.dup(1)  # ours alone: what outlives us must not hold the pipe of a `dit train | tee`
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    folder = Path(order["folder"])
    host = urlparse(order["host"]).netloc
    num_lines = num_pictures = 0
    over = threading.Event()
    in_order = False

    def leave(reason: str | None) -> None:
        sent = f"{num_lines} lines and {num_pictures} pictures"
        if reason and order["live"]:
            print_(
                f"dit: W&B at {host}: {reason}; training is not affected, and `{order['later']}` sends what it lacks"
            )
        elif reason:
            print_(f"dit: W&B at {host}: {reason}; {sent} were under way, and the same command sends what it lacks")
        elif not order["live"]:
            print_(f"dit: sent {sent}")
        os._exit(1 if reason else 0)  # past wandb's own farewell, which may wait without end

    def print_(line: str) -> None:
        with suppress(OSError):  # nobody may be there to read
            os.write(terminal, f"{line}\n".encode())

    def listen() -> None:
        nonlocal in_order
        in_order = bool(sys.stdin.readline())
        over.set()
        time.sleep(1.25 * order["finish_seconds"])  # more than wandb is given, which may keep to it
        leave(f"no answer within {order['finish_seconds']:g} s")

    threading.Thread(target=listen, daemon=True).start()
    try:
        run = begin(order)
        import wandb

        backlog = Backlog(folder, run.starting_step - 1 if order["mode"] == "online" else order["after"])
        while True:
            ended = over.wait(LOOK_EVERY_SECONDS)
            for step, row in backlog.rows(ended):
                num_lines += "loss" in row
                if path := row.pop("preview", None):
                    with suppress(OSError):  # half a picture, as a full disk leaves it
                        row["preview"] = wandb.Image(str(path))
                        num_pictures += 1
                run.log(row, step=step, commit=True)  # W&B's own count is our step, by which it says what it has
            if ended:
                break
        had = run.summary
        run.summary.update({name: v for name, v in summary_of(folder, backlog.last_line).items() if had.get(name) != v})
        run.finish(exit_code=0 if in_order else 1)
    except BaseException as error:
        leave(" ".join(f"{error or type(error).__name__}".split())[:200].rstrip("."))
    leave(None)


if __name__ == "__main__":
    main()
