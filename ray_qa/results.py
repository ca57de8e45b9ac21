"""A folder of answers: part files, the manifest, what is done, and the proof that nothing is missing.

A part file is named by its first row, so that the order of names is the order of the CSV; it carries the
hash of the plan that made it, so that a file of another run cannot slip in. `_plan.json` is written first
and says what the folder is for, `_manifest.json` is written last and says that it is complete; a reader of
the folder skips names that begin with an underscore.

Knows nothing of Ray, of CSV or of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_qa.errors import OutputError, WorkError
from ray_qa.schema import PREDICTIONS, ROW_INDEX, QuestionAnsweringResult
from ray_qa.storage import Location, PathLike, locate

PLAN_NAME = "_plan.json"
MANIFEST_NAME = "_manifest.json"
MANIFEST_VERSION = 1
_PLAN_KEY = b"ray_qa.plan"
_PART_KEY = b"ray_qa.part"


@dataclass(frozen=True)
class PartFile:
    """What is known of one published part: rows [first_row, first_row + num_rows)."""

    first_row: int
    num_rows: int
    num_errors: int
    checksum: str
    """BLAKE2b-128 of the file's bytes, hex."""


def part_name(first_row: int) -> str:
    return f"part-{first_row:012d}.parquet"


def plan_hash(plan: Mapping[str, Any]) -> str:
    """The identity of a run: equal for equal input, model, options and versions."""
    return hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_rows(table: pa.Table, first_row: int, num_rows: int) -> None:
    """Raise WorkError unless ``table`` holds every row of [first_row, first_row + num_rows), in order.

    With a column ``rank`` a row may have several entries; they stand together.
    """
    found = table[ROW_INDEX].to_numpy()
    steps = np.diff(found)
    right_count = len(found) == num_rows or ("rank" in table.column_names and len(found) > num_rows > 0)
    complete = right_count and (
        num_rows == 0
        or (found[0] == first_row and found[-1] == first_row + num_rows - 1 and bool(np.isin(steps, (0, 1)).all()))
    )
    if not complete:
        raise WorkError(
            f"the part of rows {first_row} to {first_row + num_rows - 1} came out with {len(np.unique(found))} "
            f"rows{f' from {found[0]} to {found[-1]}' if len(found) else ''}; a row was lost or doubled"
        )


@dataclass(frozen=True)
class ResultFolder:
    """The output folder of one run; can be pickled, so that workers publish their parts themselves."""

    location: Location
    plan_hash: str

    def publish_part(self, table: pa.Table, first_row: int, num_rows: int) -> PartFile:
        """Write one finished part; all of it becomes visible at once.

        Raises:
            WorkError: ``table`` does not hold exactly the part's rows.
            OutputError: the folder belongs to another run by now, or cannot be written.
        """
        check_rows(table, first_row, num_rows)
        if _read_json(self.location / PLAN_NAME).get("hash") != self.plan_hash:
            raise OutputError(f"{self.location.uri}: the folder was taken over by another run")
        num_errors = _num_error_rows(table)
        part = {"first_row": first_row, "num_rows": num_rows, "num_errors": num_errors}
        metadata = {_PLAN_KEY: self.plan_hash.encode(), _PART_KEY: json.dumps(part).encode()}
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        data = sink.getvalue()
        (self.location / part_name(first_row)).publish(data)
        return PartFile(first_row, num_rows, num_errors, _checksum(data))

    def published(self) -> dict[int, PartFile]:
        """Parts of this plan that are already there, by first row; the files are read and checked.

        Raises:
            OutputError: a part file in the folder is of another plan, or is damaged.
        """
        found = {}
        for info in self.location.list():
            if info.type == pafs.FileType.File and info.base_name.startswith("part-"):
                part = _inspect(self.location / info.base_name, self.plan_hash)
                found[part.first_row] = part
        return found

    def finish(self, plan: Mapping[str, Any], parts: Iterable[PartFile], num_rows: int) -> dict[str, Any]:
        """Prove that ``parts`` and the files in the folder are the same and cover every row once;
        then write the manifest. Returns it."""
        ordered = sorted(parts, key=lambda part: part.first_row)
        prove_tiling(ordered, num_rows)
        names = {i.base_name for i in self.location.list() if i.base_name.startswith("part-")}
        expected = {part_name(part.first_row) for part in ordered}
        if names != expected:
            raise WorkError(
                f"{self.location.uri}: part files and plan differ; missing {sorted(expected - names)[:5]}, "
                f"not of this run {sorted(names - expected)[:5]}"
            )
        manifest = {
            "version": MANIFEST_VERSION,
            "plan": dict(plan),
            "plan_hash": self.plan_hash,
            "num_rows": num_rows,
            "num_parts": len(ordered),
            "num_errors": sum(part.num_errors for part in ordered),
            "parts": [[part.first_row, part.num_rows, part.num_errors, part.checksum] for part in ordered],
        }
        (self.location / MANIFEST_NAME).publish(json.dumps(manifest).encode())
        return manifest


