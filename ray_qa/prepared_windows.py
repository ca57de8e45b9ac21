"""Prepared windows opened on a worker: memory-mapped from its node's disk, picked by index.

Knows nothing of models, steps or ranks.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from ray_qa import schema
from ray_qa.errors import WorkError
from ray_qa.preparation import Prepared
from ray_qa.storage import cache_home
from ray_qa.windows import Windows


class PreparedWindows:
    """All windows of a preparation, memory-mapped from this node's disk; opened shard by shard, when needed.

    ``lengths`` is int32[num_windows].
    """

    def __init__(self, prepared: Prepared) -> None:
        self._directory = stage(prepared)
        self._shards = [shard for shard in prepared.shards if shard.num_windows]
        self._first = np.cumsum([0, *(shard.num_windows for shard in self._shards)])
        self._open: dict[int, tuple[Windows, np.ndarray]] = {}
        lengths = [self._table(shard.name).column("length").to_numpy() for shard in self._shards]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)

    def _table(self, name: str) -> Any:
        from datasets import Dataset

        return Dataset.from_file(str(self._directory / name)).data.table

    def _shard(self, number: int) -> tuple[Windows, np.ndarray]:
        if number not in self._open:
            table = self._table(self._shards[number].name)
            self._open[number] = (Windows.from_table(table), table.column(schema.ROW_INDEX).to_numpy())
        return self._open[number]

    def select(self, indices: np.ndarray) -> tuple[Windows, np.ndarray]:
        """The windows at ``indices`` in that order, and the row of the input that each comes from."""
        numbers = np.searchsorted(self._first, indices, side="right") - 1
        pieces, rows, places = [], [], []
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            windows, row_index = self._shard(number)
            local = indices[at] - self._first[number]
            pieces.append(windows.select(local))
            rows.append(row_index[local])
            places.append(at)
        if not pieces:
            return _NO_WINDOWS, np.zeros(0, np.int64)
        order = np.argsort(np.concatenate(places), kind="stable")
        return concatenate(pieces).select(order), np.concatenate(rows)[order]


def concatenate(pieces: Sequence[Windows]) -> Windows:
    """Labelled windows of several shards, one after the other."""
    if len(pieces) == 1:
        return pieces[0]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(piece, name) for piece in pieces])

    lengths = np.concatenate([np.diff(piece.splits) for piece in pieces])
    return Windows(
        row=joined("row"), input_ids=joined("input_ids"), splits=np.concatenate([[0], np.cumsum(lengths)]),
        question_length=joined("question_length"), context_length=joined("context_length"),
        context_offset=joined("context_offset"), start_position=joined("start_position"),
        end_position=joined("end_position"),
    )


_NONE = np.zeros(0, np.int32)
_NO_WINDOWS = Windows(
    row=_NONE, input_ids=_NONE, splits=np.zeros(1, np.int64), question_length=_NONE, context_length=_NONE,
    context_offset=_NONE, start_position=_NONE, end_position=_NONE,
)


def stage(prepared: Prepared) -> Path:
    """The shards as files on this node: where they lie if that is a disk, else a copy under the cache home.

    Several workers of a node may come at once: each shard is copied beside its place and renamed.

    Raises:
        WorkError: the node's disk has no room for them.
    """
    if prepared.folder.is_local:
        return Path(prepared.folder.path)
    directory = cache_home() / "staged" / prepared.key
    directory.mkdir(parents=True, exist_ok=True)
    present = {file.name: file.stat().st_size for file in directory.iterdir()}
    missing = [shard for shard in prepared.shards if present.get(shard.name) != shard.num_bytes]
    needed, free = sum(shard.num_bytes for shard in missing), shutil.disk_usage(directory).free
    if needed > free:
        raise WorkError(
            f"{directory}: the prepared windows need {needed:,} bytes on this node's disk, and {free:,} are "
            "free; make room, or let RAY_QA_HOME name a larger disk"
        )
    for shard in missing:
        staged = directory / f"_{shard.name}.{uuid.uuid4().hex}"
        pafs.copy_files(
            (prepared.folder / shard.name).path, str(staged),
            source_filesystem=prepared.folder.filesystem, destination_filesystem=pafs.LocalFileSystem(),
        )
        os.replace(staged, directory / shard.name)
    os.utime(directory)  # used, see `storage.prune_cache`
    return directory
