"""Scores against implementations that share no code with ours, and sums that merge."""

from __future__ import annotations

import csv
import json
import math
import pickle
import random
import string
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa.errors import OptionError
from ray_qa.metrics import LANGUAGES, NullThresholds, RowScore, Scores, exact_match, f1, normalize, score_row

SHARED = Path(__file__).parents[2] / "shared"

WORDS = st.sampled_from(
    ["a", "an", "the", "The", "THE", "cat", "Cat", "sat", "theatre", "1,000", "1000", "x-ray", "'s", "—",
     "é", "É", "", " ", "\t", "\n", ".", "!", "naïve", "數", "ال"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=12)


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The cat!", ["cat"], (1, 1)),
        ("cat", ["a dog", "the cat"], (1, 1)),
        ("black cat", ["cat"], (0, 2 / 3)),
        ("cat cat", ["cat"], (0, 2 / 3)),
        ("dog", ["cat"], (0, 0)),
        ("", [""], (1, 1)),
        ("", [], (1, 1)),
        ("", ["cat"], (0, 0)),
        ("cat", [], (0, 0)),
        ("theatre", ["atre"], (0, 0)),
        ("x-ray", ["xray"], (1, 1)),
        ("a", ["the"], (1, 1)),
    ],
)
def test_squad_scores(prediction, golds, expected):
    assert (exact_match(prediction, golds), f1(prediction, golds)) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_squad_scores_equal_torchmetrics(prediction, golds):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    theirs = squad(
        [{"prediction_text": prediction, "id": "0"}],
        [{"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": "0"}],
    )
    assert 100 * exact_match(prediction, golds) == pytest.approx(theirs["exact_match"].item())
    assert 100 * f1(prediction, golds) == pytest.approx(theirs["f1"].item(), rel=1e-6)


@pytest.mark.shared
def test_golden_figures():
    with open(SHARED / "data" / "squad-eval.csv", encoding="utf-8", newline="") as file:
        golds = [row["answer_text"] for row in csv.DictReader(file)]
    with open(SHARED / "golden" / "squad-eval.top1.jsonl", encoding="utf-8") as file:
        predictions = [json.loads(line)["answer"] for line in file]
    rows = [score_row(*pair) for pair in zip(predictions, [[gold] for gold in golds], strict=True)]
    scores = Scores.of(rows)
    assert np.float32(scores.exact_match) == 43.61344528198242
    # torchmetrics works in float32: added up in that, row after row, the golden figure is met to the
    # last bit; the sum in float64 lies 3e-5 below.
    total = np.float32(0)
    for row in rows:
        total += np.float32(row.f1)
    assert float(np.float32(100) * total / np.float32(len(rows))) == 57.258140563964844
    assert scores.f1 == pytest.approx(57.258140563964844, abs=5e-5)


# MLQA's rules, written a second time as one pass over the characters (Lewis et al. 2020).
ARTICLES = {
    "en": "a an the", "es": "un una unos unas el la los las", "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
}


def mlqa_tokens(text: str, language: str) -> list[str]:
    kept = "".join(
        c for c in text.lower() if not unicodedata.category(c).startswith("P") and c not in string.punctuation
    )
    if language == "ar":
        kept = kept.replace("ال", " ")
    out: list[list[str]] = [[]]
    for c in kept:
        if c.isspace():
            out.append([])
        elif language == "zh" and 0x4E00 <= ord(c) <= 0x9FA5:
            out += [[c], []]
        else:
            out[-1].append(c)
    return [token for token in map("".join, out) if token and token not in ARTICLES.get(language, "").split()]


MLQA_WORDS = st.sampled_from(
    ["a", "the", "Der", "das", "la", "El", "của", "những", "是", "中国", "NBA冠军", "2，000", "«x»", "“q”",
     "العالم", "باليوم", "है", "।", "$5", "a¿b", "cat", "é", " "]
)


