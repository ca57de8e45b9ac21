"""Feature shards: what is in them, that they are made once, and which inputs are refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from ray_qa import preparation, schema
from ray_qa.csv_index import CSVIndex, index_csv
from ray_qa.csv_parse import read_part
from ray_qa.errors import BadRowsError, InputError
from ray_qa.model import load_tokenizer
from ray_qa.options import QATrainArgs
from ray_qa.preparation import PreparationReport, content_key, make_shard, prepare
from ray_qa.storage import Location, locate
from ray_qa.windows import WindowMaker, Windows

Row = tuple[str, str, str, str]
ARGS = QATrainArgs()


def good_rows(num_rows: int) -> list[Row]:
    """Rows whose answer is a number of their own; every seventh context is too long for one window of 48."""
    rows = []
    for i in range(num_rows):
        before = "the weather was fine and nobody came. " * (6 if i % 7 == 0 else 1)
        context = f'{before}In year {i}, "Anna", moved to town\nnumber {i * 3}.'
        answer = f"number {i * 3}"
        rows.append((context, "where did Anna move?", answer, str(context.index(answer))))
    return rows


def write(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(schema.TRAIN_COLUMNS)
        writer.writerows(rows)
    return path


def index_of(path: Path, *, part_rows: int = 100) -> CSVIndex:
    return index_csv([locate(path)], required_columns=schema.TRAIN_COLUMNS, part_rows=part_rows)


@pytest.fixture(scope="module")
def maker(tiny_model: Path) -> WindowMaker:
    tokenizer, model_max_length = load_tokenizer(tiny_model)
    return WindowMaker(tokenizer, max_seq_length=48, doc_stride=8, model_max_length=model_max_length)


@pytest.fixture
def home(tmp_path: Path) -> Location:
    return locate(tmp_path / "windows")


def plan_of(maker: WindowMaker, folder: Location, *, key: str = "key", skip_bad_parts: bool = True):
    return preparation._Plan(maker, folder, key, False, skip_bad_parts)


def open_shards(prepared: preparation.Prepared) -> pa.Table:
    files = [str(Path(prepared.folder.path, shard.name)) for shard in prepared.shards]
    return pa.concat_tables([datasets.Dataset.from_file(file).data.table for file in files])


def test_a_shard_holds_the_parts_windows_and_opens_memory_mapped(
    maker: WindowMaker, tmp_path: Path, home: Location
) -> None:
    rows = good_rows(30)
    index = index_of(write(tmp_path / "a.csv", rows), part_rows=20)
    part = index.part(1)
    assert part.first_row == 20
    facts, num_bytes = make_shard(plan_of(maker, home), read_part(index.files[0], part))
    assert facts["shard"]["name"] == "shard-000000000020.arrow"
    assert (home / "shard-000000000020.arrow").info().size == num_bytes

    opened = datasets.Dataset.from_file(str(Path(home.path, "shard-000000000020.arrow")))
    assert len(opened) == facts["shard"]["num_windows"] > 10
    assert set(opened[0]) >= {"input_ids", "start_position", "end_position", "row_index", "length"}
    table = opened.data.table
    found = Windows.from_table(table)
    expected = maker.make(
        [row[0] for row in rows[20:]], [row[1] for row in rows[20:]],
        answer_starts=[int(row[3]) for row in rows[20:]], answer_texts=[row[2] for row in rows[20:]],
    )
    for name in ("row", "input_ids", "splits", "context_length", "start_position", "end_position"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(table.column("row_index").to_numpy(), 20 + expected.row)
    np.testing.assert_array_equal(table.column("length").to_numpy(), expected.lengths)
    assert int(expected.lengths.sum()) == facts["shard"]["num_tokens"]


def test_labels_of_windows_point_at_the_answer(maker: WindowMaker, tmp_path: Path, home: Location) -> None:
    rows = good_rows(15)
    index = index_of(write(tmp_path / "a.csv", rows))
    make_shard(plan_of(maker, home), read_part(index.files[0], index.part(0)))
    found = datasets.Dataset.from_file(str(Path(home.path, "shard-000000000000.arrow")))
    answered = set()
    for window in found:
        if window["start_position"] > 0:
            ids = window["input_ids"][window["start_position"] : window["end_position"] + 1]
            text = maker.tokenizer.decode(ids).replace(" ", "")
            assert text.lower() == rows[window["row_index"]][2].replace(" ", "")
            answered.add(window["row_index"])
    assert answered == set(range(15))


def test_a_shard_is_made_once_and_never_taken_from_another_plan(
    maker: WindowMaker, tmp_path: Path, home: Location
) -> None:
    index = index_of(write(tmp_path / "a.csv", good_rows(3)))
    table = read_part(index.files[0], index.part(0))
    first = make_shard(plan_of(maker, home), table)
    file = Path(home.path, "shard-000000000000.arrow")
    inode = file.stat().st_ino
    assert make_shard(plan_of(maker, home), table) == first
    assert file.stat().st_ino == inode
    make_shard(plan_of(maker, home, key="another"), table)
    assert file.stat().st_ino != inode


def test_the_key_depends_on_content_tokenizer_and_options(maker: WindowMaker, tmp_path: Path) -> None:
    rows = good_rows(5)
    index = index_of(write(tmp_path / "a.csv", rows))
    same_content_elsewhere = index_of(write(tmp_path / "b.csv", rows))
    key = content_key(index, maker, ARGS)
    assert key == content_key(same_content_elsewhere, maker, QATrainArgs(learning_rate=1, batch_size=3))
    rows[2] = (rows[2][0], "where did Anna go?", *rows[2][2:])
    others = {
        content_key(index_of(write(tmp_path / "c.csv", rows)), maker, ARGS),
        content_key(index, WindowMaker(maker.tokenizer, max_seq_length=48, doc_stride=9), ARGS),
        content_key(index, WindowMaker(maker.tokenizer, max_seq_length=47, doc_stride=8), ARGS),
        content_key(
            index,
            WindowMaker(maker.tokenizer, max_seq_length=48, doc_stride=8, pair_order="context_first"),
            ARGS,
        ),
        content_key(index, maker, QATrainArgs(handle_impossible_answer=True)),
        content_key(index, maker, QATrainArgs(max_bad_rows=1)),
    }
    assert len(others) == 6 and key not in others


def test_a_report_survives_its_json() -> None:
    report = PreparationReport(num_without_windows=1, without_windows=[(3, "why")])
    report.labels.counts.update({"ok": 4, "not_found": 1})
    assert PreparationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.usefixtures("ray_session")
class TestOnRay:
    def test_every_row_is_prepared_once_and_the_second_time_nothing_is_done(
        self, maker: WindowMaker, tmp_path: Path, home: Location
    ) -> None:
        rows = good_rows(330)
        index = index_of(write(tmp_path / "a.csv", rows))
        prepared = prepare(index, maker, ARGS, home)
        assert [shard.first_row for shard in prepared.shards] == [0, 100, 200, 300]
        assert (prepared.num_rows, prepared.num_used_rows, prepared.reused) == (330, 330, False)
        table = open_shards(prepared)
        row_index = table.column("row_index").to_numpy()
        assert set(row_index.tolist()) == set(range(330))
        expected = maker.make(
            [row[0] for row in rows], [row[1] for row in rows],
            answer_starts=[int(row[3]) for row in rows], answer_texts=[row[2] for row in rows],
        )
        np.testing.assert_array_equal(row_index, expected.row)
        assert prepared.num_windows == expected.num_windows > 330

        manifest = Path(prepared.folder.path, preparation.MANIFEST)
        before = manifest.stat().st_mtime_ns
        again = prepare(index, maker, ARGS, home)
        assert again.reused and again.shards == prepared.shards and again.report == prepared.report
        assert manifest.stat().st_mtime_ns == before

        # A folder that lost a shard is not taken for complete; the other shards are kept.
        lost = Path(again.folder.path, again.shards[2].name)
        kept = Path(again.folder.path, again.shards[1].name).stat().st_ino
        lost.unlink()
        mended = prepare(index, maker, ARGS, home)
        assert not mended.reused and mended.shards == prepared.shards and lost.is_file()
        assert Path(again.folder.path, again.shards[1].name).stat().st_ino == kept

    def test_bad_rows_are_refused_by_name_and_leave_nothing(
        self, maker: WindowMaker, tmp_path: Path, home: Location
    ) -> None:
        rows = good_rows(120)
        rows[3] = (rows[3][0], rows[3][1], "not there", "5")
        rows[110] = (rows[110][0], rows[110][1], rows[110][2], "x")
        path = write(tmp_path / "bad.csv", rows)
        with pytest.raises(BadRowsError) as caught:
            prepare(index_of(path), maker, ARGS, home)
        message = str(caught.value)
        assert "2 of 120 rows cannot be used" in message
        assert f"{path}, record 3, column answer_text" in message
        assert f"{path}, record 110, column answer_start" in message
        assert "allowed by max_bad_rows=0: 0" in message
        assert home.list() == []

        prepared = prepare(index_of(path), maker, QATrainArgs(max_bad_rows=2), home)
        assert (prepared.num_rows, prepared.num_used_rows) == (120, 118)
        used = set(open_shards(prepared).column("row_index").to_pylist())
        assert used == set(range(120)) - {3, 110}
        with pytest.raises(BadRowsError):
            prepare(index_of(path), maker, QATrainArgs(max_bad_rows=0.01), home)

    def test_a_question_that_leaves_no_room_is_a_bad_row(
        self, maker: WindowMaker, tmp_path: Path, home: Location
    ) -> None:
        rows = good_rows(4)
        rows[2] = (rows[2][0], "why " * 60 + "?", *rows[2][2:])
        path = write(tmp_path / "long.csv", rows)
        with pytest.raises(BadRowsError, match=r"record 2: question has \d+ tokens"):
            prepare(index_of(path), maker, ARGS, home)
        prepared = prepare(index_of(path), maker, QATrainArgs(max_bad_rows=0.5), home)
        assert prepared.num_used_rows == 3


def test_no_row_at_all_is_an_error(maker: WindowMaker, tmp_path: Path, home: Location) -> None:
    with pytest.raises(InputError, match="no row to train on"):
        prepare(index_of(write(tmp_path / "none.csv", [])), maker, ARGS, home)
