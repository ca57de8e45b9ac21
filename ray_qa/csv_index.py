"""Where the records of CSV files begin and end; files cut into parts; a part parsed to rows.

Any size, read in parallel, quote-aware, with every record's exact 0-based position. Knows the
columns' names, and nothing of what they mean, of models, or of Ray: whoever calls says how the scans
are run (`map_chunks`).

How a file is read:

1. **Scan**, in parallel over byte chunks. A chunk does not know whether it begins inside a quoted
   field, so it counts record starts for both cases, and checks every quote's neighbours: one that opens
   stands at the beginning of a field, one that closes before a delimiter, a line end or another quote.
2. **Stitch** the chunks in order: the parity of the quotes so far tells which of the two cases holds.
   If no check failed there, parity *is* the state of a CSV parser (each quote where one may stand), and the
   file is ``mode="ranges"``: any run of records can be cut out by its bytes and parsed by pyarrow.
3. Else the file is not RFC 4180, and parity may lie. Then one serial pass of Python's own `csv` reader over
   the whole file finds the record starts (``mode="serial"``), and `csv` parses the parts too.
4. A compressed file is scanned the same way, in one stream.

Whatever Python's `csv` would misread as well (a quote that is never closed, NUL bytes, bad UTF-8, records
with more or fewer fields than the header) is a CSVError that names file, record and byte.

A record ends at LF, CRLF or CR outside quotes; blank lines are not records; the header is the first
line that is not blank. Values are text: "" is "", and null, NA, None are words.

Memory: an index holds 16 bytes a part (1 TB in parts of 30 MB: 0.5 MB), and while it is made up to 64 MB of
sampled record starts; a worker holds one chunk, or one part and its parsed rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any, Literal, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv

from ray_qa.errors import CSVError, InputError, OptionError
from ray_qa.schema import ROW_INDEX
from ray_qa.storage import Location, retry

CHUNK_BYTES = 32 << 20
PARTS_WANTED, MIN_PART_ROWS, MAX_PART_ROWS = 20_000, 256, 32_768
#: Files with long rows get fewer rows a part, so that a part is about this large at most.
MAX_PART_BYTES = 64 << 20

_SCAN_BLOCK = 128 << 10  # its temporaries stay in a core's cache
_HASH_BLOCK = 1 << 20
_STREAM_BLOCK = 4 << 20
_PARSE_BLOCK = 1 << 20
_MAX_GRANULES = 1 << 20
_HEADER_BYTES, _MAX_HEADER_BYTES = 64 << 10, 16 << 20
_MAX_FIELD = 2**31 - 1
_LF, _CR, _QUOTE = 10, 13, 34
_DELIMITERS = {",": ",", ";": ";", "tab": "\t"}
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SAVE_AS_UTF8 = "save the file as CSV in UTF-8"
_ASSUMED_RATIO = 8  # of text to compressed bytes; only sets how finely record starts are sampled

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
MapChunks = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class CSVFile:
    """One indexed CSV file. Byte positions count in the decompressed text."""

    location: Location
    size: int
    """Bytes as stored."""
    compression: str | None
    """None, "gzip", "bz2" or "zstd"."""
    delimiter: str
    columns: tuple[str, ...]
    """Unique names: a repeated one that is not required becomes ``name_2``, a blank one ``column_<n>``."""
    body_start: int
    """Where the text after the header begins."""
    body_end: int = 0
    first_row: int = 0
    """Position of its first record, counted over all files."""
    num_rows: int = 0
    digest: str = ""
    """Of the text's bytes, header included; the same for every chunk size, compressed or not."""
    mode: Literal["ranges", "serial"] = "ranges"
    """Who parses a part: pyarrow (the file keeps RFC 4180), or Python's csv module."""


