"""Rows whose labels cannot be used: counted before anything expensive starts, refused, or kept apart in a file.

Training and evaluation come here both. Parts are looked at on the cluster; the driver holds counts, and the bad rows
of one part at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_qa import reading, schema
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import BadRowsError, InputError
from ray_qa.labels import LabelReport, bad_row_of, check_labels
from ray_qa.options import allowance
from ray_qa.parquet_files import publish_table, publish_tables
from ray_qa.results import part_name
from ray_qa.storage import Location

if TYPE_CHECKING:
    from ray_qa.windows import WindowMaker

logger = logging.getLogger("ray_qa")

QUARANTINE_NAME = "quarantine.parquet"
_STAGED = "_quarantine"
#: What quarantine.parquet says of a row, after its own fields (which keep their names and are strings).
QUARANTINE = pa.schema([
    pa.field(schema.ROW_INDEX, pa.int64(), nullable=False),
    pa.field("file", pa.string(), nullable=False),
    pa.field("record", pa.int64(), nullable=False),
    pa.field("reason", pa.string(), nullable=False),
    pa.field("column", pa.string(), nullable=False),
    pa.field("found", pa.string(), nullable=False),
    pa.field("mend", pa.string(), nullable=False),
])
#: The reason of rows that no window can hold; those of `labels.REASONS` are the others.
NO_WINDOW = "no_window"


def check_label_rows(
    index: CSVIndex, handle_impossible_answer: bool, max_bad_rows: float, *, extra_columns: tuple[str, ...] = (),
    quarantine: Location | None = None,
) -> LabelReport:
    """Check all labels before anything expensive starts.

    Args:
        quarantine: a folder; bad rows that are let through are written to `QUARANTINE_NAME` in it.

    Raises:
        InputError: there is not one usable row.
        BadRowsError: more bad rows than ``max_bad_rows`` allows.
    """
    labels = LabelReport()
    bad_parts = []
    check = partial(_report_of, handle_impossible_answer)
    if index.num_parts:
        for first_row, part in reading.map_parts(check, index, columns=schema.TRAIN_COLUMNS + extra_columns):
            labels.merge(part)
            if part.num_bad:
                bad_parts.append(first_row)
    refuse_bad_rows(labels.describe(index.locate_row), labels.num_bad, index, max_bad_rows)
    if quarantine is not None:
        write_quarantine(index, bad_parts, quarantine, handle_impossible_answer)
    return labels


def _report_of(handle_impossible_answer: bool, table: pa.Table) -> tuple[int, LabelReport]:
    check = check_labels(table, handle_impossible_answer=handle_impossible_answer)
    return table.column(schema.ROW_INDEX)[0].as_py(), LabelReport().add(check, table)


def refuse_bad_rows(description: str, num_bad: int, index: CSVIndex, max_bad_rows: float) -> None:
    """Raise BadRowsError or InputError where too few rows can be used; ``description`` names them."""
    if not index.num_rows:
        files = ", ".join(file.location.uri for file in index.files[:3])
        raise InputError(f"{files}: there are no rows below the header; at least one labelled row is needed")
    allowed = allowance(max_bad_rows, index.num_rows)
    if num_bad > allowed or num_bad == index.num_rows:
        raise BadRowsError(
            f"{description}\nallowed by max_bad_rows={max_bad_rows:g}: {allowed:,}, and at least one usable row; "
            "mend the rows, or allow more to leave them out"
        )


def write_quarantine(
    index: CSVIndex, first_rows: Sequence[int], folder: Location, handle_impossible_answer: bool, *,
    maker: WindowMaker | None = None,
) -> int:
    """Write the bad rows of the parts that begin at ``first_rows`` to `QUARANTINE_NAME`, in CSV order.

    The file has the rows' own fields and those of `QUARANTINE`; an own field with a name of those is kept as
    ``original_<name>``. Without bad rows no file is left. Returns the number of rows.

    Args:
        maker: for training: also the rows that it can make no windows of.
    """
    target = folder / QUARANTINE_NAME
    if not first_rows:
        target.delete()
        return 0
    wanted = set(first_rows)
    parts = [number for number, part in enumerate(index.parts()) if part.first_row in wanted]
    staged = folder / _STAGED
    write = partial(_stage_part, index, staged, handle_impossible_answer, maker)
    found: dict[int, int] = dict(reading.map_parts(write, index, columns=None, parts=parts))
    staged_parts = [staged / part_name(first_row) for first_row in sorted(found)]
    try:
        _merge(staged_parts, target)
    finally:
        for part in staged_parts:
            part.delete()
        if staged.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(staged.path)
    num_rows = sum(found.values())
    logger.warning("%s bad rows are left out; they and their reasons are in %s", f"{num_rows:,}", target.uri)
    return num_rows


def _stage_part(
    index: CSVIndex, staged: Location, handle_impossible_answer: bool, maker: WindowMaker | None, table: pa.Table
) -> tuple[int, int]:
    """Write one part's bad rows; returns its first row and their number."""
    first_row = table.column(0)[0].as_py()
    # All files' columns: each part then has the whole file's schema.
    names = list(dict.fromkeys(name for file in index.files for name in file.columns))
    bad = bad_rows_of(table, names, index.locate_row, handle_impossible_answer, maker=maker)
    publish_table(bad, staged / part_name(first_row))
    return first_row, len(bad)


