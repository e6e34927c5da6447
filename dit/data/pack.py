"""Pack what stands elsewhere into shards."""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit.data import index
from dit.data.input import NOTES, Input, Listing, Problem, Sample, input_of
from dit.data.parallel import each
from dit.data.picture import MAX_BYTES
from dit.data.preparation import Form, Unusable, prepared
from dit.data.store import DataError, Store
from dit.data.writer import check_apart, write_shard

PLAN, REPORT, CLASSES = "plan.json", "report.jsonl", "classes.json"
BYTES_A_PIXEL = {"png": 2.0, "jpg": 0.5, "webp": 0.3}  # about, of images of another size
MEMBER_BYTES = 4096  # about, of what stands beside an image
MIN_SHARDS = 16  # as a run reads from several at a time, its trainer.lanes


class Part(NamedTuple):
    """A shard to write."""

    path: Path
    first: int  # the number of its first sample
    samples: list[Sample]

    @property
    def done(self) -> Path:
        """What was met while writing it, which is written last."""
        return self.path.with_suffix(".done.json")


def pack(
    source: Any,
    out: str | Path,
    *,
    captions: str | None = None,
    classes: bool | str = "auto",
    columns: Mapping[str, str | None] | None = None,
    size: int | None = None,
    format: str | None = None,
    quality: int = 95,
    shuffle: bool = True,
    seed: int = 0,
    shard_bytes: int = 2**28,
    held_out: str | Path | None = None,
    num_held_out: int = 0,
    max_broken: float = 0.01,
    num_workers: int | None = None,
) -> index.Index:
    """Pack images with their classes and captions into shards with an index; called again, it goes on.

    Which sample goes where follows from the listing and the options alone, so the same call gives the same bytes,
    stopped and started again or not, by any number of processes. A sample is numbered whether or not it turns out to be
    broken.

    Args:
        source: a folder of images, a folder or a list of tars, or a data set that `datasets` wrote with `save_to_disk`.
        out: the folder of shards.
        captions: a .json, .jsonl or .csv of them, or `txt`, a file beside each image.
        classes: whether the first sub-folders are classes; `auto`: unless there are captions.
        columns: which columns are the `image`, `caption` and `label`, where their names do not tell.
        size: side in pixels of the centre square that is kept, as ADM cuts it.
        format: png, jpg or webp; None: as it is, or png where the size changes.
        quality: of jpg and webp.
        shuffle: spread the samples over the shards in an order keyed by the seed, instead of as they are listed.
        seed: of that order, and of the choice of what is held out.
        shard_bytes: about how large a shard is; smaller, so that there are 16.
        held_out: another folder of shards, for samples kept from training.
        num_held_out: how many.
        max_broken: the share of samples that may be left out.
        num_workers: processes; None: one a core.

    Returns:
        The index of out.

    Raises:
        ValueError: for an option, source or out that cannot be used.
        DataError: if more is broken than may be.
    """
    form = Form(size, format, quality)
    form.check()
    asked = {kind: name for kind, name in (columns or {}).items() if name}
    sources = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    folders = [Path(out)] if held_out is None else [Path(out), Path(held_out)]
    if (held_out is None) != (num_held_out == 0):
        raise ValueError(f"held_out={held_out}, num_held_out={num_held_out}: give both, a folder and a number, or none")
    options: dict[str, Any] = {"source": [str(path.resolve()) for path in sources], "captions": captions}
    options |= {"classes": classes, "columns": asked, **form._asdict(), "shuffle": shuffle, "seed": seed}
    options |= {"shard_bytes": shard_bytes, "num_held_out": num_held_out}
    given = input_of(sources, captions, classes, asked)
    _check_folders(sources, folders)
    _check_plan(folders, {"options": options})
    if all((folder / index.MANIFEST).exists() for folder in folders):
        for done in itertools.chain.from_iterable(folder.glob("*.done.json") for folder in folders):
            done.unlink()
        found = index.read(out)
        number = sum(shard.samples for shard in found.shards)
        print(f"{out} is complete, as its source was listed when it was packed: {number:,} samples")
        return found
    num_workers = num_workers or len(os.sched_getaffinity(0))
    listing = given.listing(num_workers)
    total = len(listing.samples) + sum(problem.reason not in NOTES for problem in listing.problems)
    if not total:
        raise ValueError(f"source={', '.join(map(str, sources))} holds no images, nor tars, nor a data set on disk")
    if 0 < num_held_out >= len(listing.samples):
        raise ValueError(f"num_held_out={num_held_out}, but there are only {len(listing.samples)} samples")
    digest = hashlib.sha256(repr(options).encode())
    for sample in listing.samples:
        digest.update(repr(sample).encode(errors="backslashreplace"))
    plan = {"options": options, "listing": digest.hexdigest(), "samples": len(listing.samples)}
    _check_plan(folders, plan)
    held, rest = _split(listing.samples, num_held_out, shuffle, seed)
    parts = [part for i, folder in enumerate(folders) for part in _parts(folder, (rest, held)[i], shard_bytes, form)]
    with _alone(folders):
        for folder in folders:
            index.replace(folder / PLAN, _json(plan))
        _report(folders[0], listing.problems, total, max_broken)
        todo = _todo(parts, folders)
        for _ in each(functools.partial(_write, given=given, form=form), todo, num_workers, "shards packed"):
            pass
        problems, shards = _gathered(parts, folders)
        problems = [*listing.problems, *problems]
        _report(folders[0], problems, total, max_broken)
        _commit(shards, listing, {**form._asdict(), "shuffle": shuffle, "seed": seed})
        for part in parts:
            part.done.unlink()
    _tell(shards, problems, folders[0] / REPORT)
    return index.read(out)


