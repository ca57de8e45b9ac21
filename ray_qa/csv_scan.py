"""Where the records of a CSV file begin: chunks of it scanned in parallel, quote-aware, then put together.

1. **Scan**, in parallel over byte chunks. A chunk does not know whether it begins inside a quoted field, so it
   counts record starts for both cases, and checks every quote's neighbours: one that opens stands at the
   beginning of a field, one that closes before a delimiter, a line end or another quote.
2. **Stitch** the chunks in order: the parity of the quotes so far tells which of the two cases holds. If no check
   failed there, parity *is* the state of a CSV parser (each quote where one may stand), and the file is
   ``mode="ranges"``: any run of records can be cut out by its bytes and parsed by pyarrow.
3. Else the file is not RFC 4180, and parity may lie. Then one serial pass of Python's own `csv` reader over the
   whole file finds the record starts (``mode="serial"``), and `csv` parses the parts too.

A compressed file is scanned the same way, in one stream.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from ray_qa.csv_file import (
    CR,
    LF,
    QUOTE,
    SCAN_BLOCK,
    STREAM_BLOCK,
    Bytes,
    CSVFile,
    byte_text,
    count_error,
    excerpt_at,
    iter_records,
    nul_error,
    open_text,
    read_range,
    read_text,
    skip_text,
    unclosed,
    unreadable,
)
from ray_qa.errors import CSVError

_HASH_BLOCK = 1 << 20
Integers = npt.NDArray[np.int64]


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
        self._may_touch_quote[[ord(delimiter), LF, CR, QUOTE]] = True
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
        for begin in range(1, len(window), SCAN_BLOCK):
            self._feed_block(window[begin - 1 : begin + SCAN_BLOCK], offset + begin - 1)

    def _feed_block(self, window: Bytes, offset: int) -> None:
        quotes = np.flatnonzero(window == QUOTE)
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
        line_ends = window == LF
        returns = window == CR
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


def num_scans(file: CSVFile, chunk_bytes: int) -> int:
    return 1 if file.compression else max(1, -(-file.size // chunk_bytes))


def scan_tasks(file: CSVFile, granule: int, chunk_bytes: int) -> Iterator[_ScanTask]:
    if file.compression:
        yield _ScanTask(file, 0, None, granule)
        return
    for start in range(0, max(file.size, 1), chunk_bytes):
        yield _ScanTask(file, start, min(start + chunk_bytes, file.size), granule)


def scan_chunk(task: _ScanTask) -> _Scanned:
    file = task.file
    scanner = _Scanner(file.delimiter, task.granule)
    if task.end is None:
        return _scan_stream(file, scanner)
    # Hash blocks are aligned in the file, not in the chunk: the one that starts last may reach beyond it.
    first_block = -(-task.start // _HASH_BLOCK) * _HASH_BLOCK
    blocks_end = min(file.size, -(-task.end // _HASH_BLOCK) * _HASH_BLOCK) if first_block < task.end else 0
    read_start = max(0, task.start - 1)
    data = np.frombuffer(read_range(file, read_start, max(task.end, blocks_end)), dtype=np.uint8)
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
    previous = np.array([LF], dtype=np.uint8)
    with open_text(file) as stream:
        while block := read_text(file, stream, STREAM_BLOCK):
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
    # It tells one content from another by chance, not by malice; SHA-256 took a fifth of the scan.
    return xxhash.xxh3_128_digest(block.data)


@dataclass(frozen=True)
class Stitched:
    """A file and its sampled record starts, each with its record's number in the file."""

    file: CSVFile
    starts: Integers
    rows: Integers
    is_irregular: bool = False
    nul_at: int = -1


def stitch(file: CSVFile, scans: Sequence[_Scanned], granule: int, chunk_bytes: int) -> Stitched:
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
    irregular = Stitched(file, starts[0], rows[0], True, nul_at)
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
        raise unclosed(file, last_start, num_rows - 1)
    file = replace(file, num_rows=num_rows)
    return Stitched(file, *_first_of_granules(np.concatenate(starts), np.concatenate(rows), granule))


def _first_of_granules(starts: Integers, rows: Integers, granule: int) -> tuple[Integers, Integers]:
    """Without further starts of a granule that two blocks share, so that chunks leave no trace."""
    keep = np.ones(starts.size, dtype=np.bool_)
    granules = starts // granule
    np.not_equal(granules[1:], granules[:-1], out=keep[1:])
    return starts[keep], rows[keep]


def _nul_in_body(file: CSVFile, chunk_start: int, nul_at: int, state: int, rows_before: int) -> CSVError:
    """The error that names the record with a NUL byte, from a second look at its chunk."""
    start = max(chunk_start, file.body_start)
    data = read_range(file, start - 1, nul_at + 1)
    scanner = _Scanner(file.delimiter, 1)
    scanner.feed(np.frombuffer(data, dtype=np.uint8), start)
    return nul_error(file.location.uri, nul_at, rows_before + scanner.records[state] - 1, bytes(data))


@dataclass(frozen=True)
class Walk:
    file: CSVFile
    granule: int
    nul_at: int


def walk_file(walk: Walk) -> tuple[Integers, Integers, int]:
    """Sampled record starts, their records' numbers, and the number of records of an irregular file."""
    file = walk.file
    starts, rows = [], []
    last_granule = -1
    record = -1
    with open_text(file) as stream:
        skip_text(file, stream, file.body_start)
        try:
            for start, end, fields, is_closed in iter_records(byte_text(stream), file.delimiter):
                record += 1
                start, end = start + file.body_start, end + file.body_start
                if 0 <= walk.nul_at < end:
                    raise nul_error(file.location.uri, walk.nul_at, record, b"")
                if not is_closed:
                    raise unclosed(file, start, record)
                if len(fields) != len(file.columns):
                    raise count_error(file, start, record, len(fields), excerpt_at(file, start))
                if start // walk.granule != last_granule:
                    last_granule = start // walk.granule
                    starts.append(start)
                    rows.append(record)
        except OSError as error:
            raise unreadable(file, error) from error
        except csv.Error as error:
            raise CSVError(f"csv refuses it ({error})", file=file.location.uri, record=record + 1) from error
    return np.array(starts, dtype=np.int64), np.array(rows, dtype=np.int64), record + 1
