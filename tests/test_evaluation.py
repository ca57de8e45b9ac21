"""Evaluation on a real Ray: figures that do not depend on the workers, and labels that are checked first."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.train import ScalingConfig

from ray_qa import HappyQuestionAnswering, comparison, evaluation, prediction, schema, slices
from ray_qa.calibration import Calibration
from ray_qa.csv_file import Part
from ray_qa.engine import Engine
from ray_qa.errors import BadRowsError, CSVError, InputError, OptionError, OutputError
from ray_qa.evaluation import compare, evaluate
from ray_qa.model import load_model, resolve_model
from ray_qa.options import QAEvalArgs, QATestArgs
from ray_qa.storage import locate

pytestmark = pytest.mark.usefixtures("ray_session")


def write(path: Path, rows: list[tuple[str, ...]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("context", "question", "answer_text", "answer_start"), *rows])
    return path


@pytest.mark.shared
def test_loss_of_the_documented_rows_as_happy_transformer_counts_it(shared: Path) -> None:
    model, rows = shared / "models" / "minilm-squad", shared / "data" / "documented.csv"
    done = evaluate(rows, model=model, args={"pair_order": "context_first"})
    assert done.result.loss == pytest.approx(0.2075435370206833, abs=1e-6) and done.precision == "fp32"


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


def test_rows_that_are_bad_or_long_or_have_no_answer(tiny_model: Path, tmp_path: Path) -> None:
    """Bad ones are left out, too long ones count as wrong, those without an answer count where they are asked for."""
    good = ("Ann has 3.", "who has 3?", "Ann", "0")
    bad, long = ("Ann has 3.", "who has 3?", "Bob", "0"), ("Ann has 3.", "who " * 500, "Ann", "0")
    path = write(tmp_path / "rows.csv", [good, bad, good, long, ("Ann has 3.", "who?", "", "-1")])
    with pytest.raises(BadRowsError, match="handle_impossible_answer"):
        evaluate(path, model=tiny_model, args={"max_bad_rows": 1})
    args = QAEvalArgs(max_bad_rows=1, handle_impossible_answer=True)
    done = evaluate(path, model=tiny_model, args=args).result
    assert (done.num_rows, done.num_bad_rows, done.num_error_rows, done.num_windows) == (4, 1, 1, 3)
    assert done.num_no_answer == 1

    engine = Engine(load_model(tiny_model, device="cpu", precision="fp32"), args)
    names = ("row_index", *schema.TRAIN_COLUMNS)
    rows = [(i, *good[:3], 0) for i in range(2)] + [(2, "Ann has 3.", "who?", "", -1)]
    table = pa.table({name: pa.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
    found = evaluation.Scorer(args, locate(tmp_path), False)(
        Part(file=0, start=0, end=0, first_row=0, num_rows=3), table, engine.answer(table, with_loss=True)
    )
    assert done.loss == pytest.approx(found.scores.loss, abs=1e-6)


def test_a_file_without_rows_or_labels(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty\.csv: there are no rows"):
        evaluate(write(tmp_path / "empty.csv", []), model=tiny_model)
    unlabelled = tmp_path / "unlabelled.csv"
    unlabelled.write_text("context,question\na,b\n")
    with pytest.raises(CSVError, match="lacks the column answer_text, answer_start"):
        evaluate(unlabelled, model=tiny_model)


LABELLED = ("context", "question", "answer_text", "answer_start", "answers")


def write_many(path: Path) -> Path:
    """600 rows, three parts: long and short contexts, a second right answer, none, a question too long."""
    long = "Ann has 3 keys. " + "Bob has none of them at all. " * 60
    kinds = [
        ("Ann has 3 keys.", "who has 3 keys?", "Ann", "0", '["3", "the Ann"]'),
        (long, "who has none?", "Bob", "16", ""),
        ("Ann has 3.", "who?", "", "-1", "[]"), ("Cid, Ann", "who?", "Ann", "5", ""),
        ("Ann has 3.", "who " * 500, "Ann", "0", ""), ("Ann has 3.", "what has she?", "has 3", "4", ""),
    ]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        hostile = [(f"{context} <script>alert(1)</script>", f"<b>{rest[0]}", *rest[1:]) for context, *rest in kinds]
        csv.writer(stream).writerows([LABELLED, *(hostile[i % 6] for i in range(600))])
    return path


def test_output_folder_is_the_same_for_any_workers(tiny_model: Path, tmp_path: Path) -> None:
    path = write_many(tmp_path / "many.csv")
    args = {"handle_impossible_answer": True, "max_seq_length": 64}
    outputs, done = [], []
    for num_workers in (1, 2):
        outputs.append(tmp_path / f"out-{num_workers}")
        (outputs[-1] / "details").mkdir(parents=True)
        for left_over in ("details/part-000000000007.parquet", "eval.json", "report.html"):
            (outputs[-1] / left_over).write_text("of an earlier evaluation")
        done.append(evaluate(path, model=tiny_model, args=args, output_path=outputs[-1],
                             scaling=ScalingConfig(num_workers=num_workers)))
    result = done[0].result
    assert result == done[1].result
    assert (result.num_rows, result.num_error_rows, result.num_no_answer) == (600, 100, 100)
    first, second = (pq.read_table(output / "details") for output in outputs)
    assert first == second and first.schema.equals(slices.DETAILS)
    assert first["row_index"].to_pylist() == list(range(600))

    # The details say what the figures say.
    assert 100 * np.mean(first["exact_match"].to_numpy()) == pytest.approx(result.exact_match)
    assert 100 * np.mean(first["f1"].to_numpy()) == pytest.approx(result.f1)
    windows, loss = first["num_windows"].to_numpy(), np.nan_to_num(first["loss"].to_numpy())
    assert (windows * loss).sum() / windows.sum() == pytest.approx(result.loss) and windows.sum() == result.num_windows
    with_text = first.filter(first["has_answer"])
    assert 100 * np.mean(with_text["f1"].to_numpy()) == pytest.approx(result.has_answer_f1)
    answer = first["null_score"].fill_null(1.0).to_numpy() > result.best_exact_match_threshold
    right = np.where(answer, ~first["has_answer"].to_numpy(), first["text_exact_match"].to_numpy())
    assert 100 * right.mean() == pytest.approx(result.best_exact_match)
    assert result.best_exact_match >= result.exact_match
    line = first.slice(0, 1).to_pylist()[0]
    assert line["golds"] == ["Ann", "3", "the Ann"] and (line["answer_start"], line["answer_end"]) == (0, 3)
    assert line["question_word"] == "who" and line["answer_length"] == 1 and line["answer_position"] == 0.0
    assert first["num_windows"][1].as_py() > 1 and first["context_length"][1].as_py() > 64
    assert len(set(first["context_id"].to_pylist())) == 4

    varying = {"num_workers", "rows_per_second"}
    figures = [json.loads((output / "eval.json").read_text()) for output in outputs]
    assert {k: v for k, v in figures[0].items() if k not in varying} == {
        k: v for k, v in figures[1].items() if k not in varying
    }
    assert figures[0]["f1"] == result.f1 and len(figures[0]["slices"]) == len(slices.DIMENSIONS)
    page = (outputs[0] / "report.html").read_text()
    assert page.count("data-row=") == 50 and page.count("<figure data-chart=") == 7
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>who" not in page


@pytest.mark.parametrize("impossible", [False, True])
def test_a_part_without_usable_rows_has_empty_details(impossible: bool, tiny_model: Path, tmp_path: Path) -> None:
    args = QAEvalArgs(handle_impossible_answer=impossible)
    engine = Engine(load_model(tiny_model, device="cpu", precision="fp32"), args)
    types = {"row_index": pa.int64(), "answer_start": pa.int64()}
    names = ("row_index", *schema.TRAIN_COLUMNS)
    table = pa.schema([(name, types.get(name, pa.string())) for name in names]).empty_table()
    part = Part(file=0, start=0, end=0, first_row=7, num_rows=3)
    found = evaluation.Scorer(args, locate(tmp_path), True)(part, table, engine.answer(table, with_loss=True))
    assert (found.scores.num_rows, found.thresholds.num_rows, len(found.sample.score)) == (0, 0, 0)
    assert found.summary.to_json() == slices.Summary().to_json() and found.summary.worst == ()
    written = pq.read_table(tmp_path / "part-000000000007.parquet")
    assert len(written) == 0 and written.schema.equals(slices.DETAILS)


def test_calibration_is_written_beside_the_model_and_test_finds_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    contexts = [f"Ann has {number} keys." for number in range(120)]
    path = write(tmp_path / "rows.csv", [(context, "who has keys?", "Ann", "0") for context in contexts])
    qa = HappyQuestionAnswering("BERT", str(tiny_model))
    rows = []
    for number, context in enumerate(contexts):  # two of three are right
        (answer,) = qa.answer_question(context, "who has keys?", args={"precision": "fp32"})
        wrong = "keys" if answer.answer == "has" else "has"
        label = (answer.answer, str(answer.start)) if number % 3 else (wrong, str(context.index(wrong)))
        rows.append((context, "who has keys?", *label))
    write(path, rows)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    with pytest.raises(OptionError, match="output folder"):
        evaluate(path, model=model, calibrate=True)
    before = resolve_model(model).digest
    done = evaluate(path, model=model, calibrate=True, output_path=tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert stored == json.loads((model / "calibration.json").read_text())
    assert before == stored["model_digest"] == resolve_model(model).digest  # the model is the same as before
    assert (stored["num_rows"], stored["num_contexts"], stored["null_threshold"]) == (120, 120, None)
    assert stored["steps"][-1][1:] == [120, 80] and stored["options"]["max_answer_length"] == 15
    # The probabilities of a fit with an offset add up to the number of right answers, but for the pull.
    details = pq.read_table(tmp_path / "out" / "details")
    fitted = Calibration(stored["temperature"], stored["offset"])
    expected = 120 * done.result.exact_match / 100
    assert fitted.probability(details["score"].to_numpy()).sum() == pytest.approx(expected, abs=0.2)
    assert expected == pytest.approx(80)
    assert "class='line curve'" in (tmp_path / "out" / "report.html").read_text()

    # `test` finds it there.
    limit = float(np.median(fitted.probability(details["score"].to_numpy())))
    limited = {"precision": "fp32", "min_probability": limit}
    answered = prediction.predict(path, model=model, args=limited, output_path=tmp_path / "limited").answers
    table = pq.read_table(tmp_path / "limited")
    assert table.column_names == [*schema.PREDICTIONS.names, "probability", "abstain"]
    assert answered.to_table().equals(table) and answered[0]._fields == ("answer", "score", "start", "end")
    probability = fitted.probability(table["score"].to_numpy().astype(np.float64))
    assert table["probability"].to_pylist() == pytest.approx(probability.tolist())
    assert table["abstain"].to_pylist() == (table["probability"].to_numpy() < limit).tolist()
    assert set(table["abstain"].to_pylist()) == {False, True}
    assert table["answer"].to_pylist() == details["prediction"].to_pylist()

    # A folder does not go on with another calibration, and none is taken that is not of this model and these options.
    file = model / "calibration.json"
    file.write_text(json.dumps(stored | {"offset": 1.0}))
    with pytest.raises(OutputError, match="calibration was.*offset.*overwrite"):
        prediction.predict(path, model=model, args=limited, output_path=tmp_path / "limited")
    file.write_text(json.dumps(stored))
    monkeypatch.setattr(prediction, "run_parts", lambda *_: pytest.fail("work was started"))
    refused = [
        (model, {"target_precision": 0.99}, r"target_precision is 0\.99.*120 rows of the calibration do not prove"),
        (model, {"min_probability": 0.5, "max_answer_length": 3}, "other options .max_answer_length 15 instead of 3"),
        (tiny_model, {"min_probability": 0.5}, r"has no calibration\.json; `jobs\.eval --calibrate`"),
        (model, {"min_probability": 0.5, "target_precision": 0.5}, "allowed: one of them"),
    ]
    for at, args, message in refused:
        with pytest.raises(OptionError, match=message):
            prediction.predict(path, model=at, args={"precision": "fp32"} | args, output_path=tmp_path / "refused")
    with pytest.raises(OptionError, match="without an output folder"):
        prediction.predict(path, model=model, args=limited)
    file.write_text(json.dumps(stored | {"model_digest": "0"}))
    with pytest.raises(OptionError, match="made for another model"):
        prediction.predict(path, model=model, args=limited, output_path=tmp_path / "refused")
    file.write_text("{}")
    with pytest.raises(OptionError, match="not what this version writes"):
        prediction.predict(path, model=model, args=limited, output_path=tmp_path / "refused")
    source, unlimited = resolve_model(model), QATestArgs(precision="fp32")
    assert prediction.probabilities_of(source, unlimited, "fp32", to_files=True) is None
    assert "no column probability" in caplog.text and not (tmp_path / "refused").exists()
    monkeypatch.undo()

    few = write(tmp_path / "few.csv", rows[:9])
    with pytest.raises(InputError, match="found 9 rows with 9 contexts, 6 of them answered right and 3 wrong"):
        evaluate(few, model=model, calibrate=True, output_path=tmp_path / "few")
    assert {path.name for path in (tmp_path / "few").iterdir()} == {"details", "eval.json", "report.html"}


@pytest.mark.slow
def test_further_answers_and_normalization_count(tiny_model: Path, tmp_path: Path) -> None:
    context, question = "Der Hund 東京!", "wer?"
    (found,) = HappyQuestionAnswering("BERT", str(tiny_model)).answer_question(context, question)
    label = "H" if found.answer != "H" else "u"
    further = ["", json.dumps(["nothing", found.answer]), json.dumps([f"dem {found.answer}"])]
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        rows = [(context, question, label, context.index(label), answers) for answers in further]
        csv.writer(stream).writerows([LABELLED, *rows])

    def exact(**args: str) -> list[float]:
        output = tmp_path / "-".join(["out", *args.values()])
        evaluate(path, model=tiny_model, args=args, output_path=output)
        return pq.read_table(output / "details")["exact_match"].to_pylist()

    assert exact() == [0, 1, 0]
    assert exact(normalization="mlqa", language="de") == [0, 1, 1]


def test_bad_further_answers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("context,question,answer_text,answer_start,answers\nAnn has 3.,who?,Ann,0,Ann\n")
    with pytest.raises(BadRowsError, match=r"record 0, column answers: answers_not_a_list: found 'Ann'.*JSON list"):
        evaluate(path, model=tiny_model)
    with pytest.raises(InputError, match=r"plain\.csv: lacks the column answers"):
        evaluate([path, write(tmp_path / "plain.csv", [("Ann", "who?", "Ann", "0")])], model=tiny_model)


def test_evaluation_is_prediction_with_reducers() -> None:
    assert evaluation.run_parts is prediction.run_parts


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other random weights."""
    import torch
    from transformers import AutoModelForQuestionAnswering

    folder = tmp_path_factory.mktemp("other_model")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_two_models_on_the_same_rows(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    path, output = write_many(tmp_path / "many.csv"), tmp_path / "out"
    args = {"max_bad_rows": 100, "max_seq_length": 64}  # the rows without an answer are left out
    (output / "details").mkdir(parents=True)
    (output / "details" / "part-000000000007.parquet").write_text("of an earlier comparison")
    done = compare(path, models=(tiny_model, other_model), output_path=output, args=args)

    assert done.b == evaluate(path, model=other_model, args=args).result != done.a
    table = pq.read_table(output / "details")
    assert table.schema.equals(comparison.PAIRS)
    assert table["row_index"].to_pylist() == [row for row in range(600) if row % 6 != 2]
    for model, result in (("a", done.a), ("b", done.b)):
        details = pq.read_table(output / model / "details")
        assert table[f"f1_{model}"].equals(details["f1"]) and table[f"prediction_{model}"].equals(details["prediction"])
        assert json.loads((output / model / "eval.json").read_text())["f1"] == result.f1
    gained = table["f1_b"].to_numpy() - table["f1_a"].to_numpy()
    assert done.f1.difference == pytest.approx(100 * gained.mean(), abs=1e-4)
    assert done.f1.difference == pytest.approx(done.b.f1 - done.a.f1, abs=1e-4)
    assert (done.f1.won, done.f1.lost) == ((gained > 1e-6).sum(), (gained < -1e-6).sum()) != (0, 0)
    assert done.num_contexts == 4 and done.f1.low is None  # too few contexts for an interval
    stored = json.loads((output / "compare.json").read_text())
    assert stored["f1_difference"]["difference"] == done.f1.difference and stored["b"]["loss"] == done.b.loss
    page = (output / "compare.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>who" not in page and "data-row=" in page

    with pytest.raises(OutputError, match=r"already holds a comparison \('compare\.json'\)"):
        evaluate(path, model=tiny_model, args=args, output_path=output)
    with pytest.raises(OutputError, match=r"already holds an evaluation \('eval\.json'\)"):
        compare(path, models=(tiny_model, other_model), args=args, output_path=output / "a")


@pytest.mark.slow
def test_folders_with_answers_and_with_figures_are_kept_apart(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.csv", [("Ann has 3.", "who has 3?", "Ann", "0")])
    evaluate(path, model=tiny_model, output_path=tmp_path / "figures")
    prediction.predict(path, model=tiny_model, output_path=tmp_path / "answers")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for module in (evaluation, prediction):
        monkeypatch.setattr(module, "run_parts", lambda *_: pytest.fail("work was started"))
    with pytest.raises(OutputError, match=r"answers: the folder already holds answers of test.*_manifest"):
        evaluate(path, model=tiny_model, output_path=tmp_path / "answers")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"figures: .*details"):
            prediction.predict(path, model=tiny_model, output_path=tmp_path / "figures", overwrite=overwrite)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_rows_that_repeat_share_their_answers(tiny_model: Path, tmp_path: Path) -> None:
    """A row of the first part and one of the last: what one has is right for the other."""
    filler = [("Bob has 7 keys.", f"who has {i} keys?", "Bob", "0") for i in range(598)]
    first, last = ("Ann has 3 keys.", "who?", "Ann", "0"), ("Ann has 3 keys.", "who?", "keys", "10")
    path = write(tmp_path / "rows.csv", [first, *filler, last])
    evaluate(path, model=tiny_model, args={"share_answers": True}, output_path=tmp_path / "out")
    golds = pq.read_table(tmp_path / "out" / "details")["golds"].to_pylist()
    assert (golds[0], golds[-1]) == (["Ann", "keys"], ["keys", "Ann"])
    assert golds[1:-1] == [["Bob"]] * 598
