"""A folder of answers: part files, the manifest, what is done, and the proof that nothing is missing.

A part file is named by its first row, so that the order of names is the order of the CSV; its Parquet footer carries
the hash of the plan that made it, so that a file of another run cannot slip in, and a checksum of the pages before it.
So the footer tells what a part is, the file's size whether all of it is there, and a checksum of the footer stands for
the whole file; the pages are read again by `verify` alone. `_plan.json` is written first and says what the folder is
for, `_manifest.json` is written last and says that it is complete; a reader of the folder skips names that begin with
an underscore.

Knows nothing of Ray, of CSV or of models.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_qa.errors import OutputError, WorkError
from ray_qa.parquet_files import publish_tables
from ray_qa.schema import PREDICTIONS, RANK, ROW_INDEX, QuestionAnsweringResult
from ray_qa.storage import Location, PathLike, locate, retry

#: What a row comes down to: its answer, or with ``top_k > 1`` its answers, best first.
#: (A union would make every ``answers[0].answer`` a type error.)
RowAnswers: TypeAlias = Any

T = TypeVar("T")
U = TypeVar("U")

PLAN_NAME = "_plan.json"
MANIFEST_NAME = "_manifest.json"
MANIFEST_VERSION = 2
_PLAN_KEY = b"ray_qa.plan"
_PART_KEY = b"ray_qa.part"
#: Files that are looked at at a time; the waiting is the storage's.
_THREADS = 16
#: Names of files that a writer leaves behind when it is killed; see `Location.publish`.
_LEFT_BEHIND = ("_part-", f"_{PLAN_NAME}.", f"_{MANIFEST_NAME}.", "_probe.")
#: Read at a file's end: as much as a footer of a few columns takes.
_FOOTER_BYTES = 16 << 10
#: Differences that an error lists.
_LISTED = 5


@dataclass(frozen=True)
class PartFile:
    """What is known of one published part: rows [first_row, first_row + num_rows)."""

    first_row: int
    num_rows: int
    num_errors: int
    checksum: str
    """BLAKE2b-128 of the file's footer, hex, which holds that of the pages."""
    num_bytes: int = 0
    """Of the whole file."""


def part_name(first_row: int) -> str:
    return f"part-{first_row:012d}.parquet"


def part_sizes(location: Location) -> dict[str, int]:
    """Name and size of every part file in a folder."""
    return {
        info.base_name: info.size for info in location.list()
        if info.type == pafs.FileType.File and info.base_name.startswith("part-")
    }


def check_part_names(location: Location, first_rows: Iterable[int]) -> None:
    """Raise WorkError unless the folder holds the part files of exactly these first rows."""
    _same_names(location, set(part_sizes(location)), set(map(part_name, first_rows)))


def plan_hash(plan: Mapping[str, Any]) -> str:
    """The identity of a run: equal for equal input, model, options and versions."""
    return hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_rows(table: pa.Table, first_row: int, num_rows: int) -> None:
    """Raise WorkError unless ``table`` holds every row of [first_row, first_row + num_rows), in order.

    With a column ``rank`` a row may have several entries: they stand together and count from 0.
    """
    found = table[ROW_INDEX].to_numpy()
    if RANK in table.column_names:
        rank, starts = table[RANK].to_numpy(), np.flatnonzero(np.diff(found, prepend=first_row - 1))
        if np.any(rank != np.arange(len(found)) - np.repeat(starts, np.diff(starts, append=len(found)))):
            raise WorkError(f"the part of row {first_row}: the answers of a row do not stand together in their order")
    steps = np.diff(found)
    right_count = len(found) == num_rows or (RANK in table.column_names and len(found) > num_rows > 0)
    complete = right_count and (
        num_rows == 0
        or (found[0] == first_row and found[-1] == first_row + num_rows - 1 and bool((steps >> 1 == 0).all()))
    )
    if not complete:
        raise WorkError(
            f"the part of rows {first_row} to {first_row + num_rows - 1} came out with {len(np.unique(found))} "
            f"rows{f' from {found[0]} to {found[-1]}' if len(found) else ''}; a row was lost or doubled"
        )


