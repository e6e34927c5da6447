"""Where a run is trained: the code, the versions, the machines, and the settings that libraries read."""

import hashlib
import os
import platform
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dit

if TYPE_CHECKING:
    import torch

    from dit.train.world import World

# No other variables are noted, as they may hold secrets.
SETTINGS = (
    r"(NCCL|TORCH_NCCL|GLOO|OMP)_\w+|MASTER_ADDR|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|PYTORCH_\w*ALLOC_CONF"
)
MOST_BYTES = 10**6  # of a difference that is kept


def gathered(world: "World", device: "torch.device") -> dict[str, Any]:
    """Nodes and devices of all processes, which must all ask; versions, settings and the command line of this one."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    places = world.gathered((socket.gethostname(), name))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lightning": version("lightning")}
    return {
        "nodes": dict(Counter(node for node, _ in places)),
        "devices": dict(Counter(name for _, name in places)),
        "versions": versions | {"dit": dit.__version__},
        "command": [re.sub(r"//[^/@\s]*@", "//", word) for word in sys.argv],  # without a URL's password
        "settings": {key: value for key, value in sorted(os.environ.items()) if re.fullmatch(SETTINGS, key)},
    }


def code(folder: Path) -> dict[str, Any]:
    """The revision of the checkout that dit runs from, and the file that has the difference to it, if there is one.

    An installed dit has none, but its version.

    Args:
        folder: gets the difference, unless it is large; the same one is written once.
    """
    root = Path(dit.__file__).resolve().parents[1]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel").strip()).resolve() != root:  # installed within another's
            return {"revision": None, "changed": None}
        revision = _git(root, "rev-parse", "HEAD").strip()
        difference = _git(root, "diff", "HEAD", "--", "dit", "conf")
        new = _git(root, "ls-files", "--others", "--exclude-standard", "--", "dit", "conf").splitlines()
        difference += "".join(_git(root, "diff", "--no-index", "--", "/dev/null", path) for path in new)
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "changed": None}
    if not difference:
        return {"revision": revision, "changed": None}
    changed = f"code-{hashlib.sha256(difference.encode()).hexdigest()[:12]}.diff"
    if len(difference) <= MOST_BYTES and not (folder / changed).exists():
        with suppress(OSError):
            (folder / changed).write_text(difference)
    return {"revision": revision, "changed": changed}


def _git(root: Path, *words: str) -> str:
    """What git says.

    Raises:
        OSError: if there is no git.
        SubprocessError: if it fails, or takes long.
    """
    done = subprocess.run(
        ["git", "-C", str(root), *words],
        capture_output=True,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        timeout=20,
    )
    if done.returncode not in ((0, 1) if "--no-index" in words else (0,)):
        raise subprocess.SubprocessError(done.stderr)
    return done.stdout.decode(errors="replace")


def summary(start: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """What is worth a line at the beginning of a start: where several processes run, and that the code has changed."""
    here, lines = start["environment"], []
    if start["world_size"] > 1 or start["job"]:
        nodes = [f"{node} x {number}" if number > 1 else node for node, number in list(here["nodes"].items())[:8]]
        nodes += ["..."] * (len(here["nodes"]) > 8)
        devices = ", ".join(f"{number} x {name}" for name, number in here["devices"].items())
        settings = "".join(f", {key}={value}" for key, value in here["settings"].items() if "NCCL" in key)
        job = f", job {start['job']}" if start["job"] else ""
        lines.append(f"attempt {start['attempt']}{job} on {devices} ({', '.join(nodes)}), {_words(here)}{settings}")
    if before and _words(before["environment"]) != _words(here):
        lines.append(
            f"WARNING: the code is now {_words(here)}; attempt {before['attempt']} had {_words(before['environment'])}"
        )
    return lines


def _words(environment: Mapping[str, Any]) -> str:
    """Which code it is."""
    if not environment["revision"]:
        return f"dit {environment['versions']['dit']}"
    changed = f" with {environment['changed']}" if environment["changed"] else ""
    return f"revision {environment['revision'][:10]}{changed}"