@settings(max_examples=150, deadline=None)
@given(
    # Not İ: its lower case holds a mark, which the articles' pattern takes for the end of a word.
    st.lists(MLQA_WORDS, max_size=6).map(" ".join)
    | st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="İ"), max_size=20),
    st.sampled_from(["en", "es", "de", "ar", "hi", "vi", "zh"]),
)
def test_mlqa_normalization_equals_a_second_implementation(text, language):
    assert normalize(text, normalization="mlqa", language=language).split() == mlqa_tokens(text, language)


@pytest.mark.parametrize(
    ("language", "prediction", "gold", "expected"),
    [
        ("zh", "中国人民", "中国", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("zh", "NBA 冠军", "冠军NBA", 1.0),
        ("zh", "《中国》", "中国", 1.0),
        ("de", "der Hund", "Hund", 1.0),
        ("es", "El «Niño»", "niño", 1.0),
        ("vi", "những con mèo", "con mèo", 1.0),
        ("ar", "العالم", "عالم", 1.0),
        ("th", "กรุงเทพ", "กรุง", 2 * (3 / 6) * 1 / (3 / 6 + 1)),  # ก รุ ง เ ท พ: the mark stays on its letter
        ("ja", "東京タワー", "東京", 2 * (2 / 5) / (2 / 5 + 1)),
        ("other", "the cat", "cat", 2 / 3),
    ],
)
def test_mlqa_f1_by_language(language, prediction, gold, expected):
    assert f1(prediction, [gold], normalization="mlqa", language=language) == pytest.approx(expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_scores_itself_as_right(language):
    text = "Ein Wort, 中国 กรุงเทพฯ ភាសា मानक العربية 1,5 $"
    assert score_row(text, [f" {text}\n"], normalization="mlqa", language=language)[:2] == (1.0, 1.0)


def test_unknown_names_list_what_is_allowed():
    with pytest.raises(OptionError, match="'xx'.*'zh'.*'other'"):
        f1("a", ["b"], normalization="mlqa", language="xx")
    with pytest.raises(OptionError, match="'bleu'; allowed: 'squad', 'mlqa'"):
        f1("a", ["b"], normalization="bleu")  # type: ignore[arg-type]


ROWS = st.builds(
    RowScore, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.25, 1 / 3, 2 / 3, 1.0]), st.booleans()
)


@given(st.lists(ROWS, max_size=20), st.integers(0, 20))
def test_scores_merge(rows, cut):
    merged = Scores.of(rows[:cut], loss_sum=1.5, num_windows=2)
    merged += Scores.of(rows[cut:], loss_sum=2.5, num_windows=3)
    whole = Scores.of(rows, loss_sum=4.0, num_windows=5)
    assert merged.f1_sum == pytest.approx(whole.f1_sum)
    assert (merged.num_rows, merged.exact_match_sum) == (len(rows), sum(row.exact_match for row in rows))
    assert merged.num_has_answer == Counter(row.has_answer for row in rows)[True]
    assert merged.loss == 4.0 / 5
    assert pickle.loads(pickle.dumps(merged)) == merged


def test_scores_by_kind_of_row():
    pairs = [("cat", ["the cat"]), ("a black cat", ["cat"]), ("", []), ("x", [""])]
    rows = [score_row(*pair) for pair in pairs]
    scores = Scores.of(rows)
    assert (scores.num_has_answer, scores.num_no_answer, scores.num_rows) == (2, 2, 4)
    assert (scores.has_answer_exact_match, scores.no_answer_exact_match, scores.exact_match) == (50, 50, 50)
    assert scores.has_answer_f1 == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert scores.no_answer_f1 == 50
    assert scores.f1 == pytest.approx(100 * (1 + 2 / 3 + 1) / 4)


def test_means_over_nothing_are_nan():
    empty = Scores()
    assert all(math.isnan(value) for value in (empty.loss, empty.exact_match, empty.f1, empty.no_answer_f1))
    assert math.isnan(NullThresholds().best_f1.percentage)


def percentage_at(threshold: float, rows: list[tuple[float, str, RowScore]], which: int) -> float:
    """Every row scored with "" where its null probability is above ``threshold``."""
    total = 0.0
    for probability, answer, row in rows:
        if row.has_answer:
            total += 0.0 if probability > threshold else row[which]
        else:
            total += probability > threshold or not answer
    return 100 * total / len(rows)


