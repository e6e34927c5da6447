"""What `dit pack` reads: a folder of images, tars of other tools, or a data set of Hugging Face's, all alike."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dit.data import columns
from dit.data.parallel import each
from dit.data.scan import scan

IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")  # names of files that are taken for images
NOTES = ("duplicate", "not an image", "hidden", "told again", "an empty class")  # reasons that cost no sample


class Sample(NamedTuple):
    """What is known of a sample before it is read."""

    source: str  # what the report calls it
    bytes: int  # of its image
    where: Any = None  # how its input finds it, if not by that name
    label: int | None = None
    caption: str | None = None


class Problem(NamedTuple):
    """A line of the report."""

    reason: str
    source: str
    detail: str = ""
    key: str = ""


class Listing(NamedTuple):
    """What there is to pack."""

    samples: list[Sample]
    problems: list[Problem]
    classes: list[str] | None  # their names, where they have any


class Input(Protocol):
    """Where samples come from; small, since every process gets one."""

    def listing(self, num_workers: int) -> Listing:
        """All samples, in an order that depends on nothing but what is there."""

    def files(self, sample: Sample) -> tuple[bytes, dict[str, bytes]]:
        """The image of a sample, and its other files by their extension."""


def input_of(sources: Sequence[Path], captions: str | None, classes: bool | str, wanted: Mapping[str, str]) -> Input:
    """The input that a folder, or tars, are.

    Args:
        sources: a folder of images or tars, a data set, or tars.
        captions: a file of them; `txt`, a file beside each image; or None.
        classes: whether the first sub-folders are classes; `auto`: unless there are captions.
        wanted: which columns are the image, caption and label, where their names do not tell.

    Raises:
        ValueError: if there is no such thing, or an option does not go with it.
    """
    if classes not in ("auto", True, False):
        raise ValueError(f"classes={classes}: choose one of auto, true, false")
    for path in sources:
        if not path.exists():
            raise ValueError(f"source={path} does not exist: give a folder of this machine")
    if all(path.suffix == ".tar" and path.is_file() for path in sources):
        chosen: Input = Tars(sources)
    elif len(sources) > 1 or not sources[0].is_dir():
        raise ValueError(f"source={', '.join(map(str, sources))}: give one folder, or tars")
    else:
        [folder] = sources
        here = {path.name: path for path in folder.iterdir()}
        tars = sorted(name for name in here if name.endswith(".tar"))
        if "dataset_dict.json" in here:
            splits = ", ".join(sorted(name for name, path in here.items() if path.is_dir()))
            raise ValueError(f"source={folder} has several splits, {splits}: give one of these folders")
        if {"state.json", "dataset_info.json"} <= here.keys():
            chosen = Rows(folder, wanted)
        elif not tars:
            return Folder(folder, captions, classes, wanted)
        elif images := sorted(name for name in here if _is_image(name)):
            raise ValueError(f"source={folder} holds tars and images, like {images[0]}: keep them in two folders")
        else:
            chosen = Tars([folder / name for name in tars])
    if captions is not None or classes != "auto":
        raise ValueError("captions and classes are for a folder of images, which the source is not")
    return chosen


class Folder:
    """Images in a folder and below, with the classes of its first sub-folders, or captions and labels from files."""

    def __init__(self, source: Path, captions: str | None, classes: bool | str, wanted: Mapping[str, str]):
        self.source, self.wanted, self.beside = source, wanted, captions == "txt"
        self.captions = None
        if captions is not None and not self.beside:
            self.captions = next((path for path in (Path(captions), source / captions) if path.is_file()), None)
            if self.captions is None:
                raise ValueError(f"captions={captions} does not exist, nor is it in {source}")
        self.classes = classes is True or (classes == "auto" and captions is None)
        if self.classes and self.captions:
            raise ValueError(
                f"classes=true goes with captions=txt, but {self.captions} says itself what has which label"
            )

    def listing(self, num_workers: int) -> Listing:
        """Images, sorted by their paths."""
        del num_workers
        sizes, problems = _files(self.source)
        used = {os.path.relpath(self.captions, self.source)} if self.captions else set()
        told, names = _told(self.captions, self.wanted, sizes, problems) if self.captions else (None, None)
        labels: dict[str, int] = {}
        if self.classes:
            labels, names = _class_folders(self.source, sizes, problems)
        samples = []
        for path, size in sizes.items():
            text = os.path.splitext(path)[0] + ".txt"
            if not _is_image(path):
                continue
            if (told is not None and path not in told) or (self.beside and text not in sizes):
                problems.append(Problem("no caption", path, "it is not named" if told else f"there is no {text}"))
                continue
            label, caption = told[path] if told else (labels.get(path.split(os.sep)[0]), None)
            samples.append(Sample(path, size, text if self.beside else None, label, caption))
            used.add(text if self.beside else "")
        problems += [Problem("not an image", path) for path in sizes if not _is_image(path) and path not in used]
        return Listing(samples, problems, names)

    def files(self, sample: Sample) -> tuple[bytes, dict[str, bytes]]:
        """The image; class and caption."""
        others = _others(sample)
        if sample.where:
            others["txt"] = (self.source / sample.where).read_bytes().strip()
        return (self.source / sample.source).read_bytes(), others


class Tars:
    """Shards that any tool wrote; samples get new keys, all their other files are kept."""

    def __init__(self, shards: Sequence[Path]):
        self.shards = list(shards)

    def listing(self, num_workers: int) -> Listing:
        """Samples, shard by shard as they stand there."""
        samples: list[Sample] = []
        problems = []
        several = len({path.parent for path in self.shards}) > 1
        scanned = each(scan, self.shards, num_workers, "tars read")
        for path, (table, damages) in zip(self.shards, scanned, strict=True):
            shown = str(path) if several else path.name
            problems += [Problem("damaged", f"{shown}/{damage.sample}", damage.reason) for damage in damages]
            for key, offsets, sizes in zip(table.keys, table.offsets.tolist(), table.sizes.tolist(), strict=True):
                name = f"{shown}/{key.decode()}"
                places = dict(zip(table.extensions, zip(offsets, sizes, strict=True), strict=True))
                places = {extension: place for extension, place in places.items() if place[0] >= 0}
                images = [extension for extension in places if extension in IMAGES]
                if len(images) != 1:
                    problems.append(Problem("damaged", name, f"it has {len(images)} images of its {len(places)} files"))
                    continue
                size = places[images[0]][1]
                samples.append(Sample(name, size, (str(path.resolve()), places, images[0])))
        for extension, what in (("cls", "no class"), ("txt", "no caption")):
            lacking = [sample for sample in samples if extension not in sample.where[1]]
            if 0 < len(lacking) < len(samples):
                problems += [Problem(what, sample.source, "others have one") for sample in lacking]
                samples = [sample for sample in samples if extension in sample.where[1]]
        names = self.shards[0].parent / "classes.json"  # of an earlier pack
        return Listing(samples, problems, json.loads(names.read_bytes()) if names.exists() else None)

    def files(self, sample: Sample) -> tuple[bytes, dict[str, bytes]]:
        """The image, and all others."""
        path, places, image = sample.where
        others = {}
        with open(path, "rb") as file:
            for extension, (offset, size) in places.items():
                file.seek(offset)
                others[extension] = file.read(size)
        return others.pop(image), others


class Rows:
    """A data set of Hugging Face's, as `save_to_disk` writes it."""

    def __init__(self, source: Path, wanted: Mapping[str, str]):
        self.source, self.wanted = source, wanted
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{source} is read with datasets: pip install 'ditforge[datasets]'") from error

    def listing(self, num_workers: int) -> Listing:
        """Rows, in their order."""
        del num_workers
        import pyarrow.compute as arrow
        from datasets import ClassLabel, Image

        rows, (image, label, _) = self._rows
        images = rows.data.column(image)
        data = arrow.struct_field(images, "bytes") if isinstance(rows.features[image], Image) else images
        sizes = arrow.binary_length(data).to_pylist()
        samples, names = [Sample(f"row {row}", size or 0, row) for row, size in enumerate(sizes)], None
        if label:
            labels, names = columns.numbered(rows.data.column(label).to_pylist())
            samples = [sample._replace(label=number) for sample, number in zip(samples, labels, strict=True)]
            names = rows.features[label].names if isinstance(rows.features[label], ClassLabel) else names
        return Listing(samples, [], names)

    def files(self, sample: Sample) -> tuple[bytes, dict[str, bytes]]:
        """The image; class and caption."""
        rows, (image, _, caption) = self._rows
        row = rows[sample.where]
        data = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
        return data or b"", _others(sample._replace(caption=caption and (row[caption] or "")))

    def __getstate__(self) -> dict[str, Any]:
        """Without the data set, which every process opens anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_rows"}

    @functools.cached_property
    def _rows(self) -> tuple[Any, tuple[str, str | None, str | None]]:
        """The data set, whose images are not decoded, and its columns of image, label and caption."""
        from datasets import ClassLabel, Image, load_from_disk

        rows = load_from_disk(str(self.source))
        features = rows.features
        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        images = images or [name for name, feature in features.items() if getattr(feature, "dtype", "") == "binary"]
        if (wanted := self.wanted.get("image")) is not None:
            images = [name for name in images if name == wanted]
        if len(images) != 1:
            raise ValueError(
                f"{self.source} has {len(images)} columns of images{f' named {wanted}' if wanted else ''}; of its "
                f"columns ({', '.join(features)}) give columns.image="
            )
        [image] = images
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        label = columns.column("label", features, self.wanted) or (labels[0] if len(labels) == 1 else None)
        caption = columns.column("caption", features, self.wanted)
        if isinstance(features[image], Image):
            rows = rows.cast_column(image, Image(decode=False))
        kept = [name for name in (image, label, caption) if name is not None]
        return rows.select_columns(kept).with_format(None), (image, label, caption)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES


def _others(sample: Sample) -> dict[str, bytes]:
    """The class and caption; a caption that is not Unicode stays none, and is refused later."""
    files = {} if sample.label is None else {"cls": b"%d" % sample.label}
    return files if sample.caption is None else {**files, "txt": sample.caption.strip().encode(errors="surrogatepass")}


def _files(source: Path) -> tuple[dict[str, int], list[Problem]]:
    """The size in bytes of every plain file by its path, sorted; links out of the source, or to folders, are left."""
    found, problems, folders = {}, [], [""]
    inside = source.resolve()
    while folders:
        folder = folders.pop()
        for entry in os.scandir(source / folder):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                problems.append(Problem("hidden", path))
            elif entry.is_symlink() and (entry.is_dir() or not Path(entry.path).resolve().is_relative_to(inside)):
                problems.append(Problem("a link", path, "it leads out of the source, or to a folder"))
            elif entry.is_dir():
                folders.append(path)
            elif entry.is_file():
                found[path] = entry.stat().st_size
            else:
                problems.append(Problem("not an image", path, "it is no plain file"))
    return dict(sorted(found.items())), sorted(problems)


def _class_folders(
    source: Path, sizes: Mapping[str, int], problems: list[Problem]
) -> tuple[dict[str, int], list[str] | None]:
    """The number of each first sub-folder, sorted by name, and these names."""
    names = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [name for name in names if not (source / name).is_symlink()]
    images = [path for path in sizes if _is_image(path)]
    filled = {path.split(os.sep)[0] for path in images if os.sep in path}
    if filled and (beside := next((path for path in images if os.sep not in path), None)):
        raise ValueError(
            f"{source} has images in sub-folders, their classes, and others beside these, like {beside}: give them a "
            "sub-folder, too, or pack all without classes, classes=false"
        )
    if not filled:
        return {}, None
    problems += [Problem("an empty class", name) for name in names if name not in filled]
    return {name: number for number, name in enumerate(names)}, names


def _told(
    path: Path, wanted: Mapping[str, str], sizes: Mapping[str, int], problems: list[Problem]
) -> tuple[dict[str, tuple[int | None, str | None]], list[str] | None]:
    """The label and caption that a file has for each image, and the names of the labels if they are not numbers."""
    rows = columns.table(path)
    names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
    image, caption, label = (columns.column(kind, names, wanted) for kind in ("image", "caption", "label"))
    if image is None or caption is label is None:
        lacking, kind = ("the images' files", "image") if image is None else ("captions or labels", "caption")
        listed = ", ".join(names) or "none"
        raise ValueError(f"captions={path} has no column of {lacking}; of its columns ({listed}) give columns.{kind}=")
    files = [os.path.normpath(str(row.get(image))) for row in rows]
    if absent := [file for file in files if file not in sizes]:
        raise ValueError(
            f"captions={path} names {len(absent)} files that are not in the source, like "
            f"{', '.join(map(ascii, absent[:3]))}: paths are relative to the source"
        )
    labels: list[int | None] = [None] * len(rows)
    classes = None
    if label:
        labels[:], classes = columns.numbered([row.get(label) for row in rows])
    told: dict[str, tuple[int | None, str | None]] = {}
    for file, number, row in zip(files, labels, rows, strict=True):
        said = row.get(caption) if caption else None
        said = said if isinstance(said, list) and said else [said]
        texts = [text if isinstance(text, str) else "" for text in said]  # an empty one is refused when it is packed
        if file not in told:
            told[file] = (number, texts[0] if caption else None)
            texts = texts[1:]
        problems += [Problem("told again", file, text[:200] or f"label {number}") for text in texts]
    return told, classes
