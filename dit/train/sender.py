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
DISTANCES = ("frechet", "fid", "sfid", "kid", "fd_", "cmmd")


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
            with suppress(ValueError):  # nothing of ours
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
                    line = json.loads(text)
                    self._rows.setdefault(line["step"], {}).update(line)  # figures stand in a line of their own
                    self.last_line = line
                except (ValueError, KeyError, TypeError):
                    continue  # half a line, as a full disk leaves it
            self._place = (stat.st_ino, place)
            return place > before


class Skips:
    """The lines of skipped.jsonl that nobody was alerted of.

    Args:
        folder: the run's.
        place: the byte from which on they are new.
    """

    def __init__(self, folder: Path, place: int):
        self._path = folder / "skipped.jsonl"
        self._place = place

    def alert(self) -> tuple[str, str] | None:
        """What is to be said of what is new, one text for however many: a kind, and the text."""
        try:
            new = self._path.read_bytes()[self._place :]
        except FileNotFoundError:
            return None
        new = new[: new.rfind(b"\n") + 1]
        self._place += len(new)
        lines: list[dict[str, Any]] = []
        for text in new.splitlines():
            with suppress(ValueError):  # half a line, as a full disk leaves it
                lines.append(json.loads(text))
        if not lines:
            return None
        last, reasons = lines[-1], {line["reason"] for line in lines}
        if "rolled back" in reasons:
            told = f"after step {last['step']} the weights are those of step {last.get('to')} again"
            return "rolled back", f"{told}; skipped.jsonl has more"
        kind = "NaN" if reasons & {"loss", "gradient"} else "a spike"
        told = f"{len(lines)} steps were left out, the last of them {last['step']} ({last['reason']})"
        return kind, f"{told}; skipped.jsonl has more"


class Lineage:
    """What lineage.jsonl says that is not sent yet, as artifacts: manifests with the hashes of what they stand for.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._sent = 0  # lines

    def send(self, run: Any) -> None:
        """Have the run use data and teacher, and make its weights and exports, of which nothing is uploaded."""
        import wandb

        path = self._folder / "lineage.jsonl"
        written = path.read_text() if path.exists() else ""
        texts = written[: written.rfind("\n") + 1].splitlines()  # half a line is being written
        for text in texts[self._sent :]:
            with suppress(ValueError, LookupError, OSError):  # one that a full disk has cut
                line = json.loads(text)
                artifact = wandb.Artifact(line["name"], line["type"], metadata=line["about"])
                artifact.add_file(str(self._folder / line["file"]), "manifest.json", policy="immutable")
                # `run.use_artifact` does the same, but not offline, and waits for the server.
                run._log_artifact(artifact, is_user_created=True, use_after_commit=line["relation"] == "used")
        self._sent = len(texts)


def charts(schedule: Mapping[str, list[float]]) -> dict[str, Any]:
    """The noise schedule, for the first line of a run."""
    import wandb

    if not schedule:
        return {}
    t, levels = schedule["t"], [schedule["alpha"], schedule["sigma"]]
    return {
        "schedule/levels": wandb.plot.line_series(t, levels, ["alpha", "sigma"], "x_t = alpha x0 + sigma eps", "t"),
        "schedule/log_snr": wandb.plot.line_series(t, [schedule["log SNR"]], ["log SNR"], "log SNR", "t"),
    }


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The distances among the final figures as a chart, for the last line of a run."""
    import wandb

    rows = [[name, value] for name, value in summary.items() if name.startswith(DISTANCES) and "noise" not in name]
    if not rows:
        return {}
    return {"distances": wandb.plot.bar(wandb.Table(["figure", "value"], rows), "figure", "value", "Distances")}


def evaluation(folder: Path) -> dict[str, Any]:
    """The last evaluation, all that moves its figures, and the plot of several, for the summary."""
    import wandb

    path, plot = folder / "evaluation.jsonl", folder / "evaluation.png"
    told: dict[str, Any] = {}
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # half a line, or nothing of ours
            record = json.loads(text)
            figures = {f"evaluation/{name}": value for name, value in record["figures"].items()}
            told = {**figures, "evaluation/settings": record["settings"]}
    if plot.exists():
        with suppress(OSError):  # half a picture
            told["evaluation/plot"] = wandb.Image(str(plot))
    return told


