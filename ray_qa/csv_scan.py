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
#: Bytes whose masks are made at a time: they and their words stay in a core's cache, and numpy's calls are few.
_BIT_BLOCK = 512 << 10
_WORD = 64
_ONE, _LAST, _ALL = np.uint64(1), np.uint64(_WORD - 1), np.uint64(2**64 - 1)
_PREFIX_SHIFTS = [np.uint64(places) for places in (2, 4, 8, 16, 32)]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


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


class _Masks:
    """Comparisons of the bytes of a block, as bits of 64-bit words; the block begins at bit ``lead`` of the first."""

    def __init__(self, lead: int) -> None:
        self._lead = lead
        self._bools = np.zeros(-(-(lead + _BIT_BLOCK + 1) // _WORD) * _WORD, dtype=np.bool_)

    def take(self, block: Bytes) -> None:
        """Make masks of this block from here on."""
        end = self._lead + block.size
        self._block = block
        self._place = self._bools[self._lead : end]
        self._words = self._bools[: -(-end // _WORD) * _WORD]
        self._words[end:] = False

    def equal(self, byte: int) -> Words:
        np.equal(self._block, byte, out=self._place)
        return np.packbits(self._words, bitorder="little").view("<u8")

    def at_most(self, byte: int) -> Words:
        np.less_equal(self._block, byte, out=self._place)
        return np.packbits(self._words, bitorder="little").view("<u8")

    def behind_first(self) -> Words:
        """All bytes of the block but the first."""
        end = self._lead + self._block.size
        words = np.full(self._words.size // _WORD, _ALL)
        words[0] = (int(_ALL) << (self._lead + 1)) & int(_ALL)
        if end % _WORD:
            words[-1] &= np.uint64((1 << end % _WORD) - 1)
        return words


def _shifted(words: Words, carry: int = 0) -> Words:
    """Every bit one place later; ``carry`` becomes the first."""
    shifted = words << _ONE
    shifted[1:] |= words[:-1] >> _LAST
    shifted[0] |= np.uint64(carry)
    return shifted


def _prefix_parity(words: Words, carry: int) -> Words:
    """The parity of all bits up to each one, itself among them, and of ``carry``."""
    moved = words << _ONE
    parity = words ^ moved
    for places in _PREFIX_SHIFTS:
        np.left_shift(parity, places, out=moved)
        parity ^= moved
    odd = parity >> _LAST
    np.bitwise_xor.accumulate(odd, out=moved)
    moved ^= odd  # of the words in front of each
    moved ^= np.uint64(carry)
    np.negative(moved, out=moved)  # 1 becomes all bits
    parity ^= moved
    return parity


def _first_bit(words: Words) -> int:
    """Number of the first bit that is set; -1 for none."""
    filled = words != 0
    number = int(filled.argmax())
    if not filled[number]:
        return -1
    word = int(words[number])
    return number * _WORD + (word & -word).bit_length() - 1


def _first_place(first: int, openings: Words, closings: Words) -> int:
    """Where the first quote that must not stand there stands; -1 for none. A closing one has its bit one byte later."""
    found = [at for at in (_first_bit(openings), _first_bit(closings) - 1) if at >= 0]
    return first + min(found) if found else -1


class _Scanner:
    """Scans consecutive windows of text in both cases, 64 bytes at a time as the bits of a word.

    Whether a byte lies inside quotes is the parity of the quotes up to it: the exclusive or of all bits of the mask of
    quotes up to its own, which shifts by 1, 2, 4, ... 32 bits give for all bytes of a word at once (Langdale and
    Lemire, "Parsing gigabytes of JSON per second", 2019, who use one carry-less product). Words are aligned in the
    file.
    """

    def __init__(self, delimiter: str, granule: int) -> None:
        self._delimiter = ord(delimiter)
        self._granule = granule
        self._masks: _Masks | None = None
        self.quotes = 0
        self.records = [0, 0]
        self.violation = [-1, -1]
        self.nul_at = -1
        nothing = np.empty(0, dtype=np.uint64)
        self._newest = [(nothing, 0), (nothing, 0)]  # the last starts of each case, and where their words begin
        self._starts: tuple[list[Integers], list[Integers]] = ([], [])
        self._ordinals: tuple[list[Integers], list[Integers]] = ([], [])

    def feed(self, window: Bytes, offset: int) -> None:
        """Scan window[1:], whose first byte lies at ``offset``; window[0] is the byte before it, a
        line end where the body begins."""
        lead = (offset - 1) % _WORD
        masks = _Masks(lead)
        for begin in range(1, len(window), _BIT_BLOCK):
            masks.take(window[begin - 1 : begin + _BIT_BLOCK])
            # Where the first word begins, in the file.
            self._feed_block(masks, offset + begin - 2 - lead)

    def _feed_block(self, masks: _Masks, first: int) -> None:
        quotes = masks.equal(QUOTE)
        line_ends = masks.equal(LF)
        # The byte before the block is looked at, but was counted with the block before.
        scanned = masks.behind_first()
        controls = masks.at_most(CR)
        controls ^= line_ends
        if controls.any():
            returns = masks.equal(CR)
            line_ends |= returns
            controls ^= returns
            if self.nul_at < 0 and controls.any() and (found := _first_bit(masks.equal(0) & scanned)) >= 0:
                self.nul_at = first + found
        allowed = masks.equal(self._delimiter)
        allowed |= line_ends
        allowed |= quotes
        follows_quote = _shifted(quotes)
        quotes &= scanned
        odd = self.quotes & 1
        inside = _prefix_parity(quotes, odd)  # behind each byte, in case 0
        was_inside = _shifted(inside, odd)  # in front of each byte
        # A quote opens in case 0 where the text is inside behind it, in case 1 where it is not.
        bad_opening = quotes & ~_shifted(allowed)
        bad_closing = follows_quote & ~allowed  # the bit stands on the byte behind the quote
        bad_closing &= scanned
        if self.violation[0] < 0:
            self.violation[0] = _first_place(first, bad_opening & inside, bad_closing & ~was_inside)
        if self.violation[1] < 0:
            self.violation[1] = _first_place(first, bad_opening & ~inside, bad_closing & was_inside)
        # A record starts at a byte that is no line end, behind one, outside quotes.
        starts = _shifted(line_ends)
        starts &= ~line_ends
        starts &= scanned
        add = self._add_starts if self._granule < _BIT_BLOCK else self._add_few_starts
        add(0, starts & ~was_inside, first)
        add(1, starts & was_inside, first)
        self.quotes += int(np.bitwise_count(quotes).sum())

    def _add_starts(self, case: int, starts: Words, first: int) -> None:
        """The first record start of each granule among the bits of ``starts``, whose words begin at ``first``."""
        filled = np.flatnonzero(starts)
        if not filled.size:
            return
        if self._granule < _WORD:
            places = np.flatnonzero(np.unpackbits(starts.view(np.uint8), bitorder="little")) + first
            ordinals = np.arange(places.size)
            num_records = places.size
        else:
            # A word lies in one granule: its first start is enough.
            words = starts[filled]
            counts = np.bitwise_count(words).astype(np.int64)
            ends = np.cumsum(counts)
            places = np.bitwise_count((words & -words) - _ONE) + filled * _WORD + first
            ordinals = ends - counts
            num_records = int(ends[-1])
        keep = _first_of_granules(places, self._granule)
        self._starts[case].append(places[keep])
        self._ordinals[case].append(ordinals[keep] + self.records[case])
        self.records[case] += num_records
        self._newest[case] = (starts, first)

    def _add_few_starts(self, case: int, starts: Words, first: int) -> None:
        """The same for granules of which a block touches two or three."""
        begin = 0
        while begin < starts.size:
            granule = (first + begin * _WORD) // self._granule
            end = min(starts.size, ((granule + 1) * self._granule - first) // _WORD)
            words = starts[begin:end]
            num_records = int(np.bitwise_count(words).sum())
            if num_records:
                place = first + begin * _WORD + _first_bit(words)
                self._starts[case].append(np.array([place], dtype=np.int64))
                self._ordinals[case].append(np.array([self.records[case]], dtype=np.int64))
                self.records[case] += num_records
                self._newest[case] = (words, first + begin * _WORD)
            begin = end

    def _last_start(self, case: int) -> int:
        starts, first = self._newest[case]
        filled = np.flatnonzero(starts)
        return first + int(filled[-1]) * _WORD + int(starts[filled[-1]]).bit_length() - 1 if filled.size else -1

    def result(self, *, digests: bytes, end: int) -> _Scanned:
        def joined(pair: tuple[list[Integers], list[Integers]]) -> tuple[Integers, Integers]:
            none = np.empty(0, dtype=np.int64)
            return np.concatenate([none, *pair[0]]), np.concatenate([none, *pair[1]])

        return _Scanned(
            self.quotes, (self.records[0], self.records[1]), joined(self._starts), joined(self._ordinals),
            (self.violation[0], self.violation[1]), (self._last_start(0), self._last_start(1)),
            self.nul_at, digests, end,
        )


def _first_of_granules(starts: Integers, granule: int) -> npt.NDArray[np.bool_]:
    """Which of the rising ``starts`` are the first ones of their granules."""
    keep = np.ones(starts.size, dtype=np.bool_)
    granules = starts // granule
    np.not_equal(granules[1:], granules[:-1], out=keep[1:])
    return keep


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
    if start < task.end:
        scanner.feed(data[start - 1 - read_start : task.end - read_start], start)
    return scanner.result(digests=digests, end=task.end)


def _scan_stream(file: CSVFile, scanner: _Scanner) -> _Scanned:
    digests = []
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
            position += data.size
    return scanner.result(digests=b"".join(digests), end=position)


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
    all_starts, all_rows = np.concatenate(starts), np.concatenate(rows)
    # Without further starts of a granule that two blocks share, so that chunks leave no trace.
    keep = _first_of_granules(all_starts, granule)
    return Stitched(file, all_starts[keep], all_rows[keep])


def _nul_in_body(file: CSVFile, chunk_start: int, nul_at: int, state: int, rows_before: int) -> CSVError:
    """The error that names the record with a NUL byte, from a second look at its chunk."""
    start = max(chunk_start, file.body_start)
    data = read_range(file, start - 1, nul_at + 1)
    scanner = _Scanner(file.delimiter, 1)
    scanner.feed(np.frombuffer(data, dtype=np.uint8), start)
    before = bytes(read_range(file, max(0, nul_at - 40), nul_at + 1))
    return nul_error(file.location.uri, nul_at, rows_before + scanner.records[state] - 1, before)


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
