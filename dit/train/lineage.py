"""What a run was made of, and what was made of it, by names and bytes that are the same wherever they are told.

`<run>/lineage.jsonl` has a line each: `relation` (used, made), `type` (dataset, model), `name`, `file`, `about`. The
file, in `<run>/lineage/`, is the manifest of shards, of a checkpoint or of an export, with the sha256 of all it stands
for. Who made a thing and who uses it keep the same bytes, by which a tracker knows it for one.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dit.data import index
from dit.train import checkpoint, saved
from dit.train.files import append, replace
from dit.weights.manifest import MANIFEST, fingerprint

LINES, FILES = "lineage.jsonl", "lineage"
ABSENT = "dit.objective.teacher.absent"  # whatever else it says
RUN = "dit.train.trained.initial"  # begins with the weights of a run; other kinds with those of a file


class Thing(NamedTuple):
    """A data set, or weights."""

    type: str
    name: str
    manifest: bytes
    about: dict[str, Any]


def note_used(folder: Path, config: Mapping[str, Any], fingerprint: str) -> None:
    """Note what a new run is made of: its data, its teacher, the weights it begins with.

    Args:
        folder: of the run. One that has such notes keeps them, as a teacher's newest checkpoint may be another by now.
        config: resolved.
        fingerprint: of the training data.
    """
    with _forgiven(folder):
        if not any(line["relation"] == "used" for line in noted(folder)):
            for thing in (*_data(config["data"], fingerprint), *_models(config)):
                _note(folder, "used", thing)


def note_made(folder: Path, path: Path) -> None:
    """Note what was made of a run: an export in a folder, or in its own the last checkpoint."""
    with _forgiven(folder):
        _note(folder, "made", weights(path))


def noted(folder: Path) -> list[dict[str, Any]]:
    """What is noted of a run, without lines that a full disk has cut."""
    path = folder / LINES
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def weights(folder: Path, step: int | None = None) -> Thing:
    """The weights of a run, of its newest checkpoint or of a step's; or those of an export.

    Raises:
        ValueError: if there are none.
    """
    if about := saved.exported(folder):
        manifest = folder / MANIFEST
        data = manifest.read_bytes() if manifest.exists() else _manifest_of(folder)
        told = {"step": about["step"], "weights": about["weights"], "path": str(folder.resolve())}
        return Thing("model", f"export-{_name(folder.resolve().name)}", data, told)
    there = {checkpoint.step_of(path): path for path in checkpoint.committed(folder / "checkpoints")}
    if not there or step not in (None, *there):
        raise ValueError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}")
    path = there[max(there) if step is None else step]
    told = {"step": checkpoint.step_of(path), "path": str(path.resolve())}
    return Thing("model", f"weights-{_name(folder.resolve().name)}", (path / MANIFEST).read_bytes(), told)


@contextmanager
def _forgiven(folder: Path) -> Iterator[None]:
    """Notes that cannot be made, as on a full disk, or of what is gone since a run began, end nothing."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"dit: WARNING: {error}; {folder / LINES} lacks it", flush=True)


def _data(data: Mapping[str, Any], fingerprint: str) -> Iterator[Thing]:
    """The folders of the training shards."""
    paths, indices = _listed(data.get("path")), _listed(data.get("index"))
    for number, path in enumerate(paths):
        where = indices[number] if number < len(indices) else path
        manifest = Path(where) / index.MANIFEST
        told = {"path": str(path), "fingerprint": fingerprint}
        # Of shards at a URL, or without an index, the fingerprint says which they are.
        text = manifest.read_bytes() if manifest.exists() else json.dumps({"fingerprint": fingerprint}).encode()
        yield Thing("dataset", _name("-".join(Path(path).parts[-2:])), text, told)


def _listed(value: Any) -> list[Any]:
    """One, several, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _models(config: Mapping[str, Any]) -> Iterator[Thing]:
    """The weights that a run learns from or begins with."""
    begins, objective = config.get("init") or {}, config["objective"]
    followed = [objective.get(role) or {} for role in ("teacher", "critic")]
    followed = [node for node in followed if node.get("_target_") != ABSENT]
    runs = [(Path(node["runs_dir"]) / node["run"], node.get("step")) for node in followed if "run" in node]
    files = [node["init"]["path"] for node in followed if node.get("init")]
    if begins.get("_target_") == RUN:
        runs.append((Path(begins["path"]), None))
    elif begins.get("path"):
        files.append(begins["path"])
    for folder, step in dict.fromkeys(runs):
        yield weights(folder, step)
    for path in map(Path, dict.fromkeys(files)):
        size = path.stat().st_size if path.is_file() else None  # to hash gigabytes would keep a run waiting
        told = json.dumps({"name": path.name, "bytes": size}).encode()
        yield Thing("model", _name(path.name), told, {"path": str(path)})


def _manifest_of(folder: Path) -> bytes:
    """What an export without a manifest holds."""
    files = {path.name: fingerprint(path)["sha256"] for path in sorted(folder.glob("*.safetensors"))}
    return json.dumps({"files": files}, indent=1).encode()


def _note(folder: Path, relation: str, thing: Thing) -> None:
    """Write it down, unless it is there."""
    file = f"{FILES}/{thing.name}-{hashlib.sha256(thing.manifest).hexdigest()[:12]}.json"
    if any((line["relation"], line["file"]) == (relation, file) for line in noted(folder)):
        return
    (folder / FILES).mkdir(exist_ok=True)
    replace(folder / file, thing.manifest.decode())
    line = {"relation": relation, "type": thing.type, "name": thing.name, "file": file, "about": thing.about}
    append(folder / LINES, line)


def _name(text: str) -> str:
    """A name that Weights & Biases takes, too."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")
