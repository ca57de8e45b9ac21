"""One CSV file as bytes and as Python's csv module sees it: what it is, its header, a range of it, its records.

Knows nothing of how files are scanned, cut or parsed in bulk.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Literal, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_qa.errors import CSVError, InputError
from ray_qa.schema import ROW_INDEX
from ray_qa.storage import Location, retry

SCAN_BLOCK = 128 << 10  # temporaries over a block stay in a core's cache
STREAM_BLOCK = 4 << 20
_HEADER_BYTES, _MAX_HEADER_BYTES = 64 << 10, 16 << 20
_MAX_FIELD = 2**31 - 1
LF, CR, QUOTE = 10, 13, 34
DELIMITERS = {",": ",", ";": ";", "tab": "\t"}
UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
SAVE_AS_UTF8 = "save the file as CSV in UTF-8"
Bytes = npt.NDArray[np.uint8]


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


@dataclass(frozen=True)
class Opening:
    location: Location
    required: tuple[str, ...]
    delimiters: tuple[str, ...]


def open_file(opening: Opening) -> CSVFile:
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
        raise CSVError("this is a zip or Excel file, not a CSV", file=uri, allowed=SAVE_AS_UTF8)
    file = CSVFile(opening.location, size, compression, ",", (), 0)
    wanted = _HEADER_BYTES
    while True:
        with open_text(file) as stream:
            head = read_text(file, stream, wanted)
        is_whole = len(head) < wanted
        header = _read_header(head, is_whole, opening, uri)
        if header is not None:
            delimiter, columns, body_start = header
            return replace(file, delimiter=delimiter, columns=columns, body_start=body_start)
        if wanted >= _MAX_HEADER_BYTES:
            raise CSVError(
                f"the header does not end within {_MAX_HEADER_BYTES >> 20} MiB", file=uri, byte_offset=0,
                excerpt=excerpt_of(head, 0), allowed="the first line names the columns; a quote may be missing",
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
    head: bytes, is_whole: bool, opening: Opening, uri: str
) -> tuple[str, tuple[str, ...], int] | None:
    """(delimiter, columns, start of the body); None where more of the file must be seen."""
    allowed = f"needed: a first line with the columns {', '.join(opening.required)}"
    if head.startswith(_UTF16_BOMS):
        raise CSVError("the file is UTF-16 or UTF-32", file=uri, byte_offset=0, allowed=SAVE_AS_UTF8)
    bom = len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0
    readings = []
    for delimiter in opening.delimiters:
        for start, end, fields, is_closed in iter_records(byte_text(io.BytesIO(head[bom:])), delimiter):
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
        raise nul_error(uri, nul_at, None, head[:end])
    if not is_closed:
        raise CSVError(
            "a quote in the header is never closed", file=uri, byte_offset=start,
            excerpt=excerpt_of(head, start), allowed=allowed,
        )
    try:
        names = [name.encode("latin-1").decode("utf-8") for name in _stripped(fields)]
    except UnicodeDecodeError:
        raise CSVError(
            "the header is not UTF-8", file=uri, byte_offset=start, excerpt=excerpt_of(head, start),
            allowed=SAVE_AS_UTF8,
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


def nul_error(uri: str, nul_at: int, record: int | None, before: bytes) -> CSVError:
    return CSVError(
        "a NUL byte: this is no text, or UTF-16 or UTF-32", file=uri, byte_offset=nul_at, record=record,
        excerpt=excerpt_of(before, max(0, len(before) - 40)), allowed=SAVE_AS_UTF8,
    )


def unclosed(file: CSVFile, start: int, record: int) -> CSVError:
    return CSVError(
        "a quote in this record is never closed: the file ends inside it", file=file.location.uri,
        byte_offset=start, record=record, excerpt=excerpt_at(file, start),
        allowed='a quote inside a quoted field is written "", and the field ends with one quote',
    )


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


def iter_records(text: TextIO, delimiter: str) -> Iterator[tuple[int, int, list[str], bool]]:
    """(start, end, fields, whether its quotes are closed) of each record; positions count characters."""
    # The limit is the process's own and 128 KiB by default; it is only ever raised.
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    lines = _Lines(text)
    start = 0
    for fields in csv.reader(lines, delimiter=delimiter):
        if fields:
            yield start, lines.position, fields, not lines.is_past_end
        start = lines.position


def byte_text(stream: IO[bytes]) -> TextIO:
    """Text with a character for each byte: delimiters, quotes and line ends are ASCII in UTF-8 too."""
    return io.TextIOWrapper(stream, encoding="latin-1", newline="")


def count_error(file: CSVFile, start: int, record: int, found: int, excerpt: str) -> CSVError:
    return CSVError(
        f"{found} field{'s' * (found != 1)} where the header has {len(file.columns)}",
        file=file.location.uri, byte_offset=start, record=record, excerpt=excerpt,
        allowed="every record has one field for each column; one that holds a delimiter, a quote or a line "
        "break is quoted",
    )


class _Memory(threading.local):
    """Memory that reads of one thread share: fresh pages for each would cost as much as reading itself."""

    def __init__(self) -> None:
        self._bytes: Bytes = np.empty(0, dtype=np.uint8)

    def of(self, size: int) -> Bytes:
        if self._bytes.size < size:
            self._bytes = np.empty(size, dtype=np.uint8)
        return self._bytes[:size]


_memory = _Memory()


def read_range(file: CSVFile, start: int, end: int) -> pa.Buffer:
    """The stored bytes [start, end), until this thread's next call."""
    data = _memory.of(end - start)

    def read() -> tuple[int, int]:
        with file.location.filesystem.open_input_file(file.location.path) as stored:
            stored.seek(start)
            filled = 0
            while filled < data.size and (count := stored.readinto(data[filled:])):
                filled += count
            return stored.size(), filled

    try:
        size, filled = retry(read)
    except OSError as error:
        raise unreadable(file, error) from error
    if size != file.size or filled != data.size:
        raise CSVError(
            f"the file was changed after it was indexed: it had {file.size} bytes, now {size}",
            file=file.location.uri,
        )
    return pa.py_buffer(data)


def open_text(file: CSVFile) -> pa.NativeFile:
    try:
        return file.location.open_stream(compression=file.compression)
    except OSError as error:
        raise unreadable(file, error) from error


def read_text(file: CSVFile, stream: pa.NativeFile, size: int) -> bytes:
    """The next ``size`` bytes of a stream; fewer only at its end."""
    blocks = []
    try:
        while size > 0 and (block := stream.read(size)):
            blocks.append(block)
            size -= len(block)
    except OSError as error:
        raise unreadable(file, error) from error
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def skip_text(file: CSVFile, stream: pa.NativeFile, size: int) -> None:
    while size > 0 and (block := read_text(file, stream, min(size, STREAM_BLOCK))):
        size -= len(block)


def unreadable(file: CSVFile, error: OSError) -> InputError:
    if file.compression and not isinstance(error, (FileNotFoundError, PermissionError)):
        return CSVError(
            f"the {file.compression} data is damaged or cut short ({error})", file=file.location.uri
        )
    return InputError(f"{file.location.uri}: cannot be read ({error})")


def excerpt_of(text: bytes, start: int) -> str:
    return text[start : start + 80].decode("utf-8", errors="replace")


def excerpt_at(file: CSVFile, start: int) -> str:
    with open_text(file) as stream:
        skip_text(file, stream, start)
        return excerpt_of(read_text(file, stream, 80), 0)
