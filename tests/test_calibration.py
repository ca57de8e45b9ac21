"""Calibration: recovers what made the data, improves what it has not seen, and does not depend on the parts."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa import calibration
from ray_qa.calibration import (
    Calibration,
    Probabilities,
    Sample,
    Step,
    bootstrap_interval,
    calibrate,
    fit,
    from_json,
    lowest_score,
    steps_of,
    to_json,
)
from ray_qa.errors import InputError, OptionError
from ray_qa.metrics import exact_match
from ray_qa.schema import PREDICTIONS


def details(seed: int, size: int, *, temperature: float = 2.0, offset: float = -0.5) -> pa.Table:
    """Rows of an over-confident model, five per context."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.01, 0.99, size)
    right = rng.random(size) < Calibration(temperature, offset).probability(score)
    names = [hashlib.blake2b(f"{seed} {i // 5}".encode(), digest_size=8).hexdigest() for i in range(size)]
    return pa.table({"score": score, "exact_match": right, "context_id": names})


def test_a_fit_finds_what_made_the_data() -> None:
    sample = Sample.of(details(0, 50_000))
    found = fit(sample.score, sample.right)
    assert found.temperature == pytest.approx(2, rel=0.05) and found.offset == pytest.approx(-0.5, abs=0.05)
    # At the optimum of a logistic regression the probabilities add up to the outcomes.
    assert found.probability(sample.score).mean() == pytest.approx(sample.right.mean(), abs=1e-4)


def test_a_fit_is_the_most_likely_one() -> None:
    sample = Sample.of(details(1, 2_000))
    best = fit(sample.score, sample.right)

    def loss(changed: Calibration) -> float:
        probability = changed.probability(sample.score)
        pull = ((1 / changed.temperature - 1) ** 2 + 0.01 * changed.offset**2) / 2
        return float(-np.where(sample.right, np.log(probability), np.log1p(-probability)).sum() + pull)

    for slope, offset in ((1.01, 0), (0.99, 0), (1, 0.01), (1, -0.01)):
        assert loss(Calibration(best.temperature * slope, best.offset + offset)) > loss(best)


def test_probabilities_are_finite_ordered_and_the_score_itself_at_temperature_one() -> None:
    score = np.array([0, 1e-30, 0.2, 0.5, 0.999, 1.0])
    probability = Calibration(0.01, 3.0).probability(score)
    assert np.isfinite(probability).all() and (np.diff(probability) >= 0).all() and probability.max() <= 1
    assert Calibration().probability(score[2:5]) == pytest.approx(score[2:5])


@pytest.mark.parametrize("right", [lambda s: s > 0.5, lambda s: s < 0.5, lambda s: s > 2, lambda s: s < 2])
def test_outcomes_that_a_threshold_separates_have_a_fit(right) -> None:
    score = np.linspace(0, 1, 400)
    found = fit(score, right(score))
    assert np.isfinite([found.temperature, found.offset]).all() and found.temperature > 0
    assert found.probability(score).mean() == pytest.approx(right(score).mean(), abs=0.01)


@pytest.mark.parametrize("share", [0.02, 0.3, 2 / 3, 0.98])
def test_scores_that_are_all_alike_are_moved_to_the_share_of_right_answers(share: float) -> None:
    score = np.full(300, 3e-4) + np.linspace(0, 1e-6, 300)
    right = np.random.default_rng(0).permutation(300) < 300 * share
    found = fit(score, right)
    assert found.probability(score).mean() == pytest.approx(right.mean(), abs=0.002) and found.temperature > 0


def test_what_is_gained_is_measured_on_contexts_that_the_fit_has_not_seen() -> None:
    sample = Sample.of(details(3, 4_000))
    seen, unseen = sample.halves()
    assert not set(seen.context.tolist()) & set(unseen.context.tolist())
    assert len(seen.context) + len(unseen.context) == 4_000
    found, figures = calibrate(sample)
    assert figures["num_contexts"] == 800 and figures["num_rows_measured"] == 2_000
    for name in ("negative_log_likelihood", "brier_score"):
        measured = figures[name]
        assert 0 < measured["gain_low"] < measured["before"] - measured["after"] < measured["gain_high"]
    stored = to_json(found, figures, 0.25)
    assert stored["temperature"] == found.temperature and stored["null_threshold"] == 0.25


