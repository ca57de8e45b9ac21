"""Checkpoints of a training on storage: written beside the running loop, read whole or not at all.

A checkpoint is a folder ``step-<steps done>`` of safetensors files and, written last, ``checkpoint.json`` with
their sizes and the run's position. What lacks it, or has a file of another size, does not count. No pickle.

Knows nothing of what the tensors mean, of Ray, or of who decides when to save.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs as pafs
from safetensors.torch import load, load_file, save_file

from ray_qa.errors import OutputError, RayQAError
from ray_qa.storage import Location, cache_home

_LAST = "checkpoint.json"
_PREFIX = "step-"

#: Named groups of named tensors, one file each.
TensorGroups = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: ``step`` steps were done; ``position`` is what the writer told beside the tensors."""

    folder: Location
    step: int
    position: dict[str, Any]
    groups: tuple[str, ...]

    def read(self, group: str) -> dict[str, torch.Tensor]:
        """One group's tensors, in memory."""
        file = self.folder / f"{group}.safetensors"
        return load_file(file.path) if file.is_local else load(file.read_bytes().to_pybytes())


def find_checkpoints(folder: Location) -> list[Checkpoint]:
    """The complete checkpoints in ``folder``, oldest first."""
    found = []
    for info in folder.list():
        if info.type != pafs.FileType.Directory or not info.base_name.startswith(_PREFIX):
            continue
        inner = folder / info.base_name
        try:
            told = json.loads((inner / _LAST).read_bytes().to_pybytes())
        except FileNotFoundError:
            continue
        sizes = {child.base_name: child.size for child in inner.list()}
        if all(sizes.get(f"{name}.safetensors") == size for name, size in told["sizes"].items()):
            found.append(Checkpoint(inner, told["step"], told["position"], tuple(told["sizes"])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, and deletes the oldest beyond ``keep`` but one that is named.

    `save` copies the tensors and returns; the loop goes on while they are written.
    """

    def __init__(self, folder: Location, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: RayQAError | None = None

    def save(
        self, step: int, groups: TensorGroups, position: Mapping[str, Any], *, keep_step: int | None = None
    ) -> None:
        """Save the state after ``step`` steps; waits for an earlier save that is still being written.

        ``keep_step`` is a checkpoint to keep besides the newest.

        Raises:
            OutputError: the earlier save failed.
        """
        self.close()
        copies = {
            group: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        text = json.dumps(position)
        self._thread = threading.Thread(target=self._write, args=(step, copies, text, keep_step), daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether something is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Wait until what was saved is on storage.

        Raises:
            OutputError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self, step: int, groups: dict[str, dict[str, torch.Tensor]], position: str, keep_step: int | None
    ) -> None:
        try:
            target = self.folder / f"{_PREFIX}{step:012d}"
            sizes = {name: _write_tensors(tensors, target, name) for name, tensors in groups.items()}
            told = {"step": step, "sizes": sizes, "position": json.loads(position)}
            (target / _LAST).publish(json.dumps(told).encode())
            for old in find_checkpoints(self.folder)[: -self.keep]:
                if old.step == keep_step:
                    continue
                # First what makes it count.
                (old.folder / _LAST).delete()
                old.folder.filesystem.delete_dir(old.folder.path)
        except RayQAError as error:
            self._error = error
        except OSError as error:
            self._error = OutputError(f"{self.folder.uri}: a checkpoint cannot be written ({error})")


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Location, name: str) -> int:
    """Write one group; gives its size in bytes."""
    file = folder / f"{name}.safetensors"
    directory = Path(folder.path) if folder.is_local else cache_home() / "staged"
    directory.mkdir(parents=True, exist_ok=True)
    staged = directory / f"_{name}.{uuid.uuid4().hex}"
    try:
        save_file(tensors, staged)
        size = staged.stat().st_size
        if folder.is_local:
            with staged.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(staged, file.path)
        else:
            folder.filesystem.create_dir(folder.path, recursive=True)
            pafs.copy_files(
                str(staged), file.path, source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=folder.filesystem,
            )
    finally:
        staged.unlink(missing_ok=True)
    return size