def begin(order: Mapping[str, Any]) -> Any:
    """The run at W&B; one that is there already is continued, from an earlier step where it was rewound.

    Raises:
        Exception: of many kinds, if W&B does not want it or does not answer.
    """
    online = order["mode"] == "online"
    if online:
        check_reachable(order["host"])
    sys.argv = order["command"]  # which W&B shows
    import wandb

    live: bool = order["live"]  # else what W&B knows of the machine and the code is to stay as it was

    def init(**continuing: Any) -> Any:
        return wandb.init(
            project=order["project"],
            name=Path(order["folder"]).name,
            id=order["id"],
            dir=order["folder"],
            config=order["config"],
            mode=order["mode"],
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
                x_file_stream_retry_max=10**6,  # what it could not send it keeps on disk, and so outlasts an outage
            ),
            **continuing,
        )

    run = None
    if online and order["rewind_to"] is not None:
        try:
            run = init(resume_from=f"{order['id']}?_step={order['rewind_to']}")
        except Exception:  # not every server can, or has got so far: what it has of later steps then stays
            wandb.teardown()  # or it would say that the run is in use
    run = run or init(resume="allow" if online else None)
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


def farewell(folder: Path, summary: Mapping[str, Any], step: int, in_order: bool) -> tuple[str, str, str]:
    """The alert of a run's end: what, a text, a level."""
    if in_order and summary:
        told = (f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, int | float))
        return "done", ", ".join(told), "INFO"
    if in_order:
        return "stopped", f"saved at step {step}; the same command, or SLURM, goes on from there", "INFO"
    ended: dict[str, Any] = {}
    with suppress(OSError, ValueError, LookupError):
        last = max((path for path in (folder / "attempts").glob("*.json")), key=lambda path: path.name)
        ended = json.loads(last.read_bytes())["ended"] or {}
    return "failed", f"after step {step}: {ended.get('error', 'it was killed, or its machine was lost')}", "ERROR"


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
    trouble: str | None = None  # with what is not essential

    def alert(what: str, text: str, level: str = "INFO") -> None:
        if order["live"]:
            run.alert(f"{folder.name[:40]}: {what}", text, level)

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
        skips, lineage = Skips(folder, order["skipped_bytes"]), Lineage(folder)
        if order["goes_on"]:
            alert("goes on", order["goes_on"])
        schedule = order["schedule"] if backlog.after <= 0 else {}
        while True:
            ended = over.wait(LOOK_EVERY_SECONDS)
            try:
                lineage.send(run)
            except Exception as error:  # curves do not wait for artifacts
                trouble = trouble or f"artifacts: {_told(error)}"
            if skipped := skips.alert():
                alert(*skipped, "WARN")
            rows = list(backlog.rows(ended))
            if rows and schedule:
                rows[0][1].update(charts(schedule))
                schedule = {}
            if rows and ended:
                rows[-1][1].update(figures(summary_of(folder, backlog.last_line)))
            for step, row in rows:
                num_lines += "loss" in row
                if path := row.pop("preview", None):
                    with suppress(OSError):  # half a picture, as a full disk leaves it
                        row["preview"] = wandb.Image(str(path))
                        num_pictures += 1
                run.log(row, step=step, commit=True)  # W&B's own count is our step, by which it says what it has
            if ended:
                break
        had, summary = run.summary, summary_of(folder, backlog.last_line)
        told = {**summary, **evaluation(folder)}
        run.summary.update({name: v for name, v in told.items() if had.get(name) != v})
        alert(*farewell(folder, summary, backlog.last_line.get("step", order["after"]), in_order))
        run.finish(exit_code=0 if in_order else 1)
    except BaseException as error:
        leave(_told(error))
    leave(trouble)


def _told(error: BaseException) -> str:
    """What an error says, in a line."""
    return " ".join(f"{error or type(error).__name__}".split())[:200].rstrip(".")


if __name__ == "__main__":
    main()
