"""Right answers that rows with the same context and question share.

Some files write a row for every annotator. Which rows repeat is found from 64 bits of every row; the answers of those
alone are then gathered, in one table that is looked up by 128 bits. Knows texts, not files or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

KeyArray = npt.NDArray[np.bytes_]

_SHARED = pa.schema(
    [pa.field("key", pa.binary(16), nullable=False), pa.field("golds", pa.list_(pa.string()), nullable=False)]
)


def row_keys(contexts: Sequence[str], questions: Sequence[str]) -> KeyArray:
    """Of each row 16 bytes that are equal where context and question are."""
    keys = []
    for context, question in zip(contexts, questions, strict=True):
        text = context.encode()
        start = len(text).to_bytes(8, "little")  # where one ends and the other begins
        keys.append(hashlib.blake2b(start + text + question.encode(), digest_size=16).digest())
    return np.array(keys, "S16")


def short_keys(keys: KeyArray) -> npt.NDArray[np.uint64]:
    """The first half of each key."""
    return np.frombuffer(keys.tobytes(), np.uint64)[::2]


def repeated(short: Iterable[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """Short keys, ascending, that more than one row of all parts has; needs 16 bytes a row for a while."""
    joined = np.concatenate([np.zeros(0, np.uint64), *short])
    joined.sort()
    again = joined[1:] == joined[:-1]
    return np.unique(joined[1:][again])


def select_repeated(keys: KeyArray, wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.integer[Any]]:
    """The places in ``keys`` whose short key is among ``wanted``, which is ascending."""
    return np.flatnonzero(np.isin(short_keys(keys), wanted))


def shared_golds(found: Iterable[tuple[bytes, Sequence[str]]]) -> pa.Table:
    """The table for `add_shared`, of keys and the right answers of single rows, in the order in which they count.

    A key's answers are those of all its rows, each once; "" (there is no answer) only where no row has another.
    """
    gathered: dict[bytes, dict[str, None]] = {}
    for key, golds in found:
        gathered.setdefault(key, {}).update(dict.fromkeys(golds))
    keys = sorted(gathered)
    answers = [[gold for gold in gathered[key] if gold.strip()] or [""] for key in keys]
    return pa.table({"key": pa.array(keys, pa.binary(16)), "golds": answers}, schema=_SHARED).combine_chunks()


def add_shared(golds: list[list[str]], keys: KeyArray, shared: pa.Table) -> list[list[str]]:
    """``golds`` of rows with these ``keys``, and for rows that repeat what all their rows share, their own first."""
    if not len(shared) or not len(keys):
        return golds
    (chunk,) = shared["key"].chunks
    sorted_keys = np.frombuffer(chunk.buffers()[1], "S16")[chunk.offset : chunk.offset + len(chunk)]
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    joined = list(golds)
    for row in np.flatnonzero(sorted_keys[place] == keys).tolist():
        further = shared["golds"][int(place[row])].as_py()
        joined[row] = [gold for gold in dict.fromkeys([*golds[row], *further]) if gold.strip()] or [""]
    return joined
