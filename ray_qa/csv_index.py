"""CSV files cut into parts whose rows are known by their exact 0-based positions.

Any size, read in parallel (`csv_scan`). Knows the columns' names, and nothing of what they mean, of models, or of
Ray: whoever calls says how the scans are run (`map_chunks`).

Whatever Python's `csv` would misread as well (a quote that is never closed, NUL bytes, bad UTF-8, records with more
or fewer fields than the header) is a CSVError that names file, record and byte.

A record ends at LF, CRLF or CR outside quotes; blank lines are not records; the header is the first line that is
not blank. Values are text: "" is "", and null, NA, None are words.

Memory: an index holds 16 bytes a part (1 TB in parts of 30 MB: 0.5 MB), and while it is made up to 64 MB of sampled
record starts; a worker holds one chunk, or one part and its parsed rows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ray_qa.csv_file import DELIMITERS, CSVFile, Opening, Part, open_file
from ray_qa.csv_scan import Integers, Stitched, Walk, num_scans, scan_chunk, scan_tasks, stitch, walk_file
from ray_qa.errors import InputError, OptionError
from ray_qa.storage import Location

CHUNK_BYTES = 32 << 20
PARTS_WANTED, MIN_PART_ROWS, MAX_PART_ROWS = 20_000, 256, 32_768
#: Files with long rows get fewer rows a part, so that a part is about this large at most.
MAX_PART_BYTES = 64 << 20
_MAX_GRANULES = 1 << 20
#: A part of a given number of bytes is cut to this share of it, about.
_GRANULES_OF_PART = 32
_ASSUMED_RATIO = 8  # of text to compressed bytes; only sets how finely record starts are sampled
MapChunks = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class CSVIndex:
    """Where every row of a list of CSV files lies. Parts are computed when asked for."""

    files: tuple[CSVFile, ...]
    num_rows: int
    digest: str
    """Of the content of all files in order, and of how they are read."""
    _first_parts: tuple[int, ...]  # of each file; one more at the end
    _part_starts: Integers
    _part_rows: Integers  # first row of each part, over all files

    @property
    def num_parts(self) -> int:
        return len(self._part_starts)

    @property
    def num_bytes(self) -> int:
        """Of the records' text, headers left out, decompressed."""
        return sum(file.body_end - file.body_start for file in self.files)

    def part(self, i: int) -> Part:
        """Part ``i``, in row order; IndexError beyond the last."""
        if not 0 <= i < self.num_parts:
            raise IndexError(f"part {i} of {self.num_parts}")
        file = bisect_right(self._first_parts, i) - 1
        is_last = i + 1 == self._first_parts[file + 1]
        start, first_row = int(self._part_starts[i]), int(self._part_rows[i])
        if is_last:
            end, end_row = self.files[file].body_end, self.files[file].first_row + self.files[file].num_rows
        else:
            end, end_row = int(self._part_starts[i + 1]), int(self._part_rows[i + 1])
        return Part(file, start, end, first_row, end_row - first_row)

    def parts(self) -> Iterator[Part]:
        return map(self.part, range(self.num_parts))

    def locate_row(self, row_index: int) -> tuple[str, int]:
        """URI of the file that holds a row, and the record's 0-based number in it."""
        if not 0 <= row_index < self.num_rows:
            raise IndexError(f"row {row_index} of {self.num_rows}")
        file = self.files[bisect_right(self.files, row_index, key=lambda file: file.first_row) - 1]
        return file.location.uri, row_index - file.first_row

    def __repr__(self) -> str:
        counts = f"{len(self.files)} files, {self.num_rows} rows, {self.num_parts} parts"
        return f"CSVIndex({counts}, {self.digest})"


