"""A model's files reach every node through Ray's object store, once per node.

The driver shares a folder; a worker asks for it and gets a local folder: the driver's own on the driver's
node, elsewhere a copy under the cache home, named by content and published by a rename. Only files that
are safe to load travel: safetensors, and the texts of configuration and tokenizer.

Knows nothing of what the files mean; the folder is one that `model.resolve_model` has checked.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import ray

from ray_qa.errors import OutputError
from ray_qa.storage import Location, cache_home

_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".py")


@dataclass(frozen=True)
class SharedModel:
    """A handle of a few hundred bytes; valid as long as the process that made it lives."""

    digest: str
    directory: str
    node_id: str
    files: dict[str, ray.ObjectRef[np.ndarray]]


def share_directory(directory: str | os.PathLike[str], digest: str) -> SharedModel:
    """Put the files of a model folder into the object store."""
    files = {
        file.name: ray.put(_mapped(file))
        for file in sorted(Path(directory).iterdir()) if file.is_file() and file.suffix in _SUFFIXES
    }
    return SharedModel(digest, os.path.abspath(directory), node_id(), files)


def _mapped(file: Path) -> np.ndarray:
    """The bytes of a file, read when they are used."""
    if file.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))


def node_id() -> str:
    """The node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def local_directory(shared: SharedModel) -> Path:
    """The shared files as a folder on this node."""
    if shared.node_id == node_id():
        return Path(shared.directory)
    target = cache_home() / "models" / shared.digest
    if not target.is_dir():
        _write_directory(target, shared.files)
    os.utime(target)
    return target


def _write_directory(target: Path, files: dict[str, ray.ObjectRef[np.ndarray]]) -> None:
    """All files, then a rename: several workers of a node may do this at once."""
    staged = target.with_name(f"_{target.name}.{uuid.uuid4().hex}")
    staged.mkdir(parents=True)
    try:
        for name, reference in files.items():
            ray.get(reference).tofile(staged / name)
        try:
            staged.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@dataclass(frozen=True)
class FinishedModel:
    """A model folder on the node of the worker that made it; with its bytes where the driver is elsewhere."""

    directory: str
    node_id: str
    files: dict[str, np.ndarray]


def hand_over(directory: Path, driver_node_id: str) -> FinishedModel:
    """What a worker returns to the driver for a folder that it wrote; only on the driver's node the folder stays."""
    here = node_id()
    files = {}
    if here != driver_node_id:
        files = {
            file.name: np.fromfile(file, dtype=np.uint8) for file in sorted(directory.iterdir()) if file.is_file()
        }
        shutil.rmtree(directory)
    return FinishedModel(os.fspath(directory), here, files)


def take_over(finished: FinishedModel, target: Location) -> None:
    """Write a finished model's files into ``target`` (in the driver); the worker's folder is used up.

    config.json comes last: a folder without it is no model.
    """
    source = Path(finished.directory)
    names = sorted(finished.files or os.listdir(source), key=lambda name: (name == "config.json", name))
    if target.is_local:
        Path(target.path).mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            if finished.files:
                (target / name).publish(pa.py_buffer(finished.files[name]))
            elif target.is_local:
                shutil.move(source / name, Path(target.path, name))
            else:
                pafs.copy_files(
                    str(source / name), (target / name).path,
                    source_filesystem=pafs.LocalFileSystem(), destination_filesystem=target.filesystem,
                )
        except OSError as error:
            raise OutputError(f"{(target / name).uri}: cannot be written ({error})") from error
    if not finished.files:
        shutil.rmtree(source, ignore_errors=True)