@dataclass(frozen=True)
class Part:
    """A run of consecutive records of one file: the unit of work."""

    file: int
    """Position of the file in `CSVIndex.files`."""
    start: int
    """First byte, in the decompressed text."""
    end: int
    """Byte after the last one."""
    first_row: int
    """Position of its first record, counted over all files."""
    num_rows: int


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
    if delimiter is not None and delimiter not in _DELIMITERS:
        raise OptionError(f"delimiter is {delimiter!r}; allowed: {', '.join(map(repr, _DELIMITERS))} or None")
    for name, value in (("chunk_bytes", chunk_bytes), ("part_rows", part_rows), ("part_bytes", part_bytes)):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value!r}; allowed: a whole number of at least 1")
    if part_rows is not None and part_bytes is not None:
        raise OptionError("part_rows and part_bytes are both given; allowed: one of them")
    if not locations:
        raise InputError("no input file was given; allowed: at least one CSV file")
    delimiters = tuple(_DELIMITERS.values()) if delimiter is None else (_DELIMITERS[delimiter],)
    opened = list(map_chunks(
        _open_file, [_Opening(location, tuple(required_columns), delimiters) for location in locations]
    ))

    if len(opened) != len(locations):
        raise ValueError(f"map_chunks gave {len(opened)} results for {len(locations)} files")
    text_bytes = sum(file.size * (_ASSUMED_RATIO if file.compression else 1) for file in opened)
    granule = 1 << max(0, (text_bytes - 1) // _MAX_GRANULES).bit_length()
    tasks = [task for file in opened for task in _scan_tasks(file, granule, chunk_bytes)]
    scans = iter(map_chunks(_scan, tasks))
    stitched = [
        _stitch(file, [next(scans) for _ in range(_num_scans(file, chunk_bytes))], granule, chunk_bytes)
        for file in opened
    ]
    irregular = [ordinal for ordinal, found in enumerate(stitched) if found.is_irregular]
    walks = map_chunks(_walk_file, [_Walk(stitched[i].file, granule, stitched[i].nul_at) for i in irregular])
    for ordinal, (starts, rows, num_rows) in zip(irregular, walks, strict=True):
        file = replace(stitched[ordinal].file, num_rows=num_rows, mode="serial")
        stitched[ordinal] = _Stitched(file, starts, rows)
    return _cut(stitched, part_rows, part_bytes)


def read_part(file: CSVFile, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one part: `row_index` (int64), then the columns asked for, or all (string, no nulls).

    A part of a compressed file costs a pass from the file's beginning: use `read_parts` there.

    Raises:
        CSVError: the text is not what the index saw, a record has too many or too few fields, or
            the text is not UTF-8.
    """
    if file.compression is not None:
        ((_, table),) = read_parts(file, [part], columns)
        return table
    return _parse(file, part, _read_range(file, part.start, part.end), columns)


def read_parts(
    file: CSVFile, parts: Iterable[Part], columns: Sequence[str] | None = None
) -> Iterator[tuple[Part, pa.Table]]:
    """The rows of parts of one file, as `read_part` gives them; a compressed file is streamed once.

    ``parts`` must be in the file's order for a compressed file.
    """
    if file.compression is None:
        for part in parts:
            yield part, read_part(file, part, columns)
        return
    position = 0
    with _open_text(file) as stream:
        for part in parts:
            if part.start < position:
                raise ValueError(f"{file.location.uri}: parts of a compressed file must be in order")
            _skip(file, stream, part.start - position)
            data = _read_text(file, stream, part.end - part.start)
            position = part.end
            yield part, _parse(file, part, pa.py_buffer(data), columns)


# --- opening a file: what it is, its header ---------------------------------------------------------


@dataclass(frozen=True)
class _Opening:
    location: Location
    required: tuple[str, ...]
    delimiters: tuple[str, ...]


def _open_file(opening: _Opening) -> CSVFile:
    """Compression, delimiter and columns of a file, from its first bytes."""
    uri = opening.location.uri
    try:
        with retry(lambda: opening.location.filesystem.open_input_file(opening.location.path)) as stored:
            size = stored.size()
            magic = stored.read(10)
    except OSError as error:
        raise InputError(f"{uri}: cannot be read ({error})") from error
    compression = _compression(magic)
    if compression is None and magic.startswith(b"PK\x03\x04"):
        raise CSVError("this is a zip or Excel file, not a CSV", file=uri, allowed=_SAVE_AS_UTF8)
    file = CSVFile(opening.location, size, compression, ",", (), 0)
    wanted = _HEADER_BYTES
    while True:
        with _open_text(file) as stream:
            head = _read_text(file, stream, wanted)
        is_whole = len(head) < wanted
        header = _read_header(head, is_whole, opening, uri)
        if header is not None:
            delimiter, columns, body_start = header
            return replace(file, delimiter=delimiter, columns=columns, body_start=body_start)
        if wanted >= _MAX_HEADER_BYTES:
            raise CSVError(
                f"the header does not end within {_MAX_HEADER_BYTES >> 20} MiB", file=uri, byte_offset=0,
                excerpt=_excerpt(head, 0), allowed="the first line names the columns; a quote may be missing",
            )
        wanted *= 16


def _compression(magic: bytes) -> str | None:
    if magic.startswith(b"\x1f\x8b"):
        return "gzip"
    if magic.startswith(b"BZh") and magic[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bz2"
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    return None


def _read_header(
    head: bytes, is_whole: bool, opening: _Opening, uri: str
) -> tuple[str, tuple[str, ...], int] | None:
    """(delimiter, columns, start of the body); None where more of the file must be seen."""
    allowed = f"needed: a first line with the columns {', '.join(opening.required)}"
    if head.startswith(_UTF16_BOMS):
        raise CSVError("the file is UTF-16 or UTF-32", file=uri, byte_offset=0, allowed=_SAVE_AS_UTF8)
    bom = len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0
    readings = []
    for delimiter in opening.delimiters:
        for start, end, fields, is_closed in _records(_byte_text(io.BytesIO(head[bom:])), delimiter):
            if not is_whole and bom + end >= len(head):
                return None  # what follows could belong to this record, be it the LF of a CRLF
            readings.append((delimiter, fields, bom + start, bom + end, is_closed))
            break
        else:
            if is_whole:
                raise CSVError("the file is empty", file=uri, allowed=allowed)
            return None
    # The delimiter that finds the needed columns; else the one that finds the most.
    delimiter, fields, start, end, is_closed = max(
        readings, key=lambda reading: (set(opening.required) <= set(_stripped(reading[1])), len(reading[1]))
    )
    nul_at = head.find(b"\0", 0, end)
    if nul_at >= 0:
        raise _nul_error(uri, nul_at, None, head[:end])
    if not is_closed:
        raise CSVError(
            "a quote in the header is never closed", file=uri, byte_offset=start,
            excerpt=_excerpt(head, start), allowed=allowed,
        )
    try:
        names = [name.encode("latin-1").decode("utf-8") for name in _stripped(fields)]
    except UnicodeDecodeError:
        raise CSVError(
            "the header is not UTF-8", file=uri, byte_offset=start, excerpt=_excerpt(head, start),
            allowed=_SAVE_AS_UTF8,
        ) from None
    missing = [name for name in opening.required if name not in names]
    if missing:
        raise CSVError(
            f"the header lacks the column {', '.join(missing)}", file=uri, byte_offset=start,
            excerpt=", ".join(names)[:300], allowed=allowed + " (in any order, among any others)",
        )
    repeated = [name for name in opening.required if names.count(name) > 1]
    if repeated:
        raise CSVError(
            f"the header names the column {', '.join(repeated)} more than once", file=uri, byte_offset=start,
            excerpt=", ".join(names)[:300], allowed="each needed column exactly once",
        )
    return delimiter, _unique(names), end


def _stripped(fields: Sequence[str]) -> list[str]:
    return [field.strip(" \t") for field in fields]


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` without repetitions, and without the name that the row's position takes."""
    taken = {ROW_INDEX, *names}
    seen = {ROW_INDEX}
    unique = []
    for position, wanted in enumerate(names):
        name = base = wanted or f"column_{position + 1}"
        suffix = 2
        while name in seen or (name != wanted and name in taken):
            name, suffix = f"{base}_{suffix}", suffix + 1
        seen.add(name)
        unique.append(name)
    return tuple(unique)


# --- the scan: both cases at once, vectorized -------------------------------------------------------


@dataclass(frozen=True)
class _ScanTask:
    """Scan the text bytes [start, end); ``end`` is None for the whole of a compressed file."""

    file: CSVFile
    start: int
    end: int | None
    granule: int


@dataclass(frozen=True)
class _Scanned:
    """What a chunk holds. Pairs: if the chunk begins outside quotes, and if inside."""

    quotes: int
    records: tuple[int, int]
    """Records that start in the chunk."""
    starts: tuple[Integers, Integers]
    """At least the first record start in each granule (aligned run of ``granule`` bytes of the file)."""
    ordinals: tuple[Integers, Integers]
    """The same records, counted within the chunk."""
    violation: tuple[int, int]
    """First byte where a quote stands that RFC 4180 forbids; -1 for none."""
    last_start: tuple[int, int]
    nul_at: int
    digests: bytes
    """Of the hash blocks that start in the chunk."""
    end: int


class _Scanner:
    """Scans consecutive windows of text in both cases."""

    def __init__(self, delimiter: str, granule: int) -> None:
        self._may_touch_quote = np.zeros(256, dtype=np.bool_)
        self._may_touch_quote[[ord(delimiter), _LF, _CR, _QUOTE]] = True
        self._shift = granule.bit_length() - 1
        self.quotes = 0
        self.records = [0, 0]
        self.violation = [-1, -1]
        self.last_start = [-1, -1]
        self._starts: tuple[list[Integers], list[Integers]] = ([], [])
        self._ordinals: tuple[list[Integers], list[Integers]] = ([], [])

    def feed(self, window: Bytes, offset: int) -> None:
        """Scan window[1:], whose first byte lies at ``offset``; window[0] is the byte before it, a
        line end where the body begins."""
        for begin in range(1, len(window), _SCAN_BLOCK):
            self._feed_block(window[begin - 1 : begin + _SCAN_BLOCK], offset + begin - 1)

    def _feed_block(self, window: Bytes, offset: int) -> None:
        quotes = np.flatnonzero(window == _QUOTE)
        carried = 1 if quotes.size and quotes[0] == 0 else 0
        if quotes.size:
            # A quote is opening in case h where the parity of the quotes before it equals h, else closing.
            parity = (np.arange(quotes.size) + (self.quotes - carried)) & 1
            before = quotes[carried:]
            bad_before = ~self._may_touch_quote[window[before - 1]]
            after = quotes if quotes[-1] < window.size - 1 else quotes[:-1]
            bad_after = ~self._may_touch_quote[window[after + 1]]
            for case in (0, 1):
                if self.violation[case] < 0:
                    found = [
                        *before[bad_before & (parity[carried:] == case)][:1],
                        *after[bad_after & (parity[: after.size] != case)][:1],
                    ]
                    if found:
                        self.violation[case] = int(min(found)) + offset - 1
        line_ends = window == _LF
        returns = window == _CR
        if returns.any():
            line_ends |= returns
        # A record starts at a byte that is no line end, behind one, outside quotes.
        starts = np.flatnonzero(line_ends[:-1]) + 1
        starts = starts[~line_ends[starts]]
        if starts.size:
            inside = quotes[carried:]
            parity = (np.searchsorted(inside, starts) + self.quotes) & 1
            starts += offset - 1
            for case in (0, 1):
                self._add_starts(case, starts[parity == case])
        self.quotes += quotes.size - carried

    def _add_starts(self, case: int, starts: Integers) -> None:
        if not starts.size:
            return
        granules = starts >> self._shift
        is_first = np.ones(starts.size, dtype=np.bool_)
        np.not_equal(granules[1:], granules[:-1], out=is_first[1:])
        sampled = np.flatnonzero(is_first)
        self._starts[case].append(starts[sampled])
        self._ordinals[case].append(sampled + self.records[case])
        self.records[case] += starts.size
        self.last_start[case] = int(starts[-1])

    def result(self, *, nul_at: int, digests: bytes, end: int) -> _Scanned:
        def joined(pair: tuple[list[Integers], list[Integers]]) -> tuple[Integers, Integers]:
            none = np.empty(0, dtype=np.int64)
            return np.concatenate([none, *pair[0]]), np.concatenate([none, *pair[1]])

        return _Scanned(
            self.quotes, (self.records[0], self.records[1]), joined(self._starts), joined(self._ordinals),
            (self.violation[0], self.violation[1]), (self.last_start[0], self.last_start[1]),
            nul_at, digests, end,
        )


def _num_scans(file: CSVFile, chunk_bytes: int) -> int:
    return 1 if file.compression else max(1, -(-file.size // chunk_bytes))


def _scan_tasks(file: CSVFile, granule: int, chunk_bytes: int) -> Iterator[_ScanTask]:
    if file.compression:
        yield _ScanTask(file, 0, None, granule)
        return
    for start in range(0, max(file.size, 1), chunk_bytes):
        yield _ScanTask(file, start, min(start + chunk_bytes, file.size), granule)


def _scan(task: _ScanTask) -> _Scanned:
    file = task.file
    scanner = _Scanner(file.delimiter, task.granule)
    if task.end is None:
        return _scan_stream(file, scanner)
    # Hash blocks are aligned in the file, not in the chunk: the one that starts last may reach beyond it.
    first_block = -(-task.start // _HASH_BLOCK) * _HASH_BLOCK
    blocks_end = min(file.size, -(-task.end // _HASH_BLOCK) * _HASH_BLOCK) if first_block < task.end else 0
    read_start = max(0, task.start - 1)
    data = np.frombuffer(_read_range(file, read_start, max(task.end, blocks_end)), dtype=np.uint8)
    digests = b"".join(
        _block_digest(data[begin - read_start : min(begin + _HASH_BLOCK, file.size) - read_start])
        for begin in range(first_block, blocks_end, _HASH_BLOCK)
    )
    start = max(task.start, file.body_start)
    nul_at = -1
    if start < task.end:
        window = data[start - 1 - read_start : task.end - read_start]
        scanner.feed(window, start)
        nul_at = _find_nul(window[1:], start)
    return scanner.result(nul_at=nul_at, digests=digests, end=task.end)


def _scan_stream(file: CSVFile, scanner: _Scanner) -> _Scanned:
    digests = []
    nul_at = -1
    position = 0
    previous = np.array([_LF], dtype=np.uint8)
    with _open_text(file) as stream:
        while block := _read_text(file, stream, _STREAM_BLOCK):
            data = np.frombuffer(block, dtype=np.uint8)
            digests += [_block_digest(data[i : i + _HASH_BLOCK]) for i in range(0, data.size, _HASH_BLOCK)]
            body = data[max(0, file.body_start - position) :]
            start = position + data.size - body.size
            if body.size:
                scanner.feed(np.concatenate([previous, body]), start)
                previous = body[-1:]
                if nul_at < 0:
                    nul_at = _find_nul(body, start)
            position += data.size
    return scanner.result(nul_at=nul_at, digests=b"".join(digests), end=position)


def _find_nul(data: Bytes, offset: int) -> int:
    return int(np.argmin(data)) + offset if data.size and data.min() == 0 else -1


def _block_digest(block: Bytes) -> bytes:
    return hashlib.sha256(block.data).digest()[:16]


# --- stitching chunks to a file ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Stitched:
    """A file and its sampled record starts, each with its record's number in the file."""

    file: CSVFile
    starts: Integers
    rows: Integers
    is_irregular: bool = False
    nul_at: int = -1


def _stitch(file: CSVFile, scans: Sequence[_Scanned], granule: int, chunk_bytes: int) -> _Stitched:
    """The true case of each chunk, and what follows from it.

    Raises:
        CSVError: a NUL byte, or a quote that is open at the end, in a file that is otherwise regular.
    """
    state = 0
    num_rows = 0
    last_start = -1
    starts, rows = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    digests = hashlib.sha256()
    for scan in scans:
        digests.update(scan.digests)
    file = replace(file, body_end=scans[-1].end, digest=digests.hexdigest()[:32])
    nul_at = next((scan.nul_at for scan in scans if scan.nul_at >= 0), -1)
    irregular = _Stitched(file, starts[0], rows[0], True, nul_at)
    for ordinal, scan in enumerate(scans):
        violation = scan.violation[state]
        if 0 <= scan.nul_at and not file.compression and not 0 <= violation < scan.nul_at:
            raise _nul_in_body(file, ordinal * chunk_bytes, scan.nul_at, state, num_rows)
        if violation >= 0 or scan.nul_at >= 0:
            return irregular
        starts.append(scan.starts[state])
        rows.append(scan.ordinals[state] + num_rows)
        num_rows += scan.records[state]
        last_start = max(last_start, scan.last_start[state])
        state ^= scan.quotes & 1
    if state == 1:
        raise _unclosed(file, last_start, num_rows - 1)
    file = replace(file, num_rows=num_rows)
    return _Stitched(file, *_first_of_granules(np.concatenate(starts), np.concatenate(rows), granule))


def _first_of_granules(starts: Integers, rows: Integers, granule: int) -> tuple[Integers, Integers]:
    """Without further starts of a granule that two blocks share, so that chunks leave no trace."""
    keep = np.ones(starts.size, dtype=np.bool_)
    granules = starts // granule
    np.not_equal(granules[1:], granules[:-1], out=keep[1:])
    return starts[keep], rows[keep]


def _nul_in_body(file: CSVFile, chunk_start: int, nul_at: int, state: int, rows_before: int) -> CSVError:
    """The error that names the record with a NUL byte, from a second look at its chunk."""
    start = max(chunk_start, file.body_start)
    data = _read_range(file, start - 1, nul_at + 1)
    scanner = _Scanner(file.delimiter, 1)
    scanner.feed(np.frombuffer(data, dtype=np.uint8), start)
    return _nul_error(file.location.uri, nul_at, rows_before + scanner.records[state] - 1, bytes(data))


def _nul_error(uri: str, nul_at: int, record: int | None, before: bytes) -> CSVError:
    return CSVError(
        "a NUL byte: this is no text, or UTF-16 or UTF-32", file=uri, byte_offset=nul_at, record=record,
        excerpt=_excerpt(before, max(0, len(before) - 40)), allowed=_SAVE_AS_UTF8,
    )


def _unclosed(file: CSVFile, start: int, record: int) -> CSVError:
    return CSVError(
        "a quote in this record is never closed: the file ends inside it", file=file.location.uri,
        byte_offset=start, record=record, excerpt=_excerpt_at(file, start),
        allowed='a quote inside a quoted field is written "", and the field ends with one quote',
    )


# --- cutting into parts -----------------------------------------------------------------------------


def _cut(stitched: Sequence[_Stitched], part_rows: int | None, part_bytes: int | None) -> CSVIndex:
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


# --- the serial reading: Python's csv module, with byte positions -----------------------------------


class _Lines:
    """Lines ended by LF, CRLF or CR; counts the characters handed out.

    Behind the last one comes a blank line: a reader that takes it into a record was inside quotes.
    """

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.position = 0
        self.is_past_end = False

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            self.position += len(line)
            yield line
        self.is_past_end = True
        yield "\n"


def _records(text: TextIO, delimiter: str) -> Iterator[tuple[int, int, list[str], bool]]:
    """(start, end, fields, whether its quotes are closed) of each record; positions count characters."""
    # The limit is the process's own and 128 KiB by default; it is only ever raised.
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    lines = _Lines(text)
    start = 0
    for fields in csv.reader(lines, delimiter=delimiter):
        if fields:
            yield start, lines.position, fields, not lines.is_past_end
        start = lines.position


def _byte_text(stream: IO[bytes]) -> TextIO:
    """Text with a character for each byte: delimiters, quotes and line ends are ASCII in UTF-8 too."""
    return io.TextIOWrapper(stream, encoding="latin-1", newline="")


@dataclass(frozen=True)
class _Walk:
    file: CSVFile
    granule: int
    nul_at: int


def _walk_file(walk: _Walk) -> tuple[Integers, Integers, int]:
    """Sampled record starts, their records' numbers, and the number of records of an irregular file."""
    file = walk.file
    starts, rows = [], []
    last_granule = -1
    record = -1
    with _open_text(file) as stream:
        _skip(file, stream, file.body_start)
        try:
            for start, end, fields, is_closed in _records(_byte_text(stream), file.delimiter):
                record += 1
                start, end = start + file.body_start, end + file.body_start
                if 0 <= walk.nul_at < end:
                    raise _nul_error(file.location.uri, walk.nul_at, record, b"")
                if not is_closed:
                    raise _unclosed(file, start, record)
                if len(fields) != len(file.columns):
                    raise _count_error(file, start, record, len(fields), _excerpt_at(file, start))
                if start // walk.granule != last_granule:
                    last_granule = start // walk.granule
                    starts.append(start)
                    rows.append(record)
        except OSError as error:
            raise _unreadable(file, error) from error
        except csv.Error as error:
            raise CSVError(f"csv refuses it ({error})", file=file.location.uri, record=record + 1) from error
    return np.array(starts, dtype=np.int64), np.array(rows, dtype=np.int64), record + 1


def _count_error(file: CSVFile, start: int, record: int, found: int, excerpt: str) -> CSVError:
    return CSVError(
        f"{found} field{'s' * (found != 1)} where the header has {len(file.columns)}",
        file=file.location.uri, byte_offset=start, record=record, excerpt=excerpt,
        allowed="every record has one field for each column; one that holds a delimiter, a quote or a line "
        "break is quoted",
    )


# --- parsing a part ---------------------------------------------------------------------------------


def _parse(file: CSVFile, part: Part, data: pa.Buffer, columns: Sequence[str] | None) -> pa.Table:
    names = file.columns if columns is None else tuple(columns)
    unknown = [name for name in names if name not in file.columns]
    if unknown:
        raise CSVError(
            f"the header lacks the column {', '.join(unknown)}", file=file.location.uri,
            excerpt=", ".join(file.columns)[:300],
        )
    positions = [file.columns.index(name) for name in names]
    arrays = None
    # pyarrow drops a byte order mark in front of what it parses; before a part it is text.
    if file.mode == "ranges" and _is_utf8(data) and bytes(data[:3]) != _UTF8_BOM:
        arrays = _parse_fast(file, part, data, positions)
    if arrays is None:
        arrays = _parse_serially(file, part, data, positions)
    # From a buffer: pa.array and pa.table would import pandas first, 40 MB in every worker.
    rows = np.arange(part.first_row, part.first_row + part.num_rows, dtype=np.int64)
    row_index = pa.Array.from_buffers(pa.int64(), part.num_rows, [None, pa.py_buffer(rows)])
    return pa.Table.from_arrays([row_index, *arrays], names=[ROW_INDEX, *names])


def _is_utf8(data: pa.Buffer) -> bool:
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, offsets, data).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _parse_fast(
    file: CSVFile, part: Part, data: pa.Buffer, positions: Sequence[int]
) -> list[pa.ChunkedArray] | None:
    """The columns at ``positions``, by pyarrow; None where it finds something wrong."""
    view = np.frombuffer(data, dtype=np.uint8)
    blocks = (view[i : i + _SCAN_BLOCK] for i in range(0, view.size, _SCAN_BLOCK))
    if sum(np.count_nonzero(block == _QUOTE) for block in blocks) & 1:
        raise _changed(file, part, "an odd number of quotes")
    # Numbers for names: the file's own may repeat, and do not matter here.
    numbers = [str(i) for i in range(len(file.columns))]
    chosen = [numbers[i] for i in positions]
    for block_size in (_PARSE_BLOCK, min(data.size + 1, 2**31 - 1)):
        try:
            table = pacsv.read_csv(
                pa.BufferReader(data),
                read_options=pacsv.ReadOptions(
                    column_names=numbers, block_size=block_size, use_threads=False
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=file.delimiter, newlines_in_values=True, ignore_empty_lines=True
                ),
                # All of it is known to be UTF-8.
                convert_options=pacsv.ConvertOptions(
                    include_columns=chosen or numbers[:1], column_types=dict.fromkeys(numbers, pa.string()),
                    strings_can_be_null=False, check_utf8=False,
                ),
            )
        except pa.ArrowInvalid:
            continue  # a record is longer than a block, or has too many or too few fields
        if table.num_rows != part.num_rows:
            raise _changed(file, part, f"{table.num_rows} records")
        return table.select(chosen).columns
    return None


def _parse_serially(file: CSVFile, part: Part, data: pa.Buffer, positions: Sequence[int]) -> list[pa.Array]:
    """The columns at ``positions``, by Python's csv module.

    Raises:
        CSVError: naming the record that is not UTF-8, or has too many or too few fields.
    """
    raw = bytes(data)
    values: list[list[str]] = [[] for _ in positions]
    count = 0
    try:
        for _, _, fields, is_closed in _records(io.StringIO(raw.decode("utf-8"), newline=""), file.delimiter):
            if len(fields) != len(file.columns):
                start, record = _record_at(file, part, raw, count)
                raise _count_error(file, start, record, len(fields), _excerpt(raw, start - part.start))
            if not is_closed:
                raise _changed(file, part, "a quote that is never closed")
            count += 1
            for column, position in zip(values, positions, strict=True):
                column.append(fields[position])
    except UnicodeDecodeError as error:
        records = enumerate(_records(_byte_text(io.BytesIO(raw)), file.delimiter))
        record = next((i for i, (_, end, _, _) in records if error.start < end), 0)
        raise CSVError(
            f"the byte 0x{raw[error.start]:02x} is not UTF-8", file=file.location.uri,
            byte_offset=part.start + error.start, record=part.first_row - file.first_row + record,
            excerpt=_excerpt(raw, max(0, error.start - 30)), allowed=_SAVE_AS_UTF8,
        ) from None
    except csv.Error as error:
        raise _changed(file, part, f"what csv refuses ({error})") from error
    if count != part.num_rows:
        raise _changed(file, part, f"{count} records")
    return [pa.array(column, type=pa.string()) for column in values]


def _record_at(file: CSVFile, part: Part, raw: bytes, count: int) -> tuple[int, int]:
    """First byte, and number in the file, of the record at position ``count`` in a part."""
    start, *_ = next(islice(_records(_byte_text(io.BytesIO(raw)), file.delimiter), count, None))
    return part.start + start, part.first_row - file.first_row + count


def _changed(file: CSVFile, part: Part, found: str) -> CSVError:
    return CSVError(
        f"the file was changed after it was indexed: bytes {part.start} to {part.end}, which held "
        f"{part.num_rows} records, now hold {found}", file=file.location.uri, byte_offset=part.start,
        record=part.first_row - file.first_row,
    )


# --- bytes ------------------------------------------------------------------------------------------


def _read_range(file: CSVFile, start: int, end: int) -> pa.Buffer:
    """The stored bytes [start, end)."""

    def read() -> tuple[int, pa.Buffer]:
        with file.location.filesystem.open_input_file(file.location.path) as stored:
            stored.seek(start)
            return stored.size(), stored.read_buffer(end - start)

    try:
        size, data = retry(read)
    except OSError as error:
        raise _unreadable(file, error) from error
    if size != file.size or data.size != end - start:
        raise CSVError(
            f"the file was changed after it was indexed: it had {file.size} bytes, now {size}",
            file=file.location.uri,
        )
    return data


def _open_text(file: CSVFile) -> pa.NativeFile:
    try:
        return file.location.open_stream(compression=file.compression)
    except OSError as error:
        raise _unreadable(file, error) from error


def _read_text(file: CSVFile, stream: pa.NativeFile, size: int) -> bytes:
    """The next ``size`` bytes of a stream; fewer only at its end."""
    blocks = []
    try:
        while size > 0 and (block := stream.read(size)):
            blocks.append(block)
            size -= len(block)
    except OSError as error:
        raise _unreadable(file, error) from error
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _skip(file: CSVFile, stream: pa.NativeFile, size: int) -> None:
    while size > 0 and (block := _read_text(file, stream, min(size, _STREAM_BLOCK))):
        size -= len(block)


def _unreadable(file: CSVFile, error: OSError) -> InputError:
    if file.compression and not isinstance(error, (FileNotFoundError, PermissionError)):
        return CSVError(
            f"the {file.compression} data is damaged or cut short ({error})", file=file.location.uri
        )
    return InputError(f"{file.location.uri}: cannot be read ({error})")


def _excerpt(text: bytes, start: int) -> str:
    return text[start : start + 80].decode("utf-8", errors="replace")


def _excerpt_at(file: CSVFile, start: int) -> str:
    with _open_text(file) as stream:
        _skip(file, stream, start)
        return _excerpt(_read_text(file, stream, 80), 0)