def index_csv(
    locations: Sequence[Location], *, required_columns: Sequence[str], delimiter: str | None = None,
    chunk_bytes: int = CHUNK_BYTES, part_rows: int | None = None, part_bytes: int | None = None,
    map_chunks: MapChunks = map,
) -> CSVIndex:
    """Index CSV files, in the order given.

    Args:
        required_columns: names that each header must hold, in any order, among any others.
        delimiter: ",", ";" or "tab"; None takes it from each header.
        chunk_bytes: bytes that one call of a scan reads; no effect on the result.
        part_rows: rows in a part, about; None is clamp(rows / 20,000, 256, 32,768), fewer where rows are
            so long that the part would exceed 64 MiB. It depends on the input alone.
        part_bytes: bytes in a part, about, whatever its rows; not together with ``part_rows``.
        map_chunks: calls a function on each item, results in order; `map`, a pool's, or Ray's.
            Function, items and results can be pickled.

    Raises:
        CSVError: a file is not a CSV that can be read without doubt, or lacks a column.
        InputError: a file cannot be opened.
        OptionError: an argument is out of range.
    """
    if delimiter is not None and delimiter not in DELIMITERS:
        raise OptionError(f"delimiter is {delimiter!r}; allowed: {', '.join(map(repr, DELIMITERS))} or None")
    for name, value in (("chunk_bytes", chunk_bytes), ("part_rows", part_rows), ("part_bytes", part_bytes)):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value!r}; allowed: a whole number of at least 1")
    if part_rows is not None and part_bytes is not None:
        raise OptionError("part_rows and part_bytes are both given; allowed: one of them")
    if not locations:
        raise InputError("no input file was given; allowed: at least one CSV file")
    delimiters = tuple(DELIMITERS.values()) if delimiter is None else (DELIMITERS[delimiter],)
    opened = list(map_chunks(
        open_file, [Opening(location, tuple(required_columns), delimiters) for location in locations]
    ))

    if len(opened) != len(locations):
        raise ValueError(f"map_chunks gave {len(opened)} results for {len(locations)} files")
    text_bytes = sum(file.size * (_ASSUMED_RATIO if file.compression else 1) for file in opened)
    # Finer than this nobody needs to know where records start.
    finest = max((text_bytes - 1) // _MAX_GRANULES, ((part_bytes or 0) - 1) // _GRANULES_OF_PART, 0)
    granule = 1 << finest.bit_length()
    tasks = [task for file in opened for task in scan_tasks(file, granule, chunk_bytes)]
    scans = iter(map_chunks(scan_chunk, tasks))
    stitched = [
        stitch(file, [next(scans) for _ in range(num_scans(file, chunk_bytes))], granule, chunk_bytes)
        for file in opened
    ]
    irregular = [ordinal for ordinal, found in enumerate(stitched) if found.is_irregular]
    walks = map_chunks(walk_file, [Walk(stitched[i].file, granule, stitched[i].nul_at) for i in irregular])
    for ordinal, (starts, rows, num_rows) in zip(irregular, walks, strict=True):
        file = replace(stitched[ordinal].file, num_rows=num_rows, mode="serial")
        stitched[ordinal] = Stitched(file, starts, rows)
    return _cut(stitched, part_rows, part_bytes)


def _cut(stitched: Sequence[Stitched], part_rows: int | None, part_bytes: int | None) -> CSVIndex:
    num_rows = sum(found.file.num_rows for found in stitched)
    wanted = part_rows or min(max(-(-num_rows // PARTS_WANTED), MIN_PART_ROWS), MAX_PART_ROWS)
    if part_bytes is not None:
        wanted = max(1, num_rows)
    files: list[CSVFile] = []
    first_parts = [0]
    first_row = 0
    part_starts, part_first_rows = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    digest = hashlib.sha256()
    for found in stitched:
        file = replace(found.file, first_row=first_row)
        rows = wanted
        if part_rows is None:
            body_bytes = max(1, file.body_end - file.body_start)
            rows = max(1, min(wanted, file.num_rows * (part_bytes or MAX_PART_BYTES) // body_bytes))
        cuts = np.arange(0, file.num_rows, rows, dtype=np.int64)
        chosen = np.unique(np.searchsorted(found.rows, cuts, side="right") - 1)
        part_starts.append(found.starts[chosen])
        part_first_rows.append(found.rows[chosen] + first_row)
        first_parts.append(first_parts[-1] + chosen.size)
        first_row += file.num_rows
        files.append(file)
        digest.update(f"{file.digest} {file.body_end} {file.delimiter!r} {file.mode}\n".encode())
    return CSVIndex(
        tuple(files), num_rows, digest.hexdigest()[:32], tuple(first_parts),
        np.concatenate(part_starts), np.concatenate(part_first_rows),
    )
