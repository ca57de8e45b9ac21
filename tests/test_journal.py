"""The history of a training: means over lines, the best evaluation, when to stop, and going on from a checkpoint."""

from __future__ import annotations

import json
import math

import pytest

from ray_qa.journal import Journal
from ray_qa.optimization import StepReport
from ray_qa.options import QATrainArgs


def report(step: int, loss: float, num_windows: int = 8) -> StepReport:
    return StepReport(step, loss, 1e-3, 2.0, num_windows, 100, 120)


def figures(loss: float, f1: float = 0.0) -> dict[str, float]:
    return {"loss": loss, "exact_match": f1 / 2, "f1": f1, "num_rows": 5}


def test_lines_are_means_over_logging_steps() -> None:
    journal = Journal(QATrainArgs(logging_steps=3), peak_flops=1e12)
    lines = [journal.add(report(step, float(step), 2 + step), flops=1e6) for step in range(7)]
    assert [line is not None for line in lines] == [False, False, True, False, False, True, False]
    journal.finish()
    assert [(line["step"], line["loss"]) for line in journal.lines] == [(3, 1.0), (6, 4.0)]
    assert (journal.first_loss, journal.last_loss, journal.loss_sum) == (0.0, 6.0, 21.0)
    assert (journal.num_steps, journal.num_windows) == (7, 35)
    assert journal.lines[0]["windows_per_second"] > 0 and 0 < journal.lines[0]["share_of_peak"]
    assert journal.share_of_peak == pytest.approx(7e6 / 1e12 / journal.seconds)


@pytest.mark.parametrize(("metric", "best"), [(None, 20), ("loss", 20), ("f1", 30), ("exact_match", 30)])
def test_the_best_evaluation_is_that_of_the_metric(metric: str | None, best: int) -> None:
    journal = Journal(QATrainArgs(metric_for_best_model=metric))
    for step, loss, f1 in ((10, 2.0, 50.0), (20, 1.0, 40.0), (30, 1.5, 60.0), (40, 1.5, 60.0)):
        journal.evaluated(step, figures(loss, f1))
    assert journal.best is not None and journal.best["step"] == best
    assert not journal.should_stop


def test_it_stops_after_evaluations_that_gain_too_little() -> None:
    journal = Journal(QATrainArgs(early_stopping_patience=2, early_stopping_threshold=0.1))
    stops = []
    for step, loss in enumerate((2.0, 1.5, 1.45, 1.3, 1.29, 1.28)):
        journal.evaluated(step, figures(loss))
        stops.append(journal.should_stop)
    # 1.45 gains too little, but is a new best, against which 1.3 gains enough.
    assert stops == [False, False, False, False, False, True]
    assert journal.best is not None and journal.best["step"] == 5


def test_a_loss_that_is_no_number_is_never_best() -> None:
    journal = Journal(QATrainArgs())
    journal.evaluated(1, figures(math.nan))
    journal.evaluated(2, figures(3.0))
    journal.evaluated(3, figures(math.nan))
    assert journal.best is not None and journal.best["step"] == 2


def test_going_on_is_as_if_never_stopped() -> None:
    args = QATrainArgs(logging_steps=4, early_stopping_patience=3)
    whole = Journal(args)
    broken = Journal(args)
    for step in range(10):
        for journal in (whole, broken):
            journal.add(report(step, 1.0 / (1 + step)))
            if step % 3 == 2:
                journal.evaluated(step + 1, figures(abs(step - 5)))
        if step == 5:
            told = json.loads(json.dumps(broken.to_json()))
            broken = Journal(args)
            broken.restore(told, 6)
    assert broken.resumed_at_steps == [6] and whole.resumed_at_steps == []
    assert (broken.evaluations, broken.best) == (whole.evaluations, whole.best)
    assert broken.num_evaluations_without_gain == whole.num_evaluations_without_gain == 1
    for name in ("step", "loss", "learning_rate", "gradient_norm"):
        assert [line[name] for line in broken.lines] == [line[name] for line in whole.lines]
    assert broken.loss_sum == whole.loss_sum