def _check_folders(sources: Sequence[Path], folders: Sequence[Path]) -> None:
    """Nothing may be written where something is read, or among other files."""
    for folder in folders:
        for other in [*sources, *(other for other in folders if other is not folder)]:
            check_apart(folder, other)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder")
        here = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} if folder.exists() else set()
        if here and PLAN not in here:
            raise ValueError(f"{folder} holds other files, like {min(here)}: give a folder that is new or empty")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{folder} cannot be written: {parent} is not writable")


def _check_plan(folders: Sequence[Path], plan: Mapping[str, Any]) -> None:
    """What has been begun must be gone on with as it was begun.

    Raises:
        ValueError: if it was another pack.
    """
    for folder in folders:
        if any(folder.glob("*.done.json")) or (folder / index.MANIFEST).exists():
            begun = json.loads((folder / PLAN).read_bytes())
            had, options = begun["options"], plan["options"]
            differ = [f"{key}={had.get(key)}" for key in options if had.get(key) != options[key]]
            if not differ and any(begun[key] != plan[key] for key in plan):
                differ = [f"another listing of the source ({begun['samples']:,} samples, now {plan['samples']:,})"]
            if differ:
                way_out = "give the same command, delete that folder, or choose another out"
                raise ValueError(f"{folder} was begun with {', '.join(differ)}: {way_out}")


def _split(samples: list[Sample], num_held_out: int, shuffle: bool, seed: int) -> tuple[list[Sample], list[Sample]]:
    """What is held out, and the rest; a sample's place in the shuffled order follows from its name."""

    def keyed(sample: Sample) -> bytes:
        return hashlib.blake2b(f"{seed} {sample.source}".encode(errors="surrogateescape"), digest_size=16).digest()

    shuffled = sorted(samples, key=keyed)
    held, rest = shuffled[:num_held_out], shuffled[num_held_out:]
    if shuffle:
        return held, rest
    chosen = {sample.source for sample in held}
    return held, [sample for sample in samples if sample.source not in chosen]


def _parts(folder: Path, samples: list[Sample], shard_bytes: int, form: Form) -> list[Part]:
    """The shards of a folder, cut by what the images are expected to need."""
    most = BYTES_A_PIXEL[form.format or "png"] * form.size**2 if form.size else math.inf
    total = sum(min(sample.bytes, most) + MEMBER_BYTES for sample in samples)
    shard_bytes = min(shard_bytes, math.ceil(total / MIN_SHARDS))
    cuts, filled = [0], 0.0
    for end, sample in enumerate(samples, 1):
        filled += min(sample.bytes, most) + MEMBER_BYTES
        if filled >= shard_bytes or end == len(samples):
            cuts.append(end)
            filled = 0
    pairs = enumerate(itertools.pairwise(cuts))
    return [Part(folder / f"{number:06d}.tar", first, samples[first:end]) for number, (first, end) in pairs]


def _write(part: Part, given: Input, form: Form) -> None:
    """Write a shard, and last what was met."""
    problems: list[Problem] = []
    digests: dict[str, str] = {}

    def usable() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, sample in enumerate(part.samples, part.first):
            key = f"{number:08d}"
            try:
                image, others = _read(given, sample)
                files = prepared(image, others, sample.source, form)
            except Unusable as error:
                problems.append(Problem(error.args[0], sample.source, error.args[1], key))
                continue
            digests[key] = hashlib.sha256(image).hexdigest()
            yield key, files

    samples = usable()
    try:
        if first := next(samples, None):
            write_shard(part.path, itertools.chain([first], samples))
        index.replace(part.done, _json({"problems": problems, "sha256": digests}))
    except OSError as error:
        raise DataError(f"{part.path} cannot be written ({error}): mend that, and start again to go on") from error


