from __future__ import annotations

import dataclasses
import typing

import pytest

from ray_qa.errors import OptionError
from ray_qa.metrics import LANGUAGES
from ray_qa.options import ARGS_QA_TRAIN, Language, QAEvalArgs, QATestArgs, QATrainArgs, allowance, training_options


def test_documented_dictionary_is_the_default() -> None:
    assert ARGS_QA_TRAIN == {
        "learning_rate": 5e-5, "weight_decay": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0, "num_train_epochs": 3.0,
    }
    assert QATrainArgs.of(ARGS_QA_TRAIN) == QATrainArgs() == QATrainArgs.of(None)


def test_partial_dictionary_keeps_other_defaults() -> None:
    args = QATrainArgs.of({"num_train_epochs": 1})
    assert args.num_train_epochs == 1.0 and isinstance(args.num_train_epochs, float)
    assert args.learning_rate == 5e-5 and args.batch_size == 8


def test_evaluation_defaults_to_full_precision() -> None:
    assert (QAEvalArgs().precision, QATestArgs().precision, QATrainArgs().precision) == ("fp32", "auto", "auto")


@pytest.mark.parametrize(
    ("args", "found", "allowed"),
    [
        ({"learning_rat": 1e-3}, "'learning_rat'", "learning_rate, weight_decay"),
        ({"learning_rate": -1}, "-1", "at least 0"),
        ({"learning_rate": float("nan")}, "nan", "at least 0"),
        ({"learning_rate": "fast"}, "'fast'", "a number"),
        ({"adam_beta1": 1.0}, "1.0", "below 1"),
        ({"adam_epsilon": 0}, "0", "above 0"),
        ({"num_train_epochs": 0}, "0", "above 0"),
        ({"batch_size": 0}, "0", "at least 1"),
        ({"batch_size": 2.5}, "2.5", "whole number"),
        ({"batch_size": True}, "True", "at least 1"),
        ({"precision": "fp16"}, "'fp16'", "'auto', 'bf16', 'fp32'"),
        ({"delimiter": "|"}, "'|'", "',', ';', 'tab' or None"),
        ({"handle_impossible_answer": 1}, "1", "True, False"),
        ({"max_steps": 0}, "0", "at least 1 or None"),
        ({"report_to": "paper"}, "'paper'", "'tensorboard', 'mlflow', 'wandb'"),
        ({"report_to": ["mlflow", 3]}, "3", "'tensorboard', 'mlflow', 'wandb'"),
        ({"report_to": 3}, "3", "one or several of 'tensorboard'"),
        ({"eval_ratio": 1.0}, "1.0", "below 1"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps is 5", "'steps' or None"),
        ({"eval_strategy": "steps"}, "without eval_steps", "both"),
        (7, "int", "QATrainArgs"),
    ],
)
def test_what_is_refused(args: object, found: str, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        QATrainArgs.of(args)  # type: ignore[arg-type]
    assert found in str(caught.value) and allowed in str(caught.value)


def test_languages_are_those_that_can_be_normalized() -> None:
    assert set(typing.get_args(Language)) == set(LANGUAGES)
    assert QAEvalArgs(normalization="mlqa", language="zh").language == "zh"
    with pytest.raises(OptionError, match="'xx'; allowed: 'en', 'es'.*'other'"):
        QAEvalArgs.of({"language": "xx"})


def test_reporters_are_one_or_several() -> None:
    assert QATrainArgs().report_to == ("tensorboard",)
    assert QATrainArgs.of({"report_to": "mlflow"}).report_to == ("mlflow",)
    assert QATrainArgs.of({"report_to": ["wandb", "mlflow", "wandb"]}).report_to == ("wandb", "mlflow")
    assert QATrainArgs.of({"report_to": []}).report_to == ()


def test_when_to_evaluate() -> None:
    def steps(**options: object) -> list[int]:
        args = QATrainArgs.of(options)
        return [done for done in range(1, 11) if args.evaluates_after(done, 10, 4)]

    assert steps() == steps(eval_strategy="epoch") == [4, 8, 10]
    assert steps(eval_steps=3) == steps(eval_steps=3, eval_strategy="steps") == [3, 6, 9, 10]
    assert steps(eval_strategy="no") == [10]


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({}, False), ({"metric_for_best_model": "f1"}, True), ({"early_stopping_patience": 1}, True),
        ({"load_best_model_at_end": True}, True),
        ({"load_best_model_at_end": False, "metric_for_best_model": "f1"}, False),
    ],
)
def test_whether_the_best_model_comes_out(options: dict[str, object], keeps: bool) -> None:
    assert QATrainArgs.of(options).keeps_best is keeps


def test_options_that_only_watch_do_not_make_another_training() -> None:
    watching = QATrainArgs(
        logging_steps=3, report_to=(), save_steps=1, save_seconds=None, save_total_limit=9, max_failures=0
    )
    assert training_options(watching) == training_options(QATrainArgs())
    assert training_options(QATrainArgs(eval_steps=3)) != training_options(QATrainArgs())


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QATestArgs().max_answer_length = 3  # type: ignore[misc]


@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (0.01, 10), (0.5, 500), (1, 1), (25, 25)])
def test_allowance_is_a_share_below_one_and_a_count_from_one(limit: float, allowed: int) -> None:
    assert allowance(limit, 1000) == allowed


def test_only_prediction_gives_several_answers() -> None:
    assert QATestArgs.of({"top_k": 5}).top_k == 5
    with pytest.raises(OptionError, match="QAEvalArgs has no option 'top_k'"):
        QAEvalArgs.of({"top_k": 5})
    with pytest.raises(OptionError, match="top_k is 0; allowed: a number at least 1"):
        QATestArgs(top_k=0)