def bad_rows_of(
    table: pa.Table, names: Sequence[str], locate_row: Callable[[int], tuple[str, int]],
    handle_impossible_answer: bool, *, maker: WindowMaker | None = None,
) -> pa.Table:
    """The bad rows of a part (row_index first, then its own columns), as `write_quarantine` writes them.

    ``names`` are the own columns wanted; null where the part has no such column.
    """
    row_index = table.column(0)
    # A header may name a column twice, or have a row_index of its own: the first of each is taken.
    own = {name: table.column(i) for i, name in reversed(list(enumerate(table.column_names))) if i}
    labelled = {name: own[name] for name in (*schema.TRAIN_COLUMNS, schema.ANSWERS) if name in own}
    table = pa.table({schema.ROW_INDEX: row_index} | labelled)
    check = check_labels(table, handle_impossible_answer=handle_impossible_answer)
    problems: dict[int, tuple[str, str, str, str]] = {}
    for row in np.flatnonzero(~check.usable).tolist():
        bad = bad_row_of(table.slice(row, 1).to_pylist()[0], check.reason[row])
        problems[row] = (bad.reason, bad.column, bad.found, bad.mend)
    if maker is not None:
        usable = np.flatnonzero(check.usable)
        chosen = table.take(pa.array(usable))
        questions = chosen.column(schema.QUESTION).to_pylist()
        made = maker.make(chosen.column(schema.CONTEXT).to_pylist(), questions)
        for position, why in made.errors.items():
            problems[int(usable[position])] = (NO_WINDOW, schema.QUESTION, repr(questions[position][:60]), why)
    rows = sorted(problems)
    taken = pa.array(rows, pa.int64())
    indices = row_index.take(taken)
    places = [locate_row(row) for row in indices.to_pylist()]
    facts = [problems[row] for row in rows]
    columns = [
        indices, pa.array([file for file, _ in places], pa.string()), pa.array([n for _, n in places], pa.int64()),
        *(pa.array([fact[i] for fact in facts], pa.string()) for i in range(4)),
    ]
    described = pa.Table.from_arrays(columns, schema=QUARANTINE)
    for name in names:
        values = own[name].take(taken) if name in own else pa.nulls(len(rows), pa.string())
        described = described.append_column(f"original_{name}" if name in QUARANTINE.names else name, values)
    return described


def _merge(parts: Sequence[Location], target: Location) -> None:
    tables = (pq.read_table(pa.BufferReader(part.read_bytes())) for part in parts)
    first = next(tables)
    publish_tables(itertools.chain([first], tables), first.schema, target)
