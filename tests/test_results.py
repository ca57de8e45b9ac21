from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_qa import results, schema
from ray_qa.errors import OutputError, WorkError
from ray_qa.results import Answers, PartFile, begin, open_results, part_name, prove_tiling
from ray_qa.storage import locate

PLAN = {"input": "abc", "model": "def", "num_rows": 7}


def table(first: int, count: int, *, error_at: int | None = None) -> pa.Table:
    rows = range(first, first + count)
    return pa.table(
        {
            "row_index": list(rows), "answer": [f"answer {i}" for i in rows], "score": [i / 100 for i in rows],
            "start": list(rows), "end": [i + 3 for i in rows],
            "error": [("blank question" if i == error_at else None) for i in rows],
        },
        schema=schema.PREDICTIONS,
    )


def finished(folder: Path) -> Answers:
    run = begin(locate(folder), PLAN)
    parts = [run.publish_part(table(4, 3, error_at=5), 4, 3), run.publish_part(table(0, 4), 0, 4)]
    run.finish(PLAN, parts, 7)
    return open_results(folder)


def test_a_finished_folder_reads_like_a_list(tmp_path: Path) -> None:
    answers = finished(tmp_path / "out")
    expected = [(f"answer {i}", pytest.approx(i / 100), i, i + 3) for i in range(7)]
    assert len(answers) == 7
    assert list(answers) == expected
    assert [answers[i] for i in range(7)] == expected
    assert answers[-1] == expected[-1] and answers[2:6:2] == expected[2:6:2] and answers[10:] == []
    assert answers[0].answer == "answer 0" and answers[0]._fields == ("answer", "score", "start", "end")
    for beyond in (7, -8):
        with pytest.raises(IndexError):
            answers[beyond]
    assert answers.to_table()["row_index"].to_pylist() == list(range(7))
    assert answers.to_pandas().shape == (7, 6)


def test_parquet_readers_see_csv_order_and_no_other_file(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    assert pq.read_table(tmp_path / "out")["row_index"].to_pylist() == list(range(7))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["_manifest.json", "_plan.json", "part-000000000000.parquet", "part-000000000004.parquet"]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert (manifest["num_rows"], manifest["num_parts"], manifest["num_errors"]) == (7, 2, 1)


def test_an_unfinished_folder_is_not_results_and_is_resumed(tmp_path: Path) -> None:
    run = begin(locate(tmp_path), PLAN)
    done = run.publish_part(table(0, 4), 0, 4)
    with pytest.raises(OutputError, match="no finished results"):
        open_results(tmp_path)
    again = begin(locate(tmp_path), PLAN)
    assert again.published() == {0: done}


@pytest.mark.parametrize("rows", [[0, 1, 3], [0, 1], [0, 2, 1], [1, 2, 3], [0, 0, 1], [0, 1, 1, 2]], ids=str)
def test_a_part_with_lost_or_doubled_rows_is_not_published(tmp_path: Path, rows: list[int]) -> None:
    run = begin(locate(tmp_path), PLAN)
    broken = table(0, len(rows)).set_column(0, schema.PREDICTIONS.field(0), pa.array(rows, pa.int64()))
    with pytest.raises(WorkError, match="a row was lost or doubled"):
        run.publish_part(broken, 0, 3)
    assert not list(tmp_path.glob("part-*"))


def test_finish_refuses_gaps_overlaps_and_strangers(tmp_path: Path) -> None:
    run = begin(locate(tmp_path), PLAN)
    first = run.publish_part(table(0, 3), 0, 3)
    with pytest.raises(WorkError, match="end at row 3, the input at row 7"):
        run.finish(PLAN, [first], 7)
    last = run.publish_part(table(3, 4), 3, 4)
    (tmp_path / part_name(100)).write_bytes(b"")
    with pytest.raises(WorkError, match="part-000000000100"):
        run.finish(PLAN, [first, last], 7)
    (tmp_path / part_name(100)).unlink()
    (tmp_path / part_name(3)).unlink()
    with pytest.raises(WorkError, match="part-000000000003"):
        run.finish(PLAN, [first, last], 7)
    assert not (tmp_path / "_manifest.json").exists()


def test_prove_tiling() -> None:
    def part(first: int, count: int) -> PartFile:
        return PartFile(first, count, 0, "")

    prove_tiling([], 0)
    prove_tiling([part(0, 2), part(2, 5)], 7)
    with pytest.raises(WorkError, match="rows 2 to 2 are missing"):
        prove_tiling([part(0, 2), part(3, 4)], 7)
    with pytest.raises(WorkError, match="rows 1 to 1 are doubled"):
        prove_tiling([part(0, 2), part(1, 6)], 7)


def test_another_plan_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    finished(tmp_path)
    other = PLAN | {"model": "xyz"}
    with pytest.raises(OutputError, match="model was 'def', is 'xyz'"):
        begin(locate(tmp_path), other)
    run = begin(locate(tmp_path), other, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_plan.json"]
    assert run.published() == {}


def test_a_part_of_an_older_run_cannot_slip_in(tmp_path: Path) -> None:
    old = begin(locate(tmp_path), PLAN)
    begin(locate(tmp_path), PLAN | {"model": "xyz"}, overwrite=True)
    with pytest.raises(OutputError, match="taken over by another run"):
        old.publish_part(table(0, 4), 0, 4)


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.docx"):
        begin(locate(tmp_path), PLAN)
    with pytest.raises(OutputError, match=r"thesis\.docx.*not overwritten"):
        begin(locate(tmp_path), PLAN, overwrite=True)
    assert (tmp_path / "thesis.docx").read_text() == "years of work"


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    run = begin(locate(tmp_path), PLAN)
    run.publish_part(table(0, 4), 0, 4)
    (tmp_path / part_name(0)).write_bytes(b"PAR1 torn")
    with pytest.raises(OutputError, match=r"part-000000000000\.parquet: not a readable part"):
        run.published()


def test_several_ranks_of_one_row_stand_together() -> None:
    ranked = pa.table({"row_index": [0, 0, 1, 2, 2, 2], "rank": [0, 1, 0, 0, 1, 2]})
    results.check_rows(ranked, 0, 3)
    with pytest.raises(WorkError):
        results.check_rows(pa.table({"row_index": [0, 1, 0], "rank": [0, 0, 1]}), 0, 2)
