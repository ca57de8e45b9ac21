"""CSV files read on the cluster: indexed by Ray tasks, cut into parts, parts parsed by Ray Data.

One row of the datasets here is one *run*: the numbers of a few neighbouring parts, which one task reads one
after the other. No text passes through the driver, only the index and these numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from ray_qa import cluster, preflight, storage
from ray_qa.csv_file import Part
from ray_qa.csv_index import CSVIndex, index_csv
from ray_qa.csv_parse import read_parts
from ray_qa.errors import WorkError
from ray_qa.storage import Location, PathLike

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.bz2", ".tsv.bz2", ".csv.zst", ".tsv.zst")

#: Beyond so many runs a task's fixed cost is shared by several parts, up to `MAX_RUN_BYTES`.
MAX_RUNS = 2_000
#: Text that is worth a task: Ray Data looks for finished tasks ten times a second while others are at work, and a CPU
#: may wait that long for its next one.
WORTH_A_RUN_BYTES = 128 << 20
#: Text of a task at most: what is done again where it fails.
MAX_RUN_BYTES = 512 << 20
#: Blocks of the datasets: a worker holds one while it makes it (Ray Data's own 128 MB would be many parts).
BLOCK_BYTES = 32 << 20
#: Parts of `read_csv`, which publishes nothing and so need not have small ones.
READ_PART_BYTES = 16 << 20
#: Chunks below this number are scanned by the driver: a task would cost more than it saves.
_FEW_CHUNKS = 2
_CHUNKS_IN_FLIGHT_PER_CPU = 2

PARTS = "parts"


def index_input(
    paths: PathLike | Sequence[PathLike], *, required_columns: Sequence[str], delimiter: str | None = None,
    part_rows: int | None = None, part_bytes: int | None = None,
    storage_options: Mapping[str, object] | None = None, wait_seconds: float | None = None,
) -> CSVIndex:
    """Find the files and index them, large ones in parallel.

    Args:
        paths: a file, a folder, a glob, or a list of these; local or a URI.
        wait_seconds: how long to wait for a node that takes work, where none is there; see `room.wait`.

    Raises:
        InputError, CSVError: a file is missing or is not the CSV it should be; or a node does not see the same.
        WorkError: there was no node in time.
    """
    locations = storage.expand(paths, suffixes=CSV_SUFFIXES, storage_options=storage_options)
    return index_csv(
        locations, required_columns=required_columns, delimiter=delimiter, part_rows=part_rows,
        part_bytes=part_bytes, map_chunks=partial(_map_on_cluster, locations, wait_seconds),
    )


def _map_on_cluster(
    inputs: Sequence[Location], wait_seconds: float | None, function: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[Any]:
    """``map`` whose calls run as Ray tasks, a bounded number at a time; results in order."""
    items = list(items)
    if len(items) <= _FEW_CHUNKS:
        yield from map(function, items)
        return
    cluster.connect()
    cluster.wait_for_a_node(wait_seconds)
    preflight.check_nodes(inputs=inputs)
    call = ray.remote(num_cpus=1)(function)
    waiting = iter(items)
    # One at least: where there is no CPU yet, a waiting task makes an autoscaler add a node.
    in_flight = max(1, sum(cluster.cpus_per_node()) * _CHUNKS_IN_FLIGHT_PER_CPU)
    pending = [call.remote(item) for item in itertools.islice(waiting, in_flight)]
    while pending:
        yield cluster.get(pending.pop(0))
        pending += [call.remote(item) for item in itertools.islice(waiting, 1)]


def part_runs(
    index: CSVIndex, parts: Sequence[int] | None = None, *, sizes: Iterable[int] = itertools.repeat(1),
    cell_per_block: bool = False,
) -> ray.data.Dataset:
    """A dataset with one row a run, in a block of its own; column ``parts``: list of part numbers.

    ``parts`` (ascending) are the parts wanted, None means all; ``sizes`` says how many of them each run takes. A run
    takes more where they are very many, and no more once it has `MAX_RUN_BYTES`. The parts of a compressed file stay
    in one run, because it can only be read from its beginning. With ``cell_per_block`` each row of a later step is a
    block of its own, for steps whose rows are whole parts; otherwise all parts of a run could end up with one worker.
    Else blocks have `BLOCK_BYTES`, about.
    """
    cluster.connect()
    wanted = np.arange(index.num_parts) if parts is None else np.asarray(parts, dtype=np.int64)
    fewest = -(-len(wanted) // MAX_RUNS)
    next_size = iter(sizes)
    runs: list[list[int]] = []
    last_file, size, num_bytes = -1, 0, 0
    for number in wanted.tolist():
        part = index.part(number)
        goes_on = part.file == last_file and index.files[part.file].compression is not None
        if not runs or ((len(runs[-1]) >= size or num_bytes >= MAX_RUN_BYTES) and not goes_on):
            runs.append([])
            size, num_bytes = max(next(next_size), fewest), 0
        runs[-1].append(number)
        last_file, num_bytes = part.file, num_bytes + part.end - part.start
    column = pa.list_(pa.int64())
    blocks = [pa.table({PARTS: pa.array([run], type=column)}) for run in runs]
    with cluster.data_context(target_max_block_size=1 if cell_per_block else BLOCK_BYTES):
        return ray.data.from_blocks(blocks)  # which keeps a copy of the context


def read_run(
    index: CSVIndex, batch: Mapping[str, Any], columns: Sequence[str] | None = None, *, join_bytes: int = 0
) -> Iterator[tuple[Part, pa.Table]]:
    """The parts that one row of `part_runs` names, each with its table (see `csv_parse.read_part`).

    With ``join_bytes`` neighbouring parts come as one of so many bytes, about: small parts cost more than their text.
    """
    (numbers,) = batch[PARTS]
    parts = (index.part(int(number)) for number in numbers)
    for file, group in itertools.groupby(parts, key=lambda part: part.file):
        yield from read_parts(index.files[file], _joined(group, join_bytes), columns)


def _joined(parts: Iterable[Part], join_bytes: int) -> Iterator[Part]:
    """``parts`` of one file, those that follow each other put together as long as they are below ``join_bytes``."""
    whole: Part | None = None
    for part in parts:
        if whole is not None and whole.end == part.start and part.end - whole.start <= join_bytes:
            whole = dataclasses.replace(whole, end=part.end, num_rows=whole.num_rows + part.num_rows)
            continue
        if whole is not None:
            yield whole
        whole = part
    if whole is not None:
        yield whole


def read_csv(
    paths: PathLike | Sequence[PathLike], *, delimiter: str | None = None, columns: Sequence[str] | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> ray.data.Dataset:
    """Any CSV as a Ray dataset: ``row_index`` (int64), then every column as strings.

    ``row_index`` is the record's exact 0-based position over all files, whatever the number of workers. The
    files are indexed at once (one pass over their bytes), and parsed in parallel when the dataset is consumed. Its
    blocks, and those of steps that follow, have 32 MB at most, about (``dataset.context.target_max_block_size``).

    Args:
        paths: a file, a folder, a glob, or a list of these; local or a URI; gzip, bz2 and zstd too.
        delimiter: "," or ";" or "tab"; None takes it from each header.
        columns: those to read; None reads all.

    Raises:
        InputError, CSVError: a file is missing, or not a CSV that can be read without doubt.
    """
    cluster.connect()
    index = index_input(
        paths, required_columns=columns or (), delimiter=delimiter, part_bytes=READ_PART_BYTES,
        storage_options=storage_options,
    )
    reader = partial(_read_tables, ray.put(index), None if columns is None else list(columns))
    runs = _task_runs(index, worth_bytes=WORTH_A_RUN_BYTES)
    return runs.map_batches(reader, batch_size=1, batch_format="numpy")


def _read_tables(
    index: ray.ObjectRef[CSVIndex], columns: list[str] | None, batch: dict[str, Any]
) -> Iterator[pa.Table]:
    for _, table in read_run(ray.get(index), batch, columns):
        yield table


def check_records(index: CSVIndex, columns: Sequence[str]) -> None:
    """Parse everything once, on the cluster's CPUs. Raises CSVError.

    The index does not see a short record or a byte that is not UTF-8 in a regular file. Parsing it all costs little
    beside a model, and nobody learns of a broken last line after hours of work.
    """
    if not index.num_parts:
        return
    cluster.connect()
    counter = partial(_count_rows, ray.put(index), list(columns))
    counts = _task_runs(index, worth_bytes=WORTH_A_RUN_BYTES).map_batches(counter, batch_size=1, batch_format="numpy")
    num_rows = sum(int(batch["rows"].sum()) for batch in cluster.batches(counts))
    if num_rows != index.num_rows:
        raise WorkError(f"{num_rows} rows were read where the index has {index.num_rows}")


def _count_rows(
    index: ray.ObjectRef[CSVIndex], columns: list[str], batch: dict[str, Any]
) -> Iterator[dict[str, list[int]]]:
    # A generator: what a plain function raises comes back as text alone.
    tables = read_run(ray.get(index), batch, columns, join_bytes=READ_PART_BYTES)
    yield {"rows": [sum(table.num_rows for _, table in tables)]}


def map_parts(
    function: Callable[[pa.Table], Any], index: CSVIndex, *, columns: Sequence[str] | None,
    parts: Sequence[int] | None = None,
) -> Iterable[Any]:
    """``function(table of a part)`` for every part on the cluster's CPUs; results as they come, in no order.

    ``columns`` and ``parts`` (ascending part numbers) are those wanted, None means all.
    """
    cluster.connect()
    if not index.num_parts or (parts is not None and not len(parts)):
        return
    mapper = partial(_call_on_parts, ray.put(index), None if columns is None else list(columns), function)
    results = _task_runs(index, parts).map_batches(mapper, batch_size=1, batch_format="numpy")
    for batch in cluster.batches(results):
        for cell in batch["result"]:
            yield cluster.unpack(cell)


def _task_runs(index: CSVIndex, parts: Sequence[int] | None = None, *, worth_bytes: int = 0) -> ray.data.Dataset:
    """Runs for tasks that only read: `run_sizes` for these parts; a run has ``worth_bytes`` of text, about."""
    num_parts = index.num_parts if parts is None else len(parts)
    part_bytes = max(1, index.num_bytes // max(1, index.num_parts))
    most = max(1, MAX_RUN_BYTES // part_bytes)
    sizes = run_sizes(num_parts, sum(cluster.cpus_per_node()), at_least=worth_bytes // part_bytes, at_most=most)
    return part_runs(index, parts, sizes=sizes)


def run_sizes(num_parts: int, num_cpus: int, *, at_least: int = 1, at_most: int) -> Iterator[int]:
    """How many parts each run takes, so that the runs are few and all CPUs end at about the same time.

    Every round gives each CPU a run, all of one size, which together take two thirds of what is left ("factoring":
    Hummel, Schonberg and Flynn, 1992). Goes on without end in runs of ``at_least`` parts.
    """
    num_cpus = max(1, num_cpus)
    left = num_parts
    while True:
        size = max(1, at_least, min(2 * left // (3 * num_cpus), at_most))
        for _ in range(num_cpus):
            yield size
            left -= size


def _call_on_parts(
    index: ray.ObjectRef[CSVIndex], columns: list[str] | None, function: Callable[[pa.Table], Any],
    batch: dict[str, Any],
) -> Iterator[dict[str, list[bytes]]]:
    for _, table in read_run(ray.get(index), batch, columns):
        yield {"result": [cluster.pack(function(table))]}