def check_answers(contexts: pa.ChunkedArray, predictions: pa.Table) -> None:
    """Raise WorkError unless ``context[start:end] == answer`` in every line; each context has a prediction, or several
    with a column ``rank``."""
    if RANK in predictions.column_names:
        contexts = contexts.take(pa.array(row_numbers(predictions)))
    given = pc.or_(pc.not_equal(predictions["answer"], ""), pc.not_equal(predictions["end"], predictions["start"]))
    rows = pc.indices_nonzero(given)
    columns = (predictions[name].take(rows).to_pylist() for name in (ROW_INDEX, "start", "end", "answer"))
    for context, row, start, end, answer in zip(contexts.take(rows).to_pylist(), *columns, strict=True):
        if context[start:end] != answer:
            raise WorkError(f"row {row}: the answer {answer!r} does not stand at [{start}, {end}) of the context")


def row_numbers(predictions: pa.Table) -> npt.NDArray[np.int64]:
    """For each line of a predictions table the number of its row in it: 0, 0, 0, 1, ... with a column ``rank``."""
    if RANK not in predictions.column_names:
        return np.arange(len(predictions))
    return np.cumsum(predictions[RANK].to_numpy() == 0) - 1


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
        data, num_page_bytes = _to_parquet(table, self.plan_hash, part)
        (self.location / part_name(first_row)).publish(data)
        return PartFile(first_row, num_rows, num_errors, _checksum(memoryview(data)[num_page_bytes:]), len(data))

    def find(self, first_row: int) -> PartFile | None:
        """The part that begins at ``first_row``, where it is already there."""
        location = self.location / part_name(first_row)
        return _inspect(location, self.plan_hash) if location.exists() else None

    def published(self) -> dict[int, PartFile]:
        """Parts of this plan that are already there, by first row; their footers are read, several at a time.

        Raises:
            OutputError: a part file in the folder is of another plan, or is damaged.
        """
        found = _in_parallel(lambda name: _inspect(self.location / name, self.plan_hash), part_sizes(self.location))
        return {part.first_row: part for part in found}

    def part_names(self) -> set[str]:
        """Names of the part files that are there; nothing is read."""
        return set(part_sizes(self.location))

    def _delete_damaged(self) -> None:
        def check(name: str) -> None:
            try:
                _inspect(self.location / name, self.plan_hash, whole=True)
            except (OutputError, WorkError):
                (self.location / name).delete()

        for _ in _in_parallel(check, part_sizes(self.location)):
            pass

    def finish(
        self, plan: Mapping[str, Any], parts: Iterable[PartFile], num_rows: int, *, checked: Collection[int] = ()
    ) -> dict[str, Any]:
        """Prove that ``parts`` and the files in the folder are the same and cover every row once; then write the
        manifest. Returns it.

        Names and sizes are compared for all parts, and what the footers say (checksums among it) for those that are
        not ``checked``, by first row: those that `published` has just found.

        Raises:
            WorkError: they are not; the message names rows or files.
        """
        ordered = sorted(parts, key=lambda part: part.first_row)
        prove_tiling(ordered, num_rows)
        sizes = part_sizes(self.location)
        expected = {part_name(part.first_row): part for part in ordered}
        _same_names(self.location, set(sizes), set(expected))
        skip = checked if isinstance(checked, (set, dict)) else set(checked)

        def difference(name: str) -> str | None:
            part = expected[name]
            found = part if part.first_row in skip else _inspect(self.location / name, self.plan_hash)
            if found == part and sizes[name] == part.num_bytes:
                return None
            return f"{name} is not the file that was published: {found}, {sizes[name]} bytes, in place of {part}"

        try:
            different = [text for text in _in_parallel(difference, expected) if text is not None]
        except OutputError as error:
            raise WorkError(str(error)) from error
        if different:
            raise WorkError(f"{self.location.uri}: {'; '.join(different[:_LISTED])}")
        manifest = {
            "version": MANIFEST_VERSION,
            "plan": dict(plan),
            "plan_hash": self.plan_hash,
            "num_rows": num_rows,
            "num_parts": len(ordered),
            "num_errors": sum(part.num_errors for part in ordered),
            "parts": [
                [part.first_row, part.num_rows, part.num_errors, part.checksum, part.num_bytes] for part in ordered
            ],
        }
        for info in self.location.list():
            if info.base_name.startswith(_LEFT_BEHIND):
                (self.location / info.base_name).delete()
        (self.location / MANIFEST_NAME).publish(json.dumps(manifest).encode())
        return manifest


