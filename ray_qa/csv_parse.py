"""The rows of a part of a CSV file: by pyarrow where the file keeps RFC 4180, else by Python's csv module.

Whatever is not what the index saw is an error; no record is left out, and none is read in doubt.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from ray_qa.csv_file import (
    QUOTE,
    SAVE_AS_UTF8,
    SCAN_BLOCK,
    UTF8_BOM,
    CSVFile,
    Part,
    byte_text,
    count_error,
    excerpt_of,
    iter_records,
    open_text,
    read_range,
    read_text,
    skip_text,
)
from ray_qa.errors import CSVError
from ray_qa.schema import ROW_INDEX

_PARSE_BLOCK = 1 << 20
_LARGE_PART = 1 << 20


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
    table = _parse(file, part, read_range(file, part.start, part.end), columns)
    if part.end - part.start >= _LARGE_PART:
        # The part's text and what parsing used would stay with the allocator, more with every part.
        pa.default_memory_pool().release_unused()
    return table


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
    with open_text(file) as stream:
        for part in parts:
            if part.start < position:
                raise ValueError(f"{file.location.uri}: parts of a compressed file must be in order")
            skip_text(file, stream, part.start - position)
            data = read_text(file, stream, part.end - part.start)
            position = part.end
            yield part, _parse(file, part, pa.py_buffer(data), columns)


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
    if file.mode == "ranges" and _is_utf8(data) and bytes(data[:3]) != UTF8_BOM:
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
    blocks = (view[i : i + SCAN_BLOCK] for i in range(0, view.size, SCAN_BLOCK))
    if sum(np.count_nonzero(block == QUOTE) for block in blocks) & 1:
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
        for _, _, fields, is_closed in iter_records(io.StringIO(raw.decode("utf-8"), newline=""), file.delimiter):
            if len(fields) != len(file.columns):
                start, record = _record_at(file, part, raw, count)
                raise count_error(file, start, record, len(fields), excerpt_of(raw, start - part.start))
            if not is_closed:
                raise _changed(file, part, "a quote that is never closed")
            count += 1
            for column, position in zip(values, positions, strict=True):
                column.append(fields[position])
    except UnicodeDecodeError as error:
        records = enumerate(iter_records(byte_text(io.BytesIO(raw)), file.delimiter))
        record = next((i for i, (_, end, _, _) in records if error.start < end), 0)
        raise CSVError(
            f"the byte 0x{raw[error.start]:02x} is not UTF-8", file=file.location.uri,
            byte_offset=part.start + error.start, record=part.first_row - file.first_row + record,
            excerpt=excerpt_of(raw, max(0, error.start - 30)), allowed=SAVE_AS_UTF8,
        ) from None
    except csv.Error as error:
        raise _changed(file, part, f"what csv refuses ({error})") from error
    if count != part.num_rows:
        raise _changed(file, part, f"{count} records")
    return [pa.array(column, type=pa.string()) for column in values]


def _record_at(file: CSVFile, part: Part, raw: bytes, count: int) -> tuple[int, int]:
    """First byte, and number in the file, of the record at position ``count`` in a part."""
    start, *_ = next(islice(iter_records(byte_text(io.BytesIO(raw)), file.delimiter), count, None))
    return part.start + start, part.first_row - file.first_row + count


def _changed(file: CSVFile, part: Part, found: str) -> CSVError:
    return CSVError(
        f"the file was changed after it was indexed: bytes {part.start} to {part.end}, which held "
        f"{part.num_rows} records, now hold {found}", file=file.location.uri, byte_offset=part.start,
        record=part.first_row - file.first_row,
    )