@pytest.mark.shared
def test_recorded_answers_gain_on_contexts_not_seen(shared: Path) -> None:
    """minilm-squad on squad-eval: both intervals of the gain exclude zero."""
    with open(shared / "data" / "squad-eval.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(shared / "golden" / "squad-eval.top1.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    table = pa.table({
        "score": [float(answer["score"]) for answer in answers],
        "exact_match": [
            exact_match(answer["answer"], [row["answer_text"]]) == 1 for answer, row in zip(answers, rows, strict=True)
        ],
        "context_id": [hashlib.blake2b(row["context"].encode(), digest_size=8).hexdigest() for row in rows],
    })
    found, figures = calibrate(Sample.of(table))
    assert found.temperature == pytest.approx(1.8265, abs=1e-3) and found.offset == pytest.approx(-0.4148, abs=1e-3)
    assert figures["num_contexts"] == 240
    assert figures["negative_log_likelihood"]["gain_low"] > 0.03 and figures["brier_score"]["gain_low"] > 0.007


def test_a_calibrated_model_gains_nothing() -> None:
    _, figures = calibrate(Sample.of(details(4, 4_000, temperature=1.0, offset=0.0)))
    assert figures["brier_score"]["gain_low"] < 0.001 and abs(figures["brier_score"]["gain_high"]) < 0.003


def test_interval_of_clusters_is_wider_than_that_of_rows() -> None:
    rng = np.random.default_rng(5)
    cluster = np.repeat(np.arange(100), 10)
    values = rng.normal(size=100)[cluster]  # the rows of a context are all alike
    low, high = bootstrap_interval(values, cluster)
    narrow = bootstrap_interval(values, np.arange(1000))
    assert low < values.mean() < high
    assert (high - low) / (narrow[1] - narrow[0]) == pytest.approx(10**0.5, rel=0.25)
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.lists(st.integers(0, 600), max_size=4), st.randoms(use_true_random=False))
def test_samples_merge_to_the_same_in_any_order(seed: int, cuts: list[int], rng: random.Random) -> None:
    table = details(seed, 600)
    edges = [0, *sorted(cuts), 600]
    largest = calibration.MAX_SAMPLE
    try:
        calibration.MAX_SAMPLE = 200
        parts = [Sample.of(table.slice(a, b - a)) for a, b in zip(edges, edges[1:], strict=False)]
        rng.shuffle(parts)
        merged, whole = sum(parts, Sample()).ordered(), Sample.of(table).ordered()
    finally:
        calibration.MAX_SAMPLE = largest
    assert 50 <= len(whole.score) <= 200 and merged.limit == whole.limit
    assert np.array_equal(merged.score, whole.score) and np.array_equal(merged.right, whole.right)
    assert calibrate(merged) == calibrate(whole)


def test_too_little_to_fit() -> None:
    with pytest.raises(InputError, match="found 45 rows with 9 contexts.*at least 50 rows with 10 contexts and 5"):
        calibrate(Sample.of(details(6, 45)))
    with pytest.raises(InputError, match="found 0 rows"):
        calibrate(Sample())


def test_steps_hold_the_rows_from_each_score_on() -> None:
    sample = Sample.of(details(7, 5_000))
    steps = steps_of(sample)
    assert len(steps) == calibration.NUM_STEPS and steps[-1] == (
        sample.score.min(), 5_000, np.count_nonzero(sample.right)
    )
    for step in steps[::50]:
        above = sample.score >= step.score
        assert step[1:] == (np.count_nonzero(above), np.count_nonzero(sample.right & above))
    score, right, context = np.array([0.5, 0.7, 0.5, 0.1]), np.array([True, True, False, True]), np.zeros(4, np.uint64)
    assert steps_of(Sample(score, right, context)) == [(0.7, 1, 1), (0.5, 3, 2), (0.1, 4, 3)]
    assert steps_of(Sample()) == []


@pytest.mark.parametrize(("k", "n", "share"), [(59, 59, 0.95), (90, 100, 0.8), (17, 30, 0.5), (300, 400, 0.7)])
def test_the_chance_of_so_many_is_the_binomial_one(k: int, n: int, share: float) -> None:
    table = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    expected = sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k, n + 1))
    assert calibration._chance_of_so_many(k, n, share, table) == pytest.approx(expected, rel=1e-9)