def begin(location: Location, plan: Mapping[str, Any], *, overwrite: bool = False) -> ResultFolder:
    """Take a folder for a run, fresh or to be resumed.

    With ``overwrite``: another run's output, and a finished one of this very plan, are thrown away; an unfinished one
    of this plan is resumed, without its damaged parts. So a command with ``overwrite`` goes on, too, when it is
    started again after it was killed.

    Raises:
        OutputError: the folder cannot be written, or holds something that is not of this plan and
            ``overwrite`` was not asked for; the message says what differs.
    """
    folder = ResultFolder(location, plan_hash(plan))
    location.make_folder()
    old = _read_json(location / PLAN_NAME)
    if old.get("hash") == folder.plan_hash:
        if not overwrite:
            return folder
        if not (location / MANIFEST_NAME).exists():
            folder._delete_damaged()
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
    # The manifest goes first: from here on nobody can take what is left for a finished run. The plan goes before the
    # parts: nobody can take what is left of them for this run's.
    for name in (MANIFEST_NAME, PLAN_NAME):
        (location / name).delete()
    for _ in _in_parallel(lambda name: (location / name).delete(), strangers):
        pass
    (location / PLAN_NAME).publish(json.dumps({"hash": folder.plan_hash, "plan": dict(plan)}).encode())
    return folder


def read_manifest(location: Location) -> dict[str, Any] | None:
    """The manifest of a finished folder; None where there is none yet."""
    return _read_json(location / MANIFEST_NAME) or None


class Stretch(Protocol):
    """Rows [first_row, first_row + num_rows)."""

    @property
    def first_row(self) -> int: ...
    @property
    def num_rows(self) -> int: ...


def prove_tiling(parts: Sequence[Stretch], num_rows: int) -> None:
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


@dataclass(frozen=True)
class Verification:
    """What `verify` found to hold."""

    num_rows: int
    num_parts: int
    num_errors: int
    num_bytes: int


def verify(path: PathLike, *, storage_options: Mapping[str, object] | None = None) -> Verification:
    """Prove a finished folder again: every byte of every part is read.

    The parts tile [0, N); each is of the manifest's plan, has the size, the checksum and the counts that the manifest
    says, and holds every row of its own in order; no part file is there beside them.

    Raises:
        OutputError: there is no finished folder.
        WorkError: something does not hold; the message names the files.
    """
    location = locate(path, storage_options=storage_options)
    manifest = _finished(location)
    parts = [PartFile(*part) for part in manifest["parts"]]
    prove_tiling(parts, manifest["num_rows"])
    plan = manifest["plan_hash"]
    problems = [] if plan == plan_hash(manifest["plan"]) else [f"{MANIFEST_NAME}: the plan is not that of its hash"]
    for name, total in (("num_parts", len(parts)), ("num_errors", sum(part.num_errors for part in parts))):
        if manifest[name] != total:
            problems.append(f"{MANIFEST_NAME}: {name} is {manifest[name]}, its parts have {total}")
    check_part_names(location, (part.first_row for part in parts))

    def problem(part: PartFile) -> str | None:
        name = part_name(part.first_row)
        try:
            read = _inspect(location / name, plan, whole=True)
        except (OutputError, WorkError) as error:
            return str(error)
        return None if read == part else f"{name}: the manifest has {part}, the file is {read}"

    problems += [text for text in _in_parallel(problem, parts) if text is not None]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise WorkError(f"{location.uri}: not what the manifest says: {'; '.join(problems[:_LISTED])}{more}")
    return Verification(
        manifest["num_rows"], len(parts), manifest["num_errors"], sum(part.num_bytes for part in parts)
    )


