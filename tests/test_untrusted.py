"""Checkpoints that were made to do harm, their manifests put right: nothing that they name is run, made or read."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointing import tensors
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from dit.train import checkpoint, saved
from dit.train.checkpoint import CheckpointError, Saver
from dit.train.run import Run
from dit.weights import convert

FILE = "__0_0.distcp"


class Touch:
    """Pickled, a call of Path(marker).touch()."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class Call:
    """Pickled, a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


@pytest.fixture
def path(tmp_path):
    """A checkpoint, which the test then changes."""
    Saver(tmp_path / "checkpoints").save(1, tensors(1, 10), {"step": 1}, wait=True)
    return tmp_path / "checkpoints" / "step-00000001"


def seal(path, *more):
    """Make the manifest agree with the files."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in {*manifest["files"], *more}:
        manifest["files"][name] = checkpoint.fingerprint(path / name)
    (path / "manifest.json").write_text(checkpoint.sealed(manifest))


def rewrite(path, change):
    """Change the metadata as DCP has them."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    seal(path)


def refused(path, message):
    """The checkpoint is passed over, and cannot be read otherwise either."""
    assert message in checkpoint.verify(path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.newest(path.parent)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_weights(path, "model")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_into(path, tensors(1, 10))


def test_the_exploits_do_harm_where_they_are_let(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda marker: (Path.touch, marker),
        lambda marker: (os.system, f"touch {marker}"),
        lambda marker: (eval, f"__import__('os').system('touch {marker}')"),
        lambda marker: (getattr, Path(marker), "touch"),
        lambda marker: (torch.load, str(marker)),
        lambda marker: (torch.hub.load, str(marker), "model"),
        lambda marker: (__import__, "dit"),
    ],
    ids=["touch", "system", "eval", "getattr", "load", "hub", "import"],
)
def test_metadata_that_call_are_not_called(path, marker, call):
    for exploit in (Call(*call(marker)), [Call(*call(marker))]):
        (path / ".metadata").write_bytes(pickle.dumps(exploit))
        seal(path)
        refused(path, "has no place there")


def test_an_exploit_within_true_metadata_is_not_called(path, marker):
    rewrite(path, lambda metadata: setattr(metadata, "planner_data", Touch(marker)))
    refused(path, "has no place there")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_exploits_of_any_protocol(path, marker, protocol):
    (path / ".metadata").write_bytes(pickle.dumps(Touch(marker), protocol))
    seal(path)
    refused(path, ".metadata is not that of a checkpoint of tensors")


def test_attributes_of_classes_stay(path):
    # BUILD on a class sets its attributes: here of Metadata, which the pickle names.
    state = b"\x80\x02c" + b"torch.distributed.checkpoint.metadata\nMetadata\n" + b"N}X\x07\x00\x00\x00versionX\x04\x00"
    (path / ".metadata").write_bytes(state + b"\x00\x00evils\x86b.")
    seal(path)
    refused(path, ".metadata is not that of a checkpoint of tensors")
    assert Metadata.version is None


def test_bytes_that_dcp_would_unpickle_are_refused(path, marker):
    file = io.BytesIO()
    torch.save(Touch(marker), file)
    (path / FILE).write_bytes(file.getvalue())

    def change(metadata):
        for name in metadata.state_dict_metadata:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data = {
            MetadataIndex(name): _StorageInfo(FILE, 0, len(file.getvalue())) for name in metadata.state_dict_metadata
        }

    rewrite(path, change)
    refused(path, "BytesStorageMetadata has no place there")


def test_pickles_in_the_place_of_tensors_are_not_read(path, marker):
    file = io.BytesIO()
    torch.save(Touch(marker), file)
    size = (path / FILE).stat().st_size
    (path / FILE).write_bytes(file.getvalue() + bytes(size))

    def change(metadata):
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(file.getvalue())

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"cannot be read \(UnpicklingError: Weights only load failed\)"):
        checkpoint.load_weights(path, "model")
    (path / FILE).write_bytes(pickle.dumps(Touch(marker)) + bytes(size))  # the format before zip files
    seal(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_weights(path, "model")


@pytest.mark.parametrize("where", ["../../secret", "{}/secret", "secret", "../step-00000001/__0_0.distcp", "link"])
def test_only_files_of_the_checkpoint_are_read(path, tmp_path, where):
    shutil.copy(path / FILE, tmp_path / "secret")
    (path / "link").symlink_to(tmp_path / "secret")

    def change(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = where.format(tmp_path)

    rewrite(path, change)
    refused(path, "outside of the checkpoint's files")
    seal(path, *([] if "/" in where or where == "secret" else [where]))
    assert checkpoint.verify(path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][where.format(tmp_path)] = checkpoint.fingerprint(tmp_path / "secret")
    (path / "manifest.json").write_text(checkpoint.sealed(manifest))
    assert "is missing" in checkpoint.verify(path)


def every(group, **values):
    """A change of each entry of a group of metadata."""

    def change(metadata):
        entries = metadata.storage_data if group == "storage" else metadata.state_dict_metadata
        for entry in entries.values():
            for name, value in values.items():
                setattr(entry, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (every("storage", transform_descriptors=["stream.zstd/1"]), "is transformed"),
        (every("storage", offset=-1), "in the place of sizes"),
        (every("storage", offset=10**12), "outside of the checkpoint's files"),
        (every("storage", length=True), "in the place of sizes"),
        (every("storage", relative_path=b"__0_0.distcp"), "in the place of a name"),
        (every("tensors", size=torch.Size([10**12])), "is not whole"),
        (every("tensors", chunks=[]), "is not whole"),
        (every("tensors", chunks=3), "not iterable"),
        (every("tensors", size="10"), "in the place of sizes"),
        (lambda metadata: metadata.storage_data.clear(), "MetadataIndex"),
        (lambda metadata: {"state_dict_metadata": {}}, "in the place of a Metadata"),
        (lambda metadata: torch.float32, "in the place of a Metadata"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", None), ".metadata is not"),
    ],
)
def test_metadata_of_impossible_tensors_are_refused(path, change, message):
    rewrite(path, change)
    refused(path, message)


def test_sizes_that_would_fill_memory_are_refused(path):
    def change(metadata):
        for entry in metadata.state_dict_metadata.values():
            entry.size = torch.Size([10**12])
            for chunk in entry.chunks:
                chunk.sizes, chunk.offsets = torch.Size([10**12]), torch.Size([0])

    rewrite(path, change)
    refused(path, "has a part larger than its place")


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_what_is_json_is_read_as_json(path, marker, name):
    for data in (pickle.dumps(Touch(marker)), b'{"__reduce__": ["os.system", "touch marker"]}', b"[" * 10**6):
        (path / name).write_bytes(data)
        if name == "state.json":
            seal(path)
            if data[:1] == b"{":
                assert checkpoint.load_state(path) == {"__reduce__": ["os.system", "touch marker"]}
                continue
        assert checkpoint.verify(path)
        with pytest.raises(CheckpointError):
            checkpoint.newest(path.parent)


def test_files_of_other_formats_are_left_alone(config, marker):
    """What was a part of checkpoints before, or is elsewhere."""
    assert Run(config("trainer.max_steps=2")).fit() is None
    folder = Path(config().runs_dir) / "digits"
    path = checkpoint.newest(folder / "checkpoints")
    array = np.empty(1, dtype=object)
    array[0] = Touch(marker)
    for name in ("run.pt", "optimizer.pt", "rng.pt", "meta.pt", "__0.metadata", "model.safetensors"):
        torch.save(Touch(marker), path / name)
        (path / f"{name}.pkl").write_bytes(pickle.dumps(Touch(marker)))
    np.savez(path / "state.npz", array, allow_pickle=True)
    torch.save(Touch(marker), path.parent / "latest")
    (path.parent / "latest").unlink()
    (path.parent / "latest").write_text("../../elsewhere\n")
    seal(path, "run.pt", "__0.metadata", "state.npz")
    assert Run(config("trainer.max_steps=3")).fit() is None
    (folder / "config.yaml").write_text(tagged((folder / "config.yaml").read_text(), TAGS[0], marker))
    with pytest.raises(ValueError, match="is damaged"):
        Run(config("trainer.max_steps=4"))


TAGS = ["python/object/apply:pathlib.Path.touch", "python/object/new:pathlib.Path.touch"]


def tagged(text, tag, marker):
    return f"{text}\nevil: !!{tag} [!!python/object/apply:pathlib.Path ['{marker}']]\n"


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_the_configuration_of_a_run_are_not_called(tmp_path, marker, tag):
    (tmp_path / "config.yaml").write_text(tagged("\n".join(f"{group}: {{}}" for group in saved.NEEDED), tag, marker))
    with pytest.raises(ValueError, match="is damaged"):
        saved.config(tmp_path)


@pytest.mark.parametrize("suffix", convert.SUFFIXES)
def test_foreign_weights_are_read_without_what_they_call(tmp_path, marker, suffix):
    file = tmp_path / f"evil{suffix}"
    for write in (
        lambda: torch.save({"model": {"a": torch.zeros(1)}, "opt": Touch(marker)}, file),
        lambda: torch.save(Touch(marker), file, _use_new_zipfile_serialization=False),
        lambda: file.write_bytes(pickle.dumps(Touch(marker))),
    ):
        write()
        with pytest.raises(ValueError, match=r"holds pickled objects|cannot be read as weights"):
            convert.read(file)


def test_a_folder_of_foreign_weights_leads_nowhere_else(tmp_path, marker):
    torch.save(Touch(marker), tmp_path / "evil.bin")
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(tmp_path / "evil.bin", tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pickled objects|cannot be read as weights"):
        convert.read(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    index = tmp_path / convert.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "evil.bin"}}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        convert.read(tmp_path)
