from __future__ import annotations

import csv
import gzip
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import ray.data

from ray_qa import cluster, reading
from ray_qa.errors import CSVError, InputError, WorkError

pytestmark = pytest.mark.usefixtures("ray_session")


def write(path: Path, rows: list[list[str]], header: tuple[str, ...] = ("context", "question")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def test_read_csv_gives_every_row_its_position(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", [[f"line one\nline two, {i}", f"who is {i}?"] for i in range(600)])
    rest = write(tmp_path / "b.csv", [[f'he said "{i}"', "null"] for i in range(600, 900)])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(rest.read_bytes()))
    rows = sorted(reading.read_csv([first, tmp_path / "b.csv.gz"]).take_all(), key=lambda row: row["row_index"])
    assert [row["row_index"] for row in rows] == list(range(900))
    assert rows[0] == {"row_index": 0, "context": "line one\nline two, 0", "question": "who is 0?"}
    assert rows[899] == {"row_index": 899, "context": 'he said "899"', "question": "null"}


def test_every_part_is_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_RUNS", 3)
    path = write(tmp_path / "a.csv", [["c", "q"]] * 2000)
    zipped = tmp_path / "z.csv.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    index = reading.index_input([path, zipped], required_columns=["context"], part_rows=300)
    files = [part.file for part in index.parts()]
    runs = [list(row["parts"]) for row in reading.part_runs(index).take_all()]
    assert sorted(number for run in runs for number in run) == list(range(index.num_parts))
    assert len(runs) <= 3 and all(run == sorted(run) for run in runs)
    assert sum(1 in {files[number] for number in run} for run in runs) == 1  # a compressed file stays whole
    some = [list(row["parts"]) for row in reading.part_runs(index, [1, 3]).take_all()]
    assert sorted(some) == [[1], [3]]


@pytest.mark.parametrize("num_parts, num_cpus, at_least", [(1, 8, 1), (120, 2, 8), (1_000, 3, 1), (7, 64, 0)])
def test_run_sizes_fall_and_are_few(num_parts: int, num_cpus: int, at_least: int) -> None:
    sizes = reading.run_sizes(num_parts, num_cpus, at_least=at_least, at_most=200)
    taken: list[int] = []
    while sum(taken) < num_parts:
        taken.append(next(sizes))
    assert taken == sorted(taken, reverse=True) and taken[0] <= 200 and taken[-1] >= 1
    assert len(taken) <= num_cpus * (3 + num_parts.bit_length())


def test_a_run_has_no_more_text_than_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [write(tmp_path / f"{i}.csv", [["c", "q"]]) for i in range(100)]
    large = write(tmp_path / "large.csv", [["c" * 1000, "q"]] * 100)
    monkeypatch.setattr(reading, "MAX_RUN_BYTES", 5_000)
    index = reading.index_input([*small, large], required_columns=["context"], part_rows=1)
    runs = [row["parts"] for row in reading._task_runs(index, worth_bytes=5_000).take_all()]
    texts = [sum(part.end - part.start for part in map(index.part, run)) for run in runs]
    assert sum(map(len, runs)) == 200 and max(texts) < 5_000 + 1_010


def test_tasks_run_side_by_side_from_the_first_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known: list[float] = []

    class Listens(cluster._KnowsTheCluster):
        def before_execution_starts(self, executor: Any) -> None:
            super().before_execution_starts(executor)
            known.append(executor._resource_manager.get_global_limits().cpu)

    monkeypatch.setattr(cluster, "_KnowsTheCluster", Listens)
    before = list(ray.data.DataContext.get_current().custom_execution_callback_classes)
    assert reading.read_csv(write(tmp_path / "a.csv", [["c", "q"]])).count() == 1
    assert known and min(known) == sum(cluster.cpus_per_node())
    assert ray.data.DataContext.get_current().custom_execution_callback_classes == before


def test_many_small_files_share_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_RUNS", 4)
    paths = [write(tmp_path / f"{number}.csv", [[f"c{number}", "q"]]) for number in range(10)]
    index = reading.index_input(paths, required_columns=["context"])
    assert len(reading.part_runs(index).take_all()) == 4
    found = reading.map_parts(lambda table: table["context"].to_pylist(), index, columns=["context"])
    assert sorted(itertools.chain.from_iterable(found)) == [f"c{number}" for number in range(10)]


def test_map_parts_covers_all_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [[f"c{i}", "q"] for i in range(1000)])
    index = reading.index_input(path, required_columns=["context"])
    found = reading.map_parts(lambda table: (table["row_index"][0].as_py(), len(table)), index, columns=["context"])
    assert sorted(found) == [(0, 256), (256, 256), (512, 256), (768, 232)]


def test_chunks_of_a_large_file_are_scanned_by_tasks() -> None:
    found = list(reading._map_on_cluster([], None, lambda item: (item, os.getpid()), range(9)))
    assert [item for item, _ in found] == list(range(9))
    assert os.getpid() not in {process for _, process in found}


def test_errors_of_workers_arrive_as_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["c", "q"]])
    index = reading.index_input(path, required_columns=["context"])
    path.write_bytes(path.read_bytes().replace(b"c,q", b"c\xffq"))
    with pytest.raises(CSVError, match=r"a\.csv"):
        list(reading.map_parts(len, index, columns=["context"]))
    with pytest.raises(WorkError, match="division by zero"):
        list(cluster.batches(reading.part_runs(index).map_batches(lambda _: 1 / 0, batch_size=1)))


def test_missing_file_and_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        reading.read_csv(tmp_path / "none.csv")
    path = write(tmp_path / "a.csv", [["c", "q"]])
    with pytest.raises(CSVError, match=r"lacks the column answer_text.*found 'context, question'"):
        reading.index_input(path, required_columns=["context", "answer_text"])