class Answers(Sequence[RowAnswers]):
    """The answers of a finished folder, in CSV order, read part by part when they are asked for.

    One named tuple for each row, or with ``top_k > 1`` a list of them, best first.
    ``len``, index, slice and iterate like a list; one part at a time is in memory (a few are kept). Can be pickled:
    it is the place that travels, not the answers.
    """

    def __init__(self, location: Location) -> None:
        manifest = _finished(location)
        parts = manifest.pop("parts")
        self.location = location
        self.manifest: dict[str, Any] = manifest
        """Of the whole folder: num_rows, num_parts, num_errors, plan."""
        self._firsts = np.array([part[0] for part in parts], dtype=np.int64)
        self._table: Callable[[int], pa.Table] = lru_cache(maxsize=4)(self._read)

    def __reduce__(self) -> tuple[type[Answers], tuple[Location]]:
        return Answers, (self.location,)

    def __len__(self) -> int:
        return int(self.manifest["num_rows"])

    @overload
    def __getitem__(self, index: int) -> RowAnswers: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowAnswers]: ...
    def __getitem__(self, index: int | slice) -> RowAnswers | list[RowAnswers]:
        if isinstance(index, slice):
            return self._slice(range(*index.indices(len(self))))
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = self._part_of(row)
        return to_results(_rows(self._table(part), np.array([row - int(self._firsts[part])])))[0]

    def _part_of(self, row: int) -> int:
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _slice(self, rows: range) -> list[RowAnswers]:
        found: list[RowAnswers] = []
        for part, group in itertools.groupby(rows, key=self._part_of):
            positions = np.fromiter(group, np.int64) - self._firsts[part]
            found += to_results(_rows(self._table(part), positions))
        return found

    def __iter__(self) -> Iterator[RowAnswers]:
        for table in self._tables():
            yield from to_results(table)

    def __repr__(self) -> str:
        return f"<{len(self)} answers in {self.location.uri}>"

    def to_table(self) -> pa.Table:
        """All of it as one Arrow table with the columns of the part files; needs the memory for it."""
        tables = list(self._tables())
        return pa.concat_tables(tables) if tables else PREDICTIONS.empty_table()

    def to_pandas(self):
        """All of it as a pandas data frame; needs the memory for it."""
        return self.to_table().to_pandas()

    def write_parquet(
        self, path: PathLike, *, overwrite: bool = False, storage_options: Mapping[str, object] | None = None
    ) -> bool:
        """Stream all parts in order into one Parquet file, which becomes visible when it is complete.

        A few parts and one row group are in memory at a time. Returns False where the file was already there,
        complete and of this very run.

        Raises:
            OutputError: see `check_single_file`, or it cannot be written.
            WorkError: the parts do not give the rows that the manifest says.
        """
        target = check_single_file(
            path, self.location, self.manifest["plan_hash"], overwrite=overwrite, storage_options=storage_options
        )
        if not overwrite and _single_file_plan(target) == self.manifest["plan_hash"]:
            return False
        tables = self._tables()
        first = next(tables, PREDICTIONS.empty_table())
        metadata = {_PLAN_KEY: str(self.manifest["plan_hash"]).encode()}
        everything = self._counted(itertools.chain([first], tables))
        publish_tables(everything, first.schema.with_metadata(metadata), target)
        return True

    def _counted(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        num_rows = 0
        for table in tables:
            num_rows += len(table) and int(row_numbers(table)[-1]) + 1
            yield table
        if num_rows != len(self):
            raise WorkError(f"{self.location.uri}: {num_rows} rows came out of the parts, {len(self)} are expected")

    def _tables(self) -> Iterator[pa.Table]:
        return _in_parallel(self._read, range(len(self._firsts)), threads=4)

    def _read(self, part: int) -> pa.Table:
        location = self.location / part_name(int(self._firsts[part]))
        try:
            return pq.ParquetFile(pa.BufferReader(location.read_bytes())).read().replace_schema_metadata(None)
        except (OSError, pa.ArrowInvalid) as error:
            raise OutputError(f"{location.uri}: cannot be read ({error}); the manifest names it") from error


def open_results(path: PathLike, *, storage_options: Mapping[str, object] | None = None) -> Answers:
    """The answers in a finished output folder of test().

    Raises:
        OutputError: the folder is not there or not finished.
    """
    return Answers(locate(path, storage_options=storage_options))


def check_single_file(
    path: PathLike, folder: Location, plan: str | None, *, overwrite: bool = False,
    storage_options: Mapping[str, object] | None = None,
) -> Location:
    """Where `Answers.write_parquet` may write.

    Raises:
        OutputError: inside ``folder``, where readers would find every row twice; a folder; or a file that is there
            and not of ``plan`` (any plan, where that is None), without ``overwrite``.
    """
    target = locate(path, storage_options=storage_options)
    if target.path.startswith(f"{folder.path.rstrip('/')}/") or target.path == folder.path:
        raise OutputError(
            f"{target.uri}: the single file lies in the output folder {folder.uri}, whose readers would find every row "
            "twice; allowed: any other place"
        )
    info = target.info()
    if info.type == pafs.FileType.Directory:
        raise OutputError(f"{target.uri}: is a folder; allowed: the name of a file")
    if info.type == pafs.FileType.File and not overwrite:
        found = _single_file_plan(target)
        if found is None or plan not in (None, found):
            raise OutputError(f"{target.uri}: the file is there and not of this run; allowed: a new name, or overwrite")
    return target


def to_lines(table: pa.Table) -> list[QuestionAnsweringResult]:
    """The lines of a predictions table as named tuples."""
    columns = (table[name].to_pylist() for name in QuestionAnsweringResult._fields)
    return [QuestionAnsweringResult(*values) for values in zip(*columns, strict=True)]


def to_results(table: pa.Table) -> list[RowAnswers]:
    """The rows of a predictions table as named tuples; with a column ``rank`` a list of them for each row."""
    lines = to_lines(table)
    if RANK not in table.column_names:
        return list(lines)
    bounds = np.append(np.flatnonzero(table[RANK].to_numpy() == 0), len(lines)).tolist()
    return [lines[start:stop] for start, stop in itertools.pairwise(bounds)]


def _rows(table: pa.Table, numbers: npt.NDArray[np.int64]) -> pa.Table:
    """The lines of the given rows of a predictions table, in that order."""
    if RANK not in table.column_names:
        return table.take(pa.array(numbers))
    bounds = np.append(np.flatnonzero(table[RANK].to_numpy() == 0), len(table))
    wanted = [np.arange(bounds[number], bounds[number + 1]) for number in numbers]
    return table.take(pa.array(np.concatenate([*wanted, np.zeros(0, np.int64)]).astype(np.int64)))


def _num_error_rows(table: pa.Table) -> int:
    return len(table) - table["error"].null_count


def _to_parquet(table: pa.Table, plan: str, part: Mapping[str, int]) -> tuple[bytes, int]:
    """A part as a Parquet file, and the number of its bytes before the footer, whose checksum the footer carries."""
    sink = io.BytesIO()
    writer = pq.ParquetWriter(sink, table.schema.remove_metadata())
    writer.write_table(table.replace_schema_metadata(None))
    # All pages are out: closing adds the footer alone.
    num_bytes = sink.tell()
    known = {**part, "page_bytes": num_bytes, "page_checksum": _checksum(sink.getvalue())}
    writer.add_key_value_metadata({_PLAN_KEY.decode(): plan, _PART_KEY.decode(): json.dumps(known)})
    writer.close()
    return sink.getvalue(), num_bytes


def _checksum(data: bytes | memoryview | pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _inspect(location: Location, expected_plan: str, *, whole: bool = False) -> PartFile:
    """What a part's footer says of it, and whether its size is right; ``whole``: and whether its pages are.

    Raises:
        OutputError: it is damaged, or of another plan.
    """
    def damaged(why: object) -> OutputError:
        return OutputError(f"{location.uri}: not a readable part file ({why}); overwrite replaces it")

    def read() -> tuple[bytes, int]:
        """The footer, with its length and the magic word behind it, and the size of the file."""
        with location.filesystem.open_input_file(location.path) as file:
            size = file.size()
            tail = file.read_at(min(size, _FOOTER_BYTES), max(0, size - _FOOTER_BYTES))
            wanted = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < wanted <= size:
                tail = file.read_at(wanted, size - wanted)
            return tail[-wanted:], size

    try:
        tail, size = retry(read)
        footer = pq.read_metadata(pa.BufferReader(tail))
    except pa.ArrowInvalid as error:
        raise damaged(error) from error
    except OSError as error:
        raise OutputError(f"{location.uri}: cannot be read ({error})") from error
    metadata = footer.metadata or {}
    if metadata.get(_PLAN_KEY) != expected_plan.encode():
        raise OutputError(f"{location.uri}: the part was written by another run; start afresh with overwrite")
    try:
        part = json.loads(metadata[_PART_KEY])
    except (KeyError, ValueError) as error:
        raise damaged(error) from error
    if size != part["page_bytes"] + len(tail):
        raise damaged(f"{size} bytes in place of {part['page_bytes'] + len(tail)}")
    found = PartFile(part["first_row"], part["num_rows"], part["num_errors"], _checksum(tail), size)
    if location.name != part_name(found.first_row):
        raise damaged(f"it is the part of row {found.first_row}")
    if whole:
        data = location.read_bytes()
        if _checksum(data.slice(0, part["page_bytes"])) != part["page_checksum"]:
            raise damaged("its checksum differs")
        # Not read_table, which makes a dataset of the file first: three times as long for a small part.
        file = pq.ParquetFile(pa.BufferReader(data), metadata=footer)
        if not {ROW_INDEX, "error"} <= set(file.schema_arrow.names):
            raise damaged(f"its columns are {', '.join(file.schema_arrow.names)}")
        names = [name for name in (ROW_INDEX, RANK, "error") if name in file.schema_arrow.names]
        table = file.read(columns=names, use_threads=False)
        try:
            check_rows(table, found.first_row, found.num_rows)
        except WorkError as error:
            raise damaged(error) from error
        if _num_error_rows(table) != found.num_errors:
            raise damaged(f"{_num_error_rows(table)} rows with an error in place of {found.num_errors}")
    return found


def _single_file_plan(target: Location) -> str | None:
    """The plan that a single file was written by, None where it is no such file; it is whole, or not there."""
    try:
        with target.filesystem.open_input_file(target.path) as file:
            plan = (pq.read_metadata(file).metadata or {}).get(_PLAN_KEY)
    except (pa.ArrowInvalid, OSError):
        return None
    return None if plan is None else plan.decode()


def _same_names(location: Location, found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise WorkError(
            f"{location.uri}: part files and plan differ; missing {sorted(expected - found)[:_LISTED]}, "
            f"not of this run {sorted(found - expected)[:_LISTED]}"
        )


def _in_parallel(call: Callable[[T], U], items: Iterable[T], *, threads: int = _THREADS) -> Iterator[U]:
    """``map(call, items)`` by threads; a bounded number of results wait to be taken."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(items)
        pending = deque(pool.submit(call, item) for item in itertools.islice(waiting, threads * 2))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(call, item) for item in itertools.islice(waiting, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def _finished(location: Location) -> dict[str, Any]:
    manifest = read_manifest(location)
    if manifest is None:
        raise OutputError(f"{location.uri}: no finished results ({MANIFEST_NAME} is not there)")
    return manifest


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