def test_a_target_is_proven_by_a_lower_bound_and_not_by_a_share() -> None:
    # 90 of 100 are a share of 0.9, and prove less; 100 of 100 prove 0.95 (0.01 risk a start: 0.95**100 = 0.006).
    assert lowest_score([Step(0.9, 50, 50), Step(0.5, 100, 90)], 0.9) == (0.9, 50, 50)
    assert lowest_score([Step(0.9, 89, 89)], 0.95) is None
    assert lowest_score([Step(0.9, 90, 90)], 0.95) == (0.9, 90, 90)
    assert lowest_score([Step(0.9, 90, 89)], 0.95) is None
    assert lowest_score([], 0.5) is None
    # Nothing is proven below a step that fails, however good it looks: except from a later start.
    steps = [Step(0.9, 100, 100), Step(0.8, 120, 110), Step(0.7, 170, 169)]
    assert lowest_score(steps, 0.95) == (0.9, 100, 100)
    assert lowest_score([*steps, Step(0.6, 400, 397)], 0.95) == (0.6, 400, 397)


@pytest.mark.parametrize("target", [0.6, 0.8, 0.9])
def test_a_target_is_missed_no_more_often_than_said(target: float) -> None:
    """On 60 samples of rows whose true precision is known."""
    truth = Calibration(0.6, 0.2)
    scores = np.linspace(0.001, 0.999, 2_000)
    precision = np.cumsum(truth.probability(scores)[::-1])[::-1] / np.arange(len(scores), 0, -1)
    rng = np.random.default_rng(8)
    missed = found = 0
    coverage = []
    for _ in range(60):
        score = rng.uniform(0, 1, 1_000)
        right = rng.random(1_000) < truth.probability(score)
        step = lowest_score(steps_of(Sample(score, right, np.zeros(1_000, np.uint64))), target)
        if step is not None:
            found += 1
            missed += precision[min(np.searchsorted(scores, step.score), len(scores) - 1)] < target
            coverage.append(step.num_rows / 1_000)
    possible = (precision >= target).mean()
    assert missed <= 60 * calibration.RISK and found > 55
    assert 0.6 * possible < np.mean(coverage) < possible


def test_a_stored_calibration_gives_probabilities_and_a_limit() -> None:
    sample = Sample.of(details(9, 20_000))
    found, figures = calibrate(sample)
    stored = json.loads(json.dumps(to_json(found, figures, None, steps_of(sample))))
    assert from_json(stored) == Probabilities(found) and from_json(stored, min_probability=0.3).min_probability == 0.3
    limit = from_json(stored, target_precision=0.7).min_probability
    assert limit is not None
    kept = found.probability(sample.score) >= limit
    assert 0.7 < sample.right[kept].mean() < 0.75 and kept.mean() > 0.05
    with pytest.raises(OptionError, match=r"target_precision is 0\.9999.*20000 rows.*min_probability"):
        from_json(stored, target_precision=0.9999)
    for broken in ({"temperature": 1.0}, stored | {"temperature": -1.0}, stored | {"steps": [[1, 2]]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            from_json(broken)


def test_probabilities_are_columns_and_answers_stay() -> None:
    lines = [
        {"row_index": i, "answer": "a", "score": score, "start": 0, "end": 1, "error": error}
        for i, (score, error) in enumerate([(0.9, None), (0.2, None), (0.0, "too long"), (0.5, None)])
    ]
    table = pa.Table.from_pylist(lines, schema=PREDICTIONS)
    plain = Probabilities(Calibration(1.0, 0.0)).add_to(table)
    assert plain.column_names == [*PREDICTIONS.names, "probability"]
    assert plain.select(PREDICTIONS.names).equals(table)
    assert plain["probability"].to_pylist() == [pytest.approx(0.9), pytest.approx(0.2), None, pytest.approx(0.5)]
    marked = Probabilities(Calibration(1.0, 0.0), 0.5).add_to(table)
    assert marked["abstain"].to_pylist() == [False, True, True, False]
    assert len(Probabilities(Calibration(), 0.5).add_to(table.slice(0, 0))) == 0
