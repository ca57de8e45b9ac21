"""The pipeline of parts on a real Ray, with a tiny model."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray.train import ScalingConfig

from ray_qa import prediction, reading, results
from ray_qa.cluster import Workers
from ray_qa.errors import CSVError, ModelError, OptionError, OutputError
from ray_qa.folder_lock import FolderLock
from ray_qa.model import resolve_model
from ray_qa.options import QATestArgs
from ray_qa.prediction import Prediction, predict
from ray_qa.results import part_name
from ray_qa.storage import locate

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_ROWS = 700


@pytest.fixture(scope="module")
def rows_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 rows, three parts; a blank question in row 300, a quoted newline in every context."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "id", "context"])
        for i in range(NUM_ROWS):
            writer.writerow(["" if i == 300 else f"who has {i % 50}?", i, f"Ann has {i % 50},\nBob has {i % 7}."])
    return path


@pytest.fixture(scope="module")
def one_worker(rows_csv: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prediction]:
    folder = tmp_path_factory.mktemp("one") / "out"
    return folder, predict(rows_csv, model=tiny_model, output_path=folder, scaling=ScalingConfig(num_workers=1))


def test_every_row_once_in_csv_order(rows_csv: Path, one_worker: tuple[Path, Prediction]) -> None:
    folder, done = one_worker
    table = pq.read_table(folder)
    assert table.column_names == ["row_index", "answer", "score", "start", "end", "error"]
    assert table["row_index"].to_pylist() == list(range(NUM_ROWS))
    with open(rows_csv, newline="", encoding="utf-8") as stream:
        contexts = [row["context"] for row in csv.DictReader(stream)]
    for context, row in zip(contexts, table.to_pylist(), strict=True):
        assert context[row["start"] : row["end"]] == row["answer"]
        assert (row["error"] is None) == (row["row_index"] != 300)
    assert "question" in table["error"][300].as_py() and table["answer"][300].as_py() == ""
    assert (done.num_rows, done.num_errors, done.num_parts) == (NUM_ROWS, 1, 3)
    assert not done.too_many_errors  # one in 700 is below one in a hundred
    assert [tuple(answer) for answer in done.answers] == [
        (row["answer"], row["score"], row["start"], row["end"]) for row in table.to_pylist()
    ]
    assert len(done.statistics.parts_of_worker) == 1


def test_two_workers_give_the_same_and_both_work(
    rows_csv: Path, tiny_model: Path, one_worker: tuple[Path, Prediction], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A tiny model is done with everything before the second worker is up, unless Ray Data waits for it.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "wait_for_min_actors_s", 120)
    folder, _ = one_worker
    both = predict(rows_csv, model=tiny_model, output_path=tmp_path / "out", scaling=ScalingConfig(num_workers=2))
    assert pq.read_table(tmp_path / "out").equals(pq.read_table(folder))
    assert sum(both.statistics.parts_of_worker.values()) == 3
    assert len(both.statistics.parts_of_worker) == 2


def test_cpu_tasks_that_feed_the_workers_change_nothing(
    rows_csv: Path, tiny_model: Path, one_worker: tuple[Path, Prediction], tmp_path: Path
) -> None:
    # A compressed file takes the way that GPU clusters take: tasks read and tokenize, workers answer.
    zipped = tmp_path / "rows.csv.gz"
    zipped.write_bytes(gzip.compress(rows_csv.read_bytes()))
    done = predict(zipped, model=tiny_model)
    assert isinstance(done.answers, list) and done.output_path is None
    assert done.answers == list(one_worker[1].answers)
    # The processes of these tasks are used again: they must not keep the options of the run before.
    short = predict(zipped, model=tiny_model, args={"max_seq_length": 16, "doc_stride": 2})
    assert short.statistics.num_windows > done.statistics.num_windows


def test_a_record_that_is_broken_late_is_found_before_anything_is_written(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"context,question\n" + b"Ann has 3.,who has 3?\n" * 600 + b"Zo\xeb has 3.,who?\n")
    with pytest.raises(CSVError, match=r"rows\.csv, record 600, byte .*UTF-8"):
        predict(path, model=tiny_model, output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_run_again_computes_only_what_is_missing(
    rows_csv: Path, tiny_model: Path, one_worker: tuple[Path, Prediction], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    scaling = ScalingConfig(num_workers=1)
    shutil.copytree(one_worker[0], folder)
    before = pq.read_table(folder)
    (folder / "_manifest.json").unlink()
    kept = (folder / part_name(0)).stat().st_mtime_ns
    (folder / part_name(256)).unlink()
    again = predict(rows_csv, model=tiny_model, output_path=folder, scaling=scaling)
    assert (again.num_resumed_rows, again.statistics.num_rows) == (NUM_ROWS - 256, 256)
    assert again.num_errors == one_worker[1].num_errors == 1
    assert (folder / part_name(0)).stat().st_mtime_ns == kept
    assert pq.read_table(folder).equals(before)
    assert json.loads((folder / "_manifest.json").read_text())["num_rows"] == NUM_ROWS
    with pytest.raises(OutputError, match=r"options was .*max_answer_length.*overwrite"):
        predict(rows_csv, model=tiny_model, output_path=folder, args={"max_answer_length": 3})


def test_a_worker_that_dies_in_the_middle_of_a_run(
    rows_csv: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started again with the same run, and finds at once what it had published slowly."""
    monkeypatch.setattr(prediction, "_RUNS_OF_WORKER", 1)
    index = reading.index_input(rows_csv, required_columns=["context", "question"], part_rows=50)
    assert index.num_parts == 14
    died = tmp_path / "died"

    def make_engine(job: prediction.Job) -> Any:
        engine = prediction._load_engine(job)
        answer = engine.answer

        def dies_once(table: Any, *arguments: Any, **options: Any) -> Any:
            time.sleep(0 if died.exists() else 0.4)
            if table["row_index"][0].as_py() == 5 * 50 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return answer(table, *arguments, **options)

        engine.answer = dies_once  # type: ignore[method-assign]
        return engine

    source = resolve_model(tiny_model)
    job = prediction.Job(
        index=ray.put(index), model=prediction.model_transfer.share_directory(source.directory, source.digest),
        options=QATestArgs(), precision="fp32", device="cpu", threads=1, make_engine=make_engine,
    )
    location = locate(tmp_path / "out")
    location.make_folder()
    with FolderLock(location) as lock:
        done = prediction.write_parts(job, index, Workers(1, False, 1), location, {"number": 1}, lock=lock)
    assert died.exists() and done.statistics.num_rows == NUM_ROWS
    assert results.verify(tmp_path / "out").num_parts == 14


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_rows(tiny_model: Path, tmp_path: Path, count: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("context,question\n" + "Ann has 3.,who has 3?\n" * count)
    done = predict(path, model=tiny_model, output_path=tmp_path / "out", scaling=ScalingConfig(num_workers=2))
    assert len(done.answers) == count == len(list(done.answers)) and len(done.answers.to_table()) == count
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["num_rows"] == count


def test_too_many_error_rows_are_reported(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("context,question\nAnn has 3.,who has 3?\nAnn has 3., \n ,who?\n")
    done = predict(path, model=tiny_model)
    assert (done.num_errors, done.too_many_errors) == (2, True)
    assert [answer.answer for answer in done.answers][1:] == ["", ""]


def test_what_is_refused_before_any_work(
    rows_csv: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "part_runs", lambda *_: pytest.fail("work was started"))
    with pytest.raises(ModelError, match="neither a folder|not a folder"):
        predict(rows_csv, model=tmp_path / "no-model")
    with pytest.raises(CSVError, match="lacks the column context"):
        other = tmp_path / "other.csv"
        other.write_text("a,question\n1,2\n")
        predict(other, model=tiny_model)
    with pytest.raises(OptionError, match="top_kk"):
        predict(rows_csv, model=tiny_model, args={"top_kk": 1})
    with pytest.raises(OutputError, match="cannot be used as an output folder"):
        predict(rows_csv, model=tiny_model, output_path=rows_csv / "out")


def test_a_bare_encoder_is_refused_unless_asked_for(
    rows_csv: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    BertModel(BertConfig.from_pretrained(tiny_model)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no question-answering head"):
        predict(rows_csv, model=tmp_path)
    found = resolve_model(tmp_path, allow_untrained_head=True)
    with pytest.raises(ModelError, match="no question-answering head"):
        predict(rows_csv, model=found)
    monkeypatch.setattr(prediction, "run_parts", lambda *_: iter(()))
    with pytest.raises(prediction.results.WorkError, match="0 answers came back for 700 rows"):
        predict(rows_csv, model=found, allow_untrained_head=True)


def test_input_columns_are_carried_along_and_all_parts_become_one_file(
    rows_csv: Path, tiny_model: Path, one_worker: tuple[Path, Prediction], tmp_path: Path
) -> None:
    single = tmp_path / "all.parquet"
    done = predict(
        rows_csv, model=tiny_model, output_path=tmp_path / "out", keep_columns=["id", "question", "id"],
        single_file=single, scaling=ScalingConfig(num_workers=1),
    )
    table = pq.read_table(tmp_path / "out")
    assert table.column_names[-2:] == ["id", "question"]
    assert table["id"].to_pylist() == [str(i) for i in range(NUM_ROWS)]
    assert table.drop_columns(["id", "question"]).equals(pq.read_table(one_worker[0]))
    assert pq.read_table(single).equals(table) and done.answers.to_table().equals(table)
    assert list(done.answers) == list(one_worker[1].answers)
    for names, problem in ((["ids"], r"'ids', which .*rows\.csv lacks; allowed: question, id, context"),
                           (["answer"], "'answer', which is a column of the answers")):
        with pytest.raises(OptionError, match=problem):
            predict(rows_csv, model=tiny_model, output_path=tmp_path / "new", keep_columns=names)
    with pytest.raises(OptionError, match="only with an output folder"):
        predict(rows_csv, model=tiny_model, keep_columns=["id"])
    with pytest.raises(OutputError, match="lies in the output folder"):
        predict(rows_csv, model=tiny_model, output_path=tmp_path / "new", single_file=tmp_path / "new" / "all.parquet")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_another_job_works_in_is_refused(rows_csv: Path, tiny_model: Path, tmp_path: Path) -> None:
    with FolderLock(locate(tmp_path)), pytest.raises(OutputError, match="another job is at work in this folder"):
        predict(rows_csv, model=tiny_model, output_path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_several_answers_per_row(
    rows_csv: Path, tiny_model: Path, one_worker: tuple[Path, Prediction], tmp_path: Path
) -> None:
    folder, best = one_worker
    done = predict(
        rows_csv, model=tiny_model, args={"top_k": 3}, output_path=tmp_path / "out", keep_columns=["id"],
        scaling=ScalingConfig(num_workers=1), single_file=tmp_path / "all.parquet",
    )
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["row_index", "rank", "answer", "score", "start", "end", "error", "id"]
    assert table["id"].to_pylist() == [str(row) for row in table["row_index"].to_pylist()]
    assert (done.num_rows, done.num_errors, len(done.answers)) == (NUM_ROWS, 1, NUM_ROWS)
    for row, (answers, alone) in enumerate(zip(done.answers, best.answers, strict=True)):
        assert [tuple(answers[0])[i] for i in (0, 2, 3)] == [tuple(alone)[i] for i in (0, 2, 3)]
        assert answers[0].score == pytest.approx(alone.score, abs=1e-6)
        assert len(answers) == (1 if row == 300 else 3)
        assert len({(answer.start, answer.end) for answer in answers}) == len(answers)
        assert [answer.score for answer in answers] == sorted((a.score for a in answers), reverse=True)
    assert results.verify(tmp_path / "out").num_errors == 1
    assert pq.read_table(tmp_path / "all.parquet").equals(table)
    with pytest.raises(OutputError, match="options"):
        predict(rows_csv, model=tiny_model, output_path=tmp_path / "out", args={"top_k": 2})