def _read(given: Input, sample: Sample) -> tuple[bytes, dict[str, bytes]]:
    if sample.bytes > MAX_BYTES:
        raise Unusable("unreadable", f"{sample.bytes:,} bytes")
    try:
        return given.files(sample)
    except PermissionError as error:
        raise Unusable("unreadable", str(error)) from error
    except OSError as error:  # perhaps the disk's fault, and not the sample's
        raise DataError(f"{sample.source} cannot be read ({error}): start again to go on") from error


def _todo(parts: Sequence[Part], folders: Sequence[Path]) -> list[Part]:
    """The shards that are not there whole; what is there of them, or of another plan, is removed."""
    todo, whole = [], set()
    for part in parts:
        try:
            if json.loads(part.done.read_bytes())["sha256"]:  # else all its samples are broken
                shard, _ = index.load(Store(str(part.path.parent)), part.path.name)
                if part.path.stat().st_size != shard.bytes:
                    raise ValueError
            whole.add(part.path)
        except (ValueError, OSError):
            todo.append(part)
    for path in itertools.chain.from_iterable(folder.glob("*.tar") for folder in folders):
        if path not in whole:
            path.unlink()
    return todo


def _gathered(parts: Sequence[Part], folders: Sequence[Path]) -> tuple[list[Problem], dict[Path, list[index.Shard]]]:
    """What was met while writing, and the shards of each folder."""
    problems = []
    shards: dict[Path, list[index.Shard]] = {folder: [] for folder in folders}
    first: dict[bytes, str] = {}
    for part in parts:
        found = json.loads(part.done.read_bytes())
        problems += [Problem(*problem) for problem in found["problems"]]
        for key, digest in found["sha256"].items():
            name = key if part.path.parent == folders[0] else f"held-out {key}"
            if (same := first.setdefault(bytes.fromhex(digest), name)) != name:
                source = part.samples[int(key) - part.first].source
                problems.append(Problem("duplicate", source, f"kept; its image is that of {same}", key))
        if found["sha256"]:
            shards[part.path.parent].append(index.load(Store(str(part.path.parent)), part.path.name)[0])
    return problems, shards


def _commit(shards: Mapping[Path, list[index.Shard]], listing: Listing, about: Mapping[str, Any]) -> None:
    """Write the manifests; that of the first folder, last, says that all is there."""
    for folder, written in reversed(list(shards.items())):
        if not written:
            raise DataError(f"no sample is left for {folder}")
        if listing.classes:
            index.replace(folder / CLASSES, _json(listing.classes))
        index.commit(folder, written, {"packed": about, **({"classes": listing.classes} if listing.classes else {})})


def _report(out: Path, problems: Sequence[Problem], total: int, max_broken: float) -> None:
    """Write what was met, and see whether it is too much.

    Raises:
        DataError: if so.
    """
    lines = [json.dumps({key: value for key, value in problem._asdict().items() if value}) for problem in problems]
    index.replace(out / REPORT, "".join(f"{line}\n" for line in lines).encode())
    broken = [line for problem, line in zip(problems, lines, strict=True) if problem.reason not in NOTES]
    if len(broken) > max_broken * total:
        more = [f"and {len(broken) - 10} more: {out / REPORT}"] if len(broken) > 10 else []
        enough = math.ceil(1000 * len(broken) / total) / 1000
        raise DataError(
            "\n  ".join([f"{len(broken):,} of {total:,} samples cannot be packed:", *broken[:10], *more])
            + f"\nmend the source and pack it anew, or go on without them: max_broken={enough:g}"
        )


@contextlib.contextmanager
def _alone(folders: Sequence[Path]) -> Iterator[None]:
    """Make the folders, where no other pack may write as long as this lasts."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{folder}: another dit pack writes there now") from error
            for path in folder.glob("*.tmp"):  # of one that was killed
                path.unlink()
        yield


def _tell(shards: Mapping[Path, Sequence[index.Shard]], problems: Sequence[Problem], report: Path) -> None:
    for folder, written in shards.items():
        print(f"{folder}: {sum(shard.samples for shard in written):,} samples in {len(written):,} shards")
    for said, noted in (("left out", False), ("noted", True)):
        counts = Counter(problem.reason for problem in problems if (problem.reason in NOTES) is noted)
        if counts or not noted:
            print(f"{said}: {', '.join(f'{count:,} {reason}' for reason, count in counts.most_common()) or 'nothing'}")
    if problems:
        print(f"each is named in {report}")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
