"""Evaluation on a real Ray: figures that do not depend on the workers, and labels that are checked first."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from ray.train import ScalingConfig

from ray_qa import evaluation, prediction
from ray_qa.errors import BadRowsError, CSVError, InputError
from ray_qa.evaluation import evaluate
from tests.conftest import EXAMPLES

pytestmark = pytest.mark.usefixtures("ray_session")


def write(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("context", "question", "answer_text", "answer_start"), *rows])
    return path


def test_figures_do_not_depend_on_the_workers(tiny_model: Path) -> None:
    one = evaluate(EXAMPLES / "eval.csv", model=tiny_model, scaling=ScalingConfig(num_workers=1))
    two = evaluate(EXAMPLES / "eval.csv", model=tiny_model, scaling=ScalingConfig(num_workers=2))
    assert one.result == two.result
    with open(EXAMPLES / "eval.csv", newline="", encoding="utf-8") as stream:
        assert one.result.num_rows == sum(1 for _ in csv.DictReader(stream)) == one.result.num_windows
    assert one.result.loss > 1 and one.result.exact_match <= one.result.f1 <= 100
    assert one.precision == "fp32"


@pytest.mark.shared
def test_loss_of_the_documented_rows_as_happy_transformer_counts_it(shared: Path) -> None:
    model, rows = shared / "models" / "minilm-squad", shared / "data" / "documented.csv"
    assert evaluate(rows, model=model).result.loss == pytest.approx(0.09028688, abs=1e-6)
    happy = evaluate(rows, model=model, args={"pair_order": "context_first"}).result
    assert happy.loss == pytest.approx(0.2075435370206833, abs=1e-6)


def test_bad_labels_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "bad.csv", [
        ("Ann has 3.", "who has 3?", "Ann", "0"),
        ("Ann has 3.", "who has 3?", "Bob", "0"),
        ("Ann has 3.", " ", "Ann", "0"),
        ("Ann has 3.", "who has 3?", "Ann", "zero"),
    ])
    monkeypatch.setattr(evaluation, "run_parts", lambda *_: pytest.fail("work was started"))
    with pytest.raises(BadRowsError) as caught:
        evaluate(path, model=tiny_model)
    message = str(caught.value)
    assert "3 of 4 rows cannot be used" in message
    for record, column, found in ((1, "answer_text", "Bob"), (2, "question", ""), (3, "answer_start", "zero")):
        assert f"{path}, record {record}, column {column}" in message and found in message


def test_allowed_bad_rows_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    good = ("Ann has 3.", "who has 3?", "Ann", "0")
    damaged = write(tmp_path / "damaged.csv", [good, ("Ann has 3.", "who has 3?", "Bob", "0"), good])
    clean = write(tmp_path / "clean.csv", [good, good])
    left_out = evaluate(damaged, model=tiny_model, args={"max_bad_rows": 1}).result
    assert (left_out.num_rows, left_out.num_bad_rows) == (2, 1)
    assert left_out.loss == evaluate(clean, model=tiny_model).result.loss


def test_rows_without_an_answer_where_they_are_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "v2.csv", [("Ann has 3.", "who has 3?", "Ann", "0"), ("Ann has 3.", "who?", "", "-1")])
    with pytest.raises(BadRowsError, match="handle_impossible_answer"):
        evaluate(path, model=tiny_model)
    done = evaluate(path, model=tiny_model, args={"handle_impossible_answer": True}).result
    assert (done.num_rows, done.num_bad_rows) == (2, 0)


def test_a_file_without_rows_or_labels(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty\.csv: there are no rows"):
        evaluate(write(tmp_path / "empty.csv", []), model=tiny_model)
    unlabelled = tmp_path / "unlabelled.csv"
    unlabelled.write_text("context,question\na,b\n")
    with pytest.raises(CSVError, match="lacks the column answer_text, answer_start"):
        evaluate(unlabelled, model=tiny_model)


def test_a_question_too_long_for_the_window_counts_as_wrong(tiny_model: Path, tmp_path: Path) -> None:
    good = ("Ann has 3.", "who has 3?", "Ann", "0")
    path = write(tmp_path / "long.csv", [good, ("Ann has 3.", "who " * 500, "Ann", "0")])
    done = evaluate(path, model=tiny_model).result
    assert (done.num_rows, done.num_error_rows, done.num_windows) == (2, 1, 1)


def test_evaluation_is_prediction_with_reducers() -> None:
    assert evaluation.run_parts is prediction.run_parts