def random_rows(seed: int, size: int) -> list[tuple[float, str, RowScore]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        has_answer = rng.random() < 0.6
        answer = rng.choice(["", "x", "x"])
        share = rng.choice([0.0, 0.4, 1.0]) if answer else 0.0
        if not has_answer:
            share = float(not answer)
        score = RowScore(float(share == 1), share, has_answer)
        rows.append((rng.betavariate(0.6, 1.2 if has_answer else 0.4), answer, score))
    return rows


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("which", [0, 1])
def test_best_threshold_is_the_best_of_all(seed, which):
    rows = random_rows(seed, 60)
    found = NullThresholds.of(*zip(*rows, strict=True))
    best = (found.best_exact_match, found.best_f1)[which]
    # Below every probability "" is answered everywhere: SQuAD's starting point.
    everywhere = [percentage_at(threshold, rows, which) for threshold in (-1.0, *(row[0] for row in rows))]
    assert best.percentage == pytest.approx(max(everywhere))
    if best.threshold:
        assert percentage_at(best.threshold, rows, which) == pytest.approx(best.percentage)


def test_best_threshold_on_rows_with_equal_probabilities_can_be_applied():
    right, wrong = RowScore(1.0, 1.0, True), RowScore(0.0, 0.0, False)
    rows = [(0.5, "x", right), (0.5, "x", wrong), (0.5, "x", wrong)]
    best = NullThresholds.of(*zip(*rows, strict=True)).best_f1
    assert best == (pytest.approx(200 / 3), 0.0)  # a running sum over single rows would claim 100 %


@given(st.integers(0, 1000), st.lists(st.integers(0, 80), max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_thresholds_merge_to_the_same_in_any_order(seed, cuts, rng):
    rows = random_rows(seed, 80)
    edges = [0, *sorted(cuts), 80]
    slices = [rows[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]
    parts = [NullThresholds.of(*zip(*some, strict=True)) for some in slices]
    rng.shuffle(parts)
    merged = NullThresholds()
    for part in parts:
        merged = merged + part
    whole = NullThresholds.of(*zip(*rows, strict=True))
    assert (merged.best_exact_match, merged.best_f1) == (whole.best_exact_match, whole.best_f1)
    assert merged.num_rows == 80


def test_threshold_memory_is_bounded_and_close_on_many_rows():
    rng = np.random.default_rng(7)
    probabilities = rng.beta(0.5, 0.5, 200_000)
    right, wrong, none = RowScore(1.0, 1.0, True), RowScore(0.0, 0.0, True), RowScore(0.0, 0.0, False)
    kinds = [none if rng.random() < p else (right if rng.random() < 0.8 else wrong) for p in probabilities]
    found = NullThresholds.of(probabilities, ["x"] * len(kinds), kinds)
    size = sum(array.nbytes for array in (found.bins, found.exact_match_gains, found.f1_gains, found.largest))
    assert size <= 32 * 65_536
    order = np.argsort(probabilities)
    gains = np.array([kind.exact_match if kind.has_answer else -1.0 for kind in kinds])[order]
    exact = 100 * (found.num_no_answer + max(0, np.cumsum(gains).max())) / len(kinds)
    assert exact - 0.01 <= found.best_exact_match.percentage <= exact


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_null_probabilities_outside_0_to_1_are_refused(value):
    with pytest.raises(OptionError, match=r"null_probabilities\[1\] is .*allowed: 0 to 1"):
        NullThresholds.of([0.5, value], ["x", "x"], [RowScore(1.0, 1.0, True)] * 2)


def test_probabilities_0_and_1_have_a_place():
    rows = [(0.0, "x", RowScore(1.0, 1.0, True)), (1.0, "x", RowScore(0.0, 0.0, False))]
    best = NullThresholds.of(*zip(*rows, strict=True)).best_exact_match
    assert best == (100.0, 0.0)
