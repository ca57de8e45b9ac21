"""Parquet files that appear when they are complete: one table, or many streamed into one file.

Knows nothing of what the columns mean.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from ray_qa.errors import OutputError
from ray_qa.storage import Location

#: A row group ends with the table that fills one of these.
GROUP_ROWS = 1 << 17
GROUP_BYTES = 64 << 20


def publish_table(table: pa.Table, target: Location) -> None:
    """Write a table as one file.

    Raises:
        OutputError: it cannot be written.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    target.publish(sink.getvalue())


def publish_tables(tables: Iterable[pa.Table], schema: pa.Schema, target: Location) -> None:
    """Write tables of one schema, in order, as one file; one row group of them is in memory at a time.

    Whatever ``tables`` raises leaves no file behind.

    Raises:
        OutputError: it cannot be written.
    """
    staged = target.path
    if target.is_local:
        folder, _, name = target.path.rpartition("/")
        staged = f"{folder}/_{name}.{uuid.uuid4().hex}"
    try:
        if target.is_local:
            os.makedirs(os.path.dirname(staged), exist_ok=True)
        with target.filesystem.open_output_stream(staged) as stream, pq.ParquetWriter(stream, schema) as writer:
            for group in _groups(tables):
                table = pa.concat_tables(group).replace_schema_metadata(schema.metadata)
                writer.write_table(table, row_group_size=max(1, len(table)))
        if target.is_local:
            with open(staged, "rb") as written:
                os.fsync(written.fileno())
            os.replace(staged, target.path)
    except BaseException as error:
        # An object store shows what was written so far when the stream is closed: it is taken away again.
        with contextlib.suppress(OSError):
            target.filesystem.delete_file(staged)
        if isinstance(error, OSError):
            raise OutputError(f"{target.uri}: cannot be written ({error})") from error
        raise


def _groups(tables: Iterable[pa.Table]) -> Iterator[Sequence[pa.Table]]:
    group: list[pa.Table] = []
    num_rows = num_bytes = 0
    for table in tables:
        group.append(table)
        num_rows += len(table)
        num_bytes += table.nbytes
        if num_rows >= GROUP_ROWS or num_bytes >= GROUP_BYTES:
            yield group
            group, num_rows, num_bytes = [], 0, 0
    if group:
        yield group
