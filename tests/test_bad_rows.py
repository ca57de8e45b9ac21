"""Bad rows that are let through: kept apart with their own fields, their place and their reason."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_qa import bad_rows, reading, schema
from ray_qa.bad_rows import check_label_rows, write_quarantine
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import BadRowsError, InputError
from ray_qa.model import load_tokenizer
from ray_qa.storage import locate
from ray_qa.windows import WindowMaker

pytestmark = pytest.mark.usefixtures("ray_session")

HEADER = ("context", "question", "answer_text", "answer_start")
GOOD = ("Ann has 3 keys.", "who has 3 keys?", "Ann", "0")


def write(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


@pytest.fixture
def index(tmp_path: Path) -> CSVIndex:
    """Two files, parts of 50 rows; bad rows in the first, second and last part; a column only the second file has."""
    first, second = [GOOD] * 120, [("tag", *GOOD)] * 30
    first[3] = (GOOD[0], GOOD[1], "Bob", "0")
    first[60] = (GOOD[0], "  ", "Ann", "0")
    second[29] = ("last, \"one\"\n", *GOOD[:3], "zero")
    paths = [write(tmp_path / "a.csv", first), write(tmp_path / "b.csv", second, ("reason", *HEADER))]
    return reading.index_input(paths, required_columns=schema.TRAIN_COLUMNS, part_rows=50)


def test_bad_rows_are_kept_with_place_and_reason(
    index: CSVIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = locate(tmp_path / "out")
    folder.make_folder()
    labels = check_label_rows(index, False, 3, quarantine=folder)
    assert labels.num_bad == 3
    assert [info.base_name for info in folder.list()] == ["quarantine.parquet"]
    assert f"3 bad rows are left out; they and their reasons are in {tmp_path}/out/quarantine.parquet" in caplog.text
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == [*bad_rows.QUARANTINE.names, *HEADER, "original_reason"]
    rows = table.to_pylist()
    assert [(row["row_index"], Path(row["file"]).name, row["record"]) for row in rows] == [
        (3, "a.csv", 3), (60, "a.csv", 60), (149, "b.csv", 29),
    ]
    assert [row["reason"] for row in rows] == ["not_found", "blank_question", "start_not_a_number"]
    assert [row["column"] for row in rows] == ["answer_text", "question", "answer_start"]
    assert [row["original_reason"] for row in rows] == [None, None, 'last, "one"\n']
    assert (rows[1]["question"], rows[2]["answer_start"]) == ("  ", "zero")
    assert "Bob" in rows[0]["found"] and "literally" in rows[0]["mend"]


def test_no_file_is_left_where_rows_are_refused_or_none_is_bad(index: CSVIndex, tmp_path: Path) -> None:
    folder = locate(tmp_path / "out")
    folder.make_folder()
    with pytest.raises(BadRowsError, match=r"(?s)3 of 150 rows.*max_bad_rows=2: 2"):
        check_label_rows(index, False, 2, quarantine=folder)
    assert folder.list() == []
    (folder / bad_rows.QUARANTINE_NAME).publish(b"of an earlier run")
    clean = reading.index_input(write(tmp_path / "clean.csv", [GOOD]), required_columns=HEADER)
    assert check_label_rows(clean, False, 1, quarantine=folder).num_bad == 0
    assert folder.list() == []
    empty = reading.index_input(write(tmp_path / "empty.csv", []), required_columns=HEADER)
    with pytest.raises(InputError, match=r"empty\.csv: there are no rows"):
        check_label_rows(empty, False, 1)


def test_training_keeps_rows_without_windows_too(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, longest = load_tokenizer(tiny_model)
    maker = WindowMaker(tokenizer, max_seq_length=32, doc_stride=8, model_max_length=longest)
    path = write(tmp_path / "a.csv", [GOOD, (GOOD[0], "who " * 60, "Ann", "0"), (GOOD[0], GOOD[1], "Bob", "0")])
    index = reading.index_input(path, required_columns=HEADER)
    assert write_quarantine(index, [0], locate(tmp_path / "out"), False, maker=maker) == 2
    rows = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(row["row_index"], row["reason"]) for row in rows] == [(1, "no_window"), (2, "not_found")]
    assert "tokens" in rows[0]["mend"] and rows[0]["answer_text"] == "Ann"
