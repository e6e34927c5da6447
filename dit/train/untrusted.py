"""Checkpoints as files from a stranger: whatever they hold, reading them runs no code and follows no path.

torch.distributed.checkpoint (DCP) keeps in `.metadata` which tensor lies where, as a pickle, and reads it with
`pickle.load`, which runs what a crafted one names. Here it becomes names and numbers, which are checked, and of which
the metadata are made anew. The tensors are read by torch with `weights_only=True`.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

PACKAGE = "torch.distributed.checkpoint"
RECORDS = {
    (f"{PACKAGE}.metadata", name)
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
} | {(f"{PACKAGE}.filesystem", "_StorageInfo")}
PLAIN = {  # what else DCP pickles, and what it is read as: its arguments are then the whole of it
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (f"{PACKAGE}.metadata", "_MEM_FORMAT_ENCODING"): int,
}


class Reader(FileSystemReader):
    """DCP's reader of a folder, with metadata that were checked.

    Args:
        path: the checkpoint.
        files: the bytes of each of its files, beyond which nothing is read.

    Raises:
        ValueError: if its `.metadata` is not what DCP writes for tensors in these files.
    """

    def __init__(self, path: Path, files: Mapping[str, int]):
        super().__init__(path)
        self.metadata = read_metadata(path / ".metadata", files)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was checked, and no other file of the folder."""
        return self.metadata


def read_metadata(path: Path, files: Mapping[str, int]) -> Metadata:
    """The contents of a `.metadata` of nothing but tensors, each of which lies whole in the given files.

    Args:
        path: the file.
        files: the bytes of each file of the checkpoint.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        with path.open("rb") as file:
            unpickler = _Unpickler(file)
            return _made_anew(unpickler.load(), unpickler.kinds, files)
    except Exception as error:  # unpickling garbage raises many kinds
        raise ValueError(f"{path.name} is not that of a checkpoint of tensors: {error}") from error


class _Record:
    """Stands for an object of the pickle: has its state, and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows six classes, for which records stand, three functions of plain values, and the dtypes."""

    def __init__(self, file: Any):
        super().__init__(file)
        # Classes of this reading alone, since a pickle can set attributes of a class it names.
        self.kinds: dict[str, type[_Record]] = {name: type(name, (_Record,), {}) for _, name in RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            return self.kinds[name]
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} has no place there")


def _made_anew(found: Any, kinds: Mapping[str, type[_Record]], files: Mapping[str, int]) -> Metadata:
    """The metadata that records stand for, of checked names and numbers."""

    def fields(record: Any, kind: str) -> Any:
        if type(record) is not kinds[kind]:
            raise ValueError(f"a {type(record).__name__} in the place of a {kind}")
        return record.state

    whole = fields(found, "Metadata")
    storage = {}
    for key, value in whole["storage_data"].items():
        index, place = fields(key, "MetadataIndex"), fields(value, "_StorageInfo")
        if place.keys() != {"relative_path", "offset", "length"}:
            raise ValueError(f"{_text(index['fqn'])} is transformed")
        name, (offset, length) = _text(place["relative_path"]), _numbers((place["offset"], place["length"]))
        if offset + length > files.get(name, 0):
            raise ValueError(f"{index['fqn']} is said to lie in {name[:80]}, outside of the checkpoint's files")
        storage[MetadataIndex(_text(index["fqn"]), _numbers(index["offset"]))] = _StorageInfo(name, offset, length)
    if sum(place.length for place in storage.values()) > sum(files.values()):
        raise ValueError("more bytes than the files have")

    tensors: dict[str, Any] = {}
    for name, value in whole["state_dict_metadata"].items():
        tensor = fields(value, "TensorStorageMetadata")
        dtype, size = fields(tensor["properties"], "TensorProperties")[0], _numbers(tensor["size"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{_text(name)} has no dtype")
        parts = [fields(chunk, "ChunkStorageMetadata") for chunk in tensor["chunks"]]
        chunks = [ChunkStorageMetadata(_numbers(part["offsets"]), _numbers(part["sizes"])) for part in parts]
        for chunk in chunks:
            ends = [sum(pair) for pair in zip(chunk.offsets, chunk.sizes, strict=True)]
            if any(end > most for end, most in zip(ends, size, strict=True)):
                raise ValueError(f"{name} has a part outside of it")
            if math.prod(chunk.sizes) * dtype.itemsize > storage[MetadataIndex(name, chunk.offsets)].length:
                raise ValueError(f"{name} has a part larger than its place")
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise ValueError(f"{name} is not whole")
        tensors[_text(name)] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
    return Metadata(tensors, storage_data=storage)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a {type(value).__name__} in the place of a name")
    return value


def _numbers(values: Any) -> torch.Size:
    if type(values) is not tuple or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"a {type(values).__name__} in the place of sizes")
    return torch.Size(values)
