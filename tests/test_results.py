from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_qa import results, schema
from ray_qa.errors import OutputError, WorkError
from ray_qa.results import Answers, PartFile, begin, check_answers, open_results, part_name, prove_tiling, verify
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
    assert answers[::-1] == expected[::-1] and answers[6:1:-3] == expected[6:1:-3]
    assert list(reversed(answers)) == expected[::-1] and expected[3] in answers and answers.index(expected[5]) == 5
    again = pickle.loads(pickle.dumps(answers))
    assert list(again) == expected and len(pickle.dumps(answers)) < 1000
    assert repr(again) == repr(answers) == f"<7 answers in {tmp_path / 'out'}>"


def test_a_single_file_of_all_parts_in_order(tmp_path: Path) -> None:
    answers = finished(tmp_path / "out")
    single = tmp_path / "deep" / "all.parquet"
    assert answers.write_parquet(single) is True
    assert pq.read_table(single).equals(answers.to_table())
    assert pq.read_metadata(single).num_row_groups == 1
    assert answers.write_parquet(single) is False  # it is there and complete
    assert [path.name for path in single.parent.iterdir()] == ["all.parquet"]
    with pytest.raises(OutputError, match="lies in the output folder"):
        answers.write_parquet(tmp_path / "out" / "all.parquet")
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(OutputError, match="not of this run"):
        answers.write_parquet(tmp_path / "thesis.docx")
    answers.write_parquet(tmp_path / "thesis.docx", overwrite=True)
    (tmp_path / "out" / part_name(4)).write_bytes((tmp_path / "out" / part_name(0)).read_bytes())
    with pytest.raises(WorkError, match="8 rows came out of the parts, 7 are expected"):
        answers.write_parquet(tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists() and not list(tmp_path.glob("_*"))


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
    # Overwriting an unfinished run of the same plan keeps what is whole.
    kept = run.publish_part(table(4, 3), 4, 3)
    assert begin(locate(tmp_path), PLAN, overwrite=True).published() == {4: kept}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_overwriting_a_finished_run_of_the_same_plan_starts_afresh(tmp_path: Path) -> None:
    finished(tmp_path)
    flip(tmp_path / part_name(0), 40)
    assert begin(locate(tmp_path), PLAN, overwrite=True).published() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["_plan.json"]


def test_verify_proves_a_folder_and_names_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(OutputError, match="no finished results"):
        verify(folder)
    finished(folder)
    done = verify(folder)
    assert (done.num_rows, done.num_parts, done.num_errors) == (7, 2, 1)
    assert done.num_bytes == sum(path.stat().st_size for path in folder.glob("part-*"))

    part = folder / part_name(4)
    original = part.read_bytes()
    for position in range(4, len(original), 97):
        flip(part, position)
        with pytest.raises(WorkError, match="part-000000000004"):
            verify(folder)
        part.write_bytes(original)
    part.write_bytes(original + b"x")
    with pytest.raises(WorkError, match="part-000000000004"):
        verify(folder)
    part.write_bytes((folder / part_name(0)).read_bytes())
    with pytest.raises(WorkError, match="it is the part of row 0"):
        verify(folder)
    part.unlink()
    with pytest.raises(WorkError, match="missing .*part-000000000004"):
        verify(folder)
    part.write_bytes(original)
    verify(folder)
    manifest = json.loads((folder / "_manifest.json").read_text())
    for change, problem in (
        ({"num_errors": 2}, "num_errors is 2"), ({"num_rows": 8}, "input at row 8"),
        ({"plan": PLAN | {"model": "xyz"}}, "plan"),
        ({"parts": [[0, 4, 1, *manifest["parts"][0][3:]], manifest["parts"][1]]}, "num_errors is 1"),
    ):
        (folder / "_manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(WorkError, match=problem):
            verify(folder)


def test_finish_compares_what_was_reported_with_what_is_there(tmp_path: Path) -> None:
    run = begin(locate(tmp_path), PLAN)
    parts = [run.publish_part(table(0, 4), 0, 4), run.publish_part(table(4, 3), 4, 3)]
    other = run.publish_part(table(4, 3, error_at=6), 4, 3)
    with pytest.raises(WorkError, match="part-000000000004.parquet is not the file that was published"):
        run.finish(PLAN, parts, 7)
    (tmp_path / "_part-000000000004.parquet.0123").write_text("left by a writer that was killed")
    run.finish(PLAN, [parts[0], other], 7, checked={0})
    assert sorted(path.name for path in tmp_path.glob("_*")) == ["_manifest.json", "_plan.json"]


def test_many_parts_are_looked_at_without_reading_them(tmp_path: Path) -> None:
    run = begin(locate(tmp_path), PLAN)
    parts = {i: run.publish_part(table(i, 1), i, 1) for i in range(100)}
    flip(tmp_path / part_name(50), 40)  # a page: footers and sizes are as they were
    assert run.published() == parts
    run.finish(PLAN, parts.values(), 100)
    with pytest.raises(WorkError, match=r"part-000000000050.*checksum"):
        verify(tmp_path)


def test_answers_must_stand_in_their_contexts() -> None:
    contexts = pa.chunked_array([["Zoë has 3.", "Ann", "Bob"]])
    right = {
        "row_index": [5, 6, 7], "answer": ["has", "", "Bob"], "score": [1, 0, 1], "start": [4, 0, 0], "end": [7, 0, 3],
        "error": [None, "why", None],
    }
    check_answers(contexts, pa.table(right, schema=schema.PREDICTIONS))
    for change in ({"answer": ["has", "", "Bo"]}, {"start": [5, 0, 0]}, {"end": [7, 1, 3]}):
        with pytest.raises(WorkError, match=r"row [567]: the answer"):
            check_answers(contexts, pa.table(right | change, schema=schema.PREDICTIONS))


def test_several_ranks_of_one_row_stand_together() -> None:
    ranked = pa.table({"row_index": [0, 0, 1, 2, 2, 2], "rank": [0, 1, 0, 0, 1, 2]})
    results.check_rows(ranked, 0, 3)
    with pytest.raises(WorkError):
        results.check_rows(pa.table({"row_index": [0, 1, 0], "rank": [0, 0, 1]}), 0, 2)


def ranked(first_row: int, counts: list[int]) -> pa.Table:
    """``counts[i]`` answers for row ``first_row + i``, the last of them with an error where it is the only one."""
    lines = [(first_row + i, rank) for i, count in enumerate(counts) for rank in range(count)]
    return pa.table(
        {
            "row_index": [row for row, _ in lines],
            "rank": [rank for _, rank in lines],
            "answer": [f"{row}.{rank}" for row, rank in lines],
            "score": [1 / (1 + rank) for _, rank in lines],
            "start": [0] * len(lines),
            "end": [3] * len(lines),
            "error": [None] * len(lines),
        },
        schema=schema.RANKED_PREDICTIONS,
    )


def test_a_list_per_row_where_there_are_several_answers(tmp_path: Path) -> None:
    plan = {"input": "x", "top_k": 3}
    folder = begin(locate(tmp_path / "out"), plan)
    parts = [folder.publish_part(ranked(0, [3, 1, 2]), 0, 3), folder.publish_part(ranked(3, [1, 3]), 3, 2)]
    folder.finish(plan, parts, 5)
    verify(tmp_path / "out")
    answers = open_results(tmp_path / "out")
    expected = [["0.0", "0.1", "0.2"], ["1.0"], ["2.0", "2.1"], ["3.0"], ["4.0", "4.1", "4.2"]]
    assert len(answers) == 5
    assert [[answer.answer for answer in row] for row in answers] == expected
    assert [[answer.answer for answer in row] for row in answers[4:0:-2]] == [expected[4], expected[2]]
    assert [answer.answer for answer in answers[-1]] == expected[4] and [a.answer for a in answers[1]] == ["1.0"]
    assert answers.write_parquet(tmp_path / "one.parquet") and not answers.write_parquet(tmp_path / "one.parquet")
    assert pq.read_table(tmp_path / "one.parquet").num_rows == 10
    with pytest.raises(WorkError, match="lost or doubled"):
        folder.publish_part(ranked(0, [3, 0, 2]), 0, 3)
    with pytest.raises(WorkError, match="stand together"):
        folder.publish_part(ranked(0, [3, 1, 2]).take([0, 2, 1, 3, 4, 5]), 0, 3)


def test_answers_of_several_ranks_stand_in_their_contexts() -> None:
    contexts = pa.chunked_array([["0.0 0.1", "no", "2.0"]])
    table = ranked(0, [1, 1, 1]).set_column(2, schema.PREDICTIONS.field("answer"), [["0.0", "no", "2.0"]])
    table = table.set_column(5, schema.PREDICTIONS.field("end"), [[3, 2, 3]])
    check_answers(contexts, table)
    check_answers(contexts, pa.concat_tables([table.slice(0, 1), table.slice(1)]))
    with pytest.raises(WorkError, match="row 2"):
        check_answers(contexts, table.set_column(4, schema.PREDICTIONS.field("start"), [[0, 0, 1]]))
