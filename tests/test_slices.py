"""Sums by kind of row: against plain loops over the rows, merged in any order, and the worst rows."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa.slices import (
    DETAILS,
    DIMENSIONS,
    NUM_WORST,
    QUESTION_WORDS,
    Summary,
    marked,
    question_word,
    wilson_interval,
)

CONTEXT = "Ann has 3 keys. Bob has none of them, and Cid lost his own in 1999."


def detail(row: int, **changes: Any) -> dict[str, Any]:
    line = {
        "row_index": row, "context_id": "c", "question": "who?", "prediction": "Ann", "golds": ["Ann"], "score": 0.5,
        "text_prediction": "Ann", "text_score": 0.5, "null_score": None, "exact_match": True, "f1": 1.0,
        "text_exact_match": True, "has_answer": True, "loss": 1.0, "num_windows": 1, "context_length": 20,
        "answer_length": 1, "question_word": "who", "answer_position": 0.0, "start": 0, "end": 3, "answer_start": 0,
        "answer_end": 3, "error": None,
    }
    assert changes.keys() <= line.keys()
    return line | changes


def summary(lines: list[dict[str, Any]]) -> Summary:
    return Summary.of(pa.Table.from_pylist(lines, schema=DETAILS), [CONTEXT] * len(lines))


def random_lines(seed: int, size: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    lines = []
    for row in range(size):
        has_answer, exact = rng.random() < 0.8, rng.random() < 0.4
        lines.append(detail(
            row, exact_match=exact, f1=1.0 if exact else rng.choice([0.0, 0.1, 1 / 3, 2 / 3]), score=rng.random(),
            has_answer=has_answer, loss=rng.choice([None, rng.expovariate(0.5)]), num_windows=rng.choice([0, 1, 2, 5]),
            context_length=rng.choice([0, 1, 99, 100, 149, 150, 399, 400, 1599, 1600, 10**6]),
            answer_length=rng.choice([0, 1, 2, 3, 4, 5, 6, 10, 11, 500]) if has_answer else 0,
            question_word=rng.choice(QUESTION_WORDS), answer_position=rng.random() if has_answer else None,
        ))
    return lines


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who won?", "who"), ("To WHOM did it go?", "who"), ("Whose is it?", "who"), ("In what year?", "what"),
        ("How many were there?", "how many"), ("how much is it", "how many"), ("How did it end?", "how"),
        ("The show, when was it?", "when"), ("Name the river.", "other"), ("何年ですか?", "other"), ("", "other"),
    ],
)
def test_question_word(question: str, word: str) -> None:
    assert question_word(question) == word


def test_slices_are_means_over_their_rows() -> None:
    lines = random_lines(1, 400)
    found = {part["name"]: {b["label"]: b for b in part["buckets"]} for part in summary(lines).to_json()["slices"]}
    for word in QUESTION_WORDS:
        mine = [line for line in lines if line["question_word"] == word]
        bucket = found["question_word"][word]
        assert bucket["num_rows"] == len(mine)
        assert bucket["exact_match"] == pytest.approx(100 * sum(line["exact_match"] for line in mine) / len(mine))
        assert bucket["f1"] == pytest.approx(100 * sum(line["f1"] for line in mine) / len(mine))
        loss = sum((line["loss"] or 0) * line["num_windows"] for line in mine)
        assert bucket["loss"] == pytest.approx(loss / sum(line["num_windows"] for line in mine), abs=1e-5)
        assert bucket["exact_match_low"] < bucket["exact_match"] < bucket["exact_match_high"]

    def count(name: str, label: str) -> int:
        return found[name].get(label, {"num_rows": 0})["num_rows"]

    no_answer = sum(not line["has_answer"] for line in lines)
    assert count("answer_length", "no answer") == count("answer_position", "no answer") == no_answer
    for label, low, high in (("1", 0, 1), ("2", 2, 2), ("4–5", 4, 5), ("6–10", 6, 10), ("11 and more", 11, 999)):
        assert count("answer_length", label) == sum(
            low <= line["answer_length"] <= high for line in lines if line["has_answer"]
        )
    for label, low, high in (("unknown", 0, 0), ("under 100", 1, 99), ("100–149", 100, 149), ("400–799", 400, 799),
                             ("800–1,599", 800, 1599), ("1,600 and more", 1600, 10**9)):
        assert count("context_length", label) == sum(low <= line["context_length"] <= high for line in lines)
    assert count("answer_position", "last fifth") == sum((line["answer_position"] or 0) >= 0.8 for line in lines)
    assert count("num_windows", "several") == sum(line["num_windows"] > 1 for line in lines)
    for dimension in DIMENSIONS:  # every row is in one bucket of each
        assert sum(bucket["num_rows"] for bucket in found[dimension.name].values()) == len(lines)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 150), max_size=4), st.randoms(use_true_random=False))
def test_summaries_merge_to_the_same_in_any_order(seed: int, cuts: list[int], rng: random.Random) -> None:
    lines = random_lines(seed, 150)
    edges = [0, *sorted(cuts), 150]
    parts = [summary(lines[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    rng.shuffle(parts)
    merged = sum(parts, Summary())
    whole = summary(lines)
    assert merged.to_json() == whole.to_json() and merged.worst == whole.worst
    assert pickle.loads(pickle.dumps(merged)).worst == merged.worst


def test_the_worst_rows_are_the_worst_and_no_more_than_fifty() -> None:
    lines = random_lines(3, 400)
    worst = summary(lines).worst
    order = sorted(lines, key=lambda line: (line["f1"], -(line["loss"] or 0), line["row_index"]))
    assert [row.row_index for row in worst] == [line["row_index"] for line in order[:NUM_WORST]]
    assert len(summary(lines[:7]).worst) == 7


def test_a_worst_row_is_small_however_long_its_texts_are() -> None:
    line = detail(0, question="q" * 10**6, prediction="p" * 10**6, golds=["g" * 10**6] * 1000, answer_start=500_000,
                  answer_end=700_000, start=0, end=10, exact_match=False, f1=0.0)
    (row,) = Summary.of(pa.Table.from_pylist([line], schema=DETAILS), ["x" * 10**6]).worst
    assert len(pickle.dumps(row)) < 6_000
    assert [mark for _, mark in row.pieces] == ["prediction", "", "gap", "", "gold", "gap", "gold", "", "gap"]


SPANS = st.tuples(st.integers(0, 60), st.integers(0, 60))


@given(st.text(max_size=60), SPANS, SPANS)
def test_pieces_are_the_context_and_mark_the_spans(text: str, first: tuple[int, int], second: tuple[int, int]) -> None:
    gold, prediction = ((min(min(s), len(text)), min(max(s), len(text))) for s in (first, second))
    pieces = marked(text, gold, prediction)
    assert "".join(piece for piece, _ in pieces) == text
    assert "".join(piece for piece, mark in pieces if mark in ("gold", "both")) == text[slice(*gold)]
    assert "".join(piece for piece, mark in pieces if mark in ("prediction", "both")) == text[slice(*prediction)]


def test_reliability_and_coverage() -> None:
    # 90 rows with score 0.95 of which 60 are right, 10 with score 0.15 of which none is.
    lines = [detail(i, score=0.95, exact_match=i < 60, f1=float(i < 60)) for i in range(90)]
    lines += [detail(90 + i, score=0.15, exact_match=False, f1=0.5) for i in range(10)]
    found = summary(lines).to_json()
    low, high = found["reliability"]
    assert (low["num_rows"], low["exact_match"], high["num_rows"]) == (10, 0, 90)
    assert high["score"] == pytest.approx(0.95) and high["exact_match"] == pytest.approx(100 * 60 / 90)
    assert found["expected_calibration_error"] == pytest.approx(0.9 * abs(0.95 - 2 / 3) + 0.1 * 0.15)
    best, everything = found["coverage"]
    assert (best["num_rows"], best["threshold"], everything["coverage"]) == (90, pytest.approx(0.95), 100)
    assert everything["exact_match"] == 60 and everything["f1"] == pytest.approx(65)


def test_coverage_ends_with_all_rows_and_has_few_points() -> None:
    points = summary(random_lines(5, 1000)).coverage()
    assert 50 <= len(points) <= 101 and points[-1]["num_rows"] == 1000
    assert all(a["coverage"] < b["coverage"] and a["threshold"] > b["threshold"]
               for a, b in zip(points, points[1:], strict=False))


def test_nothing_at_all() -> None:
    found = Summary().to_json()
    assert found["coverage"] == found["reliability"] == [] and found["expected_calibration_error"] is None
    assert summary([]).to_json() == found


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == (pytest.approx(0.4901, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 1
    assert not math.isnan(wilson_interval(1, 1)[0])
