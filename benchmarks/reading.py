"""How fast a CSV with quoted newlines is indexed and parsed, beside other readers on the same file.

    .venv/bin/pip install --constraint constraints.txt --editable '.[bench]'   # polars and duckdb
    .venv/bin/python benchmarks/reading.py --gigabytes 2

Every figure is the median of ``--repeats`` runs, the readers taking turns. ``read_csv`` is measured from the call
(so with its index) to the last row, consumed by a task that keeps one number a block; nothing is collected in the
driver. `ray.data.read_csv` is consumed in the same way. The single-process readers load the whole file into memory
with all threads that the machine has.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ray_qa.reading import READ_PART_BYTES

WORDS = (
    "the of and in to a was is for as on with by that it from at his an were are which this also be had or has first "
    "their its new after but who not they have her she two been other when there all during into school time"
).split()
#: A tenth of the file: enough for every worker to have started and imported what it needs.
WARM_UP = "tenth.csv"
COLUMNS = ("id", "context", "question", "answer_text", "answer_start")


def make_csv(path: Path, num_bytes: int) -> int:
    """Write rows shaped like SQuAD's (five questions to a context, quoted newlines); returns their number."""
    pick = random.Random(7)
    num_rows = 0
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        while stream.tell() < num_bytes:
            words = pick.choices(WORDS, k=pick.randint(60, 180))
            context = " ".join(words[:40]) + '\n"' + " ".join(words[40:]) + '", they said.'
            for _ in range(5):
                answer = " ".join(words[3:6])
                question = f"What is it, {' '.join(pick.choices(WORDS, k=8))}?"
                writer.writerow((num_rows, context, question, answer, context.index(answer)))
                num_rows += 1
    return num_rows


def rows_by_ray_qa(path: Path) -> int:
    from ray_qa import read_csv

    return _count(read_csv(path))


def rows_by_ray_data(path: Path) -> int:
    import pyarrow.csv as pacsv
    import ray.data

    return _count(ray.data.read_csv(str(path), parse_options=pacsv.ParseOptions(newlines_in_values=True)))


def _count(dataset) -> int:
    """The dataset's rows, every column of which was made."""
    counts = dataset.map_batches(
        lambda table: {"rows": [table.num_rows]}, batch_size=None, batch_format="pyarrow", zero_copy_batch=True
    )
    return sum(int(batch["rows"].sum()) for batch in counts.iter_batches(batch_size=None, batch_format="numpy"))


def rows_by_pyarrow(path: Path) -> int:
    import pyarrow.csv as pacsv

    return pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True)).num_rows


def rows_by_polars(path: Path) -> int:
    import polars

    return polars.read_csv(path).height


def rows_by_duckdb(path: Path) -> int:
    import duckdb

    return duckdb.read_csv(str(path), header=True, quotechar='"', all_varchar=True).to_arrow_table().num_rows


def measure_on_ray(read: Callable[[Path], int], path: Path, num_cpus: int, repeats: int, results) -> None:
    """In a process of its own: a Ray with ``num_cpus``, one run to warm it up, then the timed ones."""
    import ray

    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for number in range(repeats + 1):
        started = time.perf_counter()
        rows = read(path if number else path.with_name(WARM_UP))
        if number:
            results.put((rows, time.perf_counter() - started))
    ray.shutdown()


def measure_alone(read: Callable[[Path], int], path: Path, num_cpus: int, repeats: int, results) -> None:
    for number in range(repeats + 1):
        started = time.perf_counter()
        rows = read(path if number else path.with_name(WARM_UP))
        if number:
            results.put((rows, time.perf_counter() - started))


def peak_of_worker(path: Path, part_bytes: int | None, results) -> None:
    """Peak memory (bytes) of a process that parses part after part, above what it has after its imports."""
    from ray_qa import csv_index
    from ray_qa.storage import locate

    index = csv_index.index_csv([locate(path)], required_columns=["context"], part_bytes=part_bytes)
    process = multiprocessing.get_context("spawn").Process(target=_parse_parts, args=(index, results))
    process.start()
    process.join()


def _parse_parts(index, results) -> None:
    import psutil

    from ray_qa import csv_parse

    process = psutil.Process()
    baseline = process.memory_info().rss
    peak, done = baseline, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    for _, _table in csv_parse.read_parts(index.files[0], index.parts()):
        peak = max(peak, process.memory_info().rss)
    done.set()
    thread.join()
    part_bytes = max(part.end - part.start for part in index.parts())
    results.put((peak - baseline, part_bytes, index.num_parts))


def in_process(target: Callable[..., None], *args: object) -> list:
    """What ``target`` put into its queue, from a process that ends with it."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=target, args=(*args, results))
    process.start()
    found = []
    while process.is_alive() or not results.empty():
        try:
            found.append(results.get(timeout=0.2))
        except Exception:
            continue
    process.join()
    return found


READERS: dict[str, tuple[Callable[..., None], Callable[[Path], int], int]] = {
    "ray_qa.read_csv, 2 cores": (measure_on_ray, rows_by_ray_qa, 2),
    "ray_qa.read_csv, 1 core": (measure_on_ray, rows_by_ray_qa, 1),
    "ray.data.read_csv, 2 cores": (measure_on_ray, rows_by_ray_data, 2),
    "pyarrow.csv, one process": (measure_alone, rows_by_pyarrow, 0),
    "polars, one process": (measure_alone, rows_by_polars, 0),
    "duckdb, one process": (measure_alone, rows_by_duckdb, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are made; a temporary folder without")
    parser.add_argument("--only-memory", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "rows.csv")
        expected = make_csv(path, int(options.gigabytes * 1e9))
        size = path.stat().st_size
        tenth = path.with_name(WARM_UP)
        make_csv(tenth, size // 10)
        print(f"{size / 1e9:.2f} GB, {expected:,} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        seconds: dict[str, list[float]] = {name: [] for name in READERS}
        # In turns: what else the machine does falls on all alike.
        for _ in range(0 if options.only_memory else options.repeats):
            for name, (measure, read, num_cpus) in READERS.items():
                for rows, took in in_process(measure, read, path, num_cpus, 1):
                    if rows != expected:
                        raise SystemExit(f"{name} found {rows:,} rows, not {expected:,}")
                    seconds[name].append(took)
        ours = statistics.median(seconds["ray_qa.read_csv, 2 cores"] or [float("nan")])
        print("| reader | seconds (median) | MB/s | rows/s | ray_qa on 2 cores is faster by |")
        print("|---|---|---|---|---|")
        for name, runs in seconds.items():
            if not runs:
                print(f"| {name} | not measured | | | |")
                continue
            median = statistics.median(runs)
            print(
                f"| {name} | {median:.2f} | {size / 1e6 / median:.0f} | {expected / median:,.0f} "
                f"| {median / ours:.2f} |", flush=True,
            )
        print("\n| a process that parses every part of | parts | largest part | peak above its imports | in parts |")
        print("|---|---|---|---|---|")
        for what, part_bytes in (("read_csv", READ_PART_BYTES), ("the jobs", None)):
            for file in (tenth, path):
                for peak, largest, num_parts in in_process(peak_of_worker, file, part_bytes):
                    gigabytes = file.stat().st_size / 1e9
                    print(
                        f"| {gigabytes:.2f} GB, in parts of {what} | {num_parts:,} | {largest / 1e6:.2f} MB "
                        f"| {peak / 1e6:.1f} MB | {peak / largest:.1f} |", flush=True,
                    )


if __name__ == "__main__":
    main()