def begin(location: Location, plan: Mapping[str, Any], *, overwrite: bool = False) -> ResultFolder:
    """Take a folder for a run, fresh or to be resumed.

    Raises:
        OutputError: the folder cannot be written, or holds something that is not of this plan and
            ``overwrite`` was not asked for; the message says what differs.
    """
    folder = ResultFolder(location, plan_hash(plan))
    location.make_folder()
    old = _read_json(location / PLAN_NAME)
    if old.get("hash") == folder.plan_hash:
        return folder
    strangers = [info.base_name for info in location.list() if not info.base_name.startswith((".", "_"))]
    if not overwrite and (old or strangers):
        what = _describe_difference(old.get("plan", {}), plan) if old else f"files such as {strangers[0]!r}"
        raise OutputError(
            f"{location.uri}: the folder already holds another run's output ({what}); "
            "allowed: an empty or new folder, the same run again (it resumes), or overwrite"
        )
    foreign = [name for name in strangers if not name.startswith("part-")]
    if foreign:
        raise OutputError(f"{location.uri}: {foreign[0]!r} is no file of ray_qa; it is not overwritten")
    # The manifest goes first: from here on nobody can take what is left for a finished run.
    for name in [MANIFEST_NAME, PLAN_NAME, *strangers]:
        (location / name).delete()
    (location / PLAN_NAME).publish(json.dumps({"hash": folder.plan_hash, "plan": dict(plan)}).encode())
    return folder


def read_manifest(location: Location) -> dict[str, Any] | None:
    """The manifest of a finished folder; None where there is none yet."""
    return _read_json(location / MANIFEST_NAME) or None


def prove_tiling(parts: Sequence[PartFile], num_rows: int) -> None:
    """Raise WorkError unless ``parts``, in order, cover [0, num_rows) without gap or overlap."""
    expected = 0
    for part in parts:
        if part.first_row != expected:
            problem = "are missing" if part.first_row > expected else "are doubled"
            low, high = sorted((expected, part.first_row))
            raise WorkError(f"rows {low} to {high - 1} {problem} between the parts")
        expected += part.num_rows
    if expected != num_rows:
        raise WorkError(f"the parts end at row {expected}, the input at row {num_rows}")


class Answers(Sequence[QuestionAnsweringResult]):
    """The answers of a finished folder, in CSV order, read part by part when they are asked for.

    ``len``, index, slice and iterate like a list; one part at a time is in memory (a few are kept).
    """

    def __init__(self, location: Location) -> None:
        manifest = read_manifest(location)
        if manifest is None:
            raise OutputError(f"{location.uri}: no finished results ({MANIFEST_NAME} is not there)")
        self.location = location
        self.manifest = manifest
        self._firsts = np.array([part[0] for part in manifest["parts"]], dtype=np.int64)
        self._table = lru_cache(maxsize=4)(self._read)

    def __len__(self) -> int:
        return int(self.manifest["num_rows"])

    @overload
    def __getitem__(self, index: int) -> QuestionAnsweringResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[QuestionAnsweringResult]: ...
    def __getitem__(self, index: int | slice) -> QuestionAnsweringResult | list[QuestionAnsweringResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return to_results(self._table(part).slice(row - int(self._firsts[part]), 1))[0]

    def __iter__(self) -> Iterator[QuestionAnsweringResult]:
        for part in range(len(self._firsts)):
            yield from to_results(self._read(part))

    def __repr__(self) -> str:
        return f"<{len(self)} answers in {self.location.uri}>"

    def to_table(self) -> pa.Table:
        """All of it as one Arrow table with the columns of `schema.PREDICTIONS`; needs the memory for it."""
        if not len(self._firsts):
            return PREDICTIONS.empty_table()
        return pa.concat_tables([self._read(part) for part in range(len(self._firsts))])

    def to_pandas(self):
        """All of it as a pandas data frame; needs the memory for it."""
        return self.to_table().to_pandas()

    def _read(self, part: int) -> pa.Table:
        data = (self.location / part_name(int(self._firsts[part]))).read_bytes()
        return pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None)


def open_results(path: PathLike, *, storage_options: Mapping[str, object] | None = None) -> Answers:
    """The answers in a finished output folder of test().

    Raises:
        OutputError: the folder is not there or not finished.
    """
    return Answers(locate(path, storage_options=storage_options))


def to_results(table: pa.Table) -> list[QuestionAnsweringResult]:
    """The rows of a predictions table as named tuples."""
    columns = (table[name].to_pylist() for name in QuestionAnsweringResult._fields)
    return [QuestionAnsweringResult(*values) for values in zip(*columns, strict=True)]


def _num_error_rows(table: pa.Table) -> int:
    return len(table) - table["error"].null_count


def _checksum(data: bytes | pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _inspect(location: Location, expected_plan: str) -> PartFile:
    data = location.read_bytes()
    try:
        metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    except pa.ArrowInvalid as error:
        raise OutputError(f"{location.uri}: not a readable part file ({error})") from error
    if metadata.get(_PLAN_KEY, b"").decode() != expected_plan:
        raise OutputError(f"{location.uri}: the part was written by another run; start afresh with overwrite")
    part = json.loads(metadata[_PART_KEY])
    return PartFile(part["first_row"], part["num_rows"], part["num_errors"], _checksum(data))


def _read_json(location: Location) -> dict[str, Any]:
    try:
        return json.loads(location.read_bytes().to_pybytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"{location.uri}: cannot be read ({error})") from error
    except ValueError as error:
        raise OutputError(f"{location.uri}: not a file of ray_qa ({error})") from error


def _describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changes = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    return "; ".join(changes[:5])
