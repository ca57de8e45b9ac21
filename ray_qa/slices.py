"""Where a model is good and where it is not: figures by kind of row, by score, and the worst rows.

Works on the *details* of an evaluation, a table with one line per row (`DETAILS`). All sums are whole numbers and
the worst rows have one order, so a `Summary` comes out the same whatever the order of merging, and its size does not
grow with the input. Knows nothing of models, files or workers; how answers are scored is decided before.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_qa.schema import ROW_INDEX

IntArray = npt.NDArray[np.integer[Any]]

#: One evaluated row. ``loss`` is the mean over the row's windows; ``answer_length`` counts the tokens of answer_text
#: that F1 counts; ``answer_position`` is the first character of the answer as a share of the context;
#: ``text_prediction`` is the best answer with text, even where "no answer" scored higher; ``context_id`` is equal for
#: equal contexts.
DETAILS = pa.schema(
    [
        pa.field(ROW_INDEX, pa.int64(), nullable=False),
        pa.field("context_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("golds", pa.list_(pa.string()), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("text_prediction", pa.string(), nullable=False),
        pa.field("text_score", pa.float64(), nullable=False),
        pa.field("null_score", pa.float64()),
        pa.field("exact_match", pa.bool_(), nullable=False),
        pa.field("f1", pa.float64(), nullable=False),
        pa.field("text_exact_match", pa.bool_(), nullable=False),
        pa.field("has_answer", pa.bool_(), nullable=False),
        pa.field("loss", pa.float64()),
        pa.field("num_windows", pa.int64(), nullable=False),
        pa.field("context_length", pa.int64(), nullable=False),
        pa.field("answer_length", pa.int64(), nullable=False),
        pa.field("question_word", pa.string(), nullable=False),
        pa.field("answer_position", pa.float64()),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("answer_start", pa.int64(), nullable=False),
        pa.field("answer_end", pa.int64(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

#: Question words of English, as slices have them; "other" is what holds none, and every other language.
QUESTION_WORDS = ("who", "what", "which", "when", "where", "why", "how many", "how", "other")
_QUESTION_WORD = re.compile(r"\b(?:(who)(?:m|se)?|(what|which|when|where|why)|(how (?:many|much))|(how))\b")


def question_word(question: str) -> str:
    """The first English question word in ``question``; "whom" and "whose" are who, "how much" is how many."""
    found = _QUESTION_WORD.search(question.lower())
    if found is None:
        return "other"
    word = next(group for group in found.groups() if group)
    return "how many" if word == "how much" else word


class Dimension(NamedTuple):
    """One way to divide the rows: ``bucket_of`` gives each row of the details the number of its label."""

    name: str
    title: str
    labels: tuple[str, ...]
    bucket_of: Callable[[pa.Table], IntArray]


_CONTEXT_EDGES = np.array([0, 1, 100, 150, 200, 300, 400, 800, 1600])
_ANSWER_EDGES = np.array([1, 2, 3, 4, 6, 11])


def _context_bucket(details: pa.Table) -> IntArray:
    return np.searchsorted(_CONTEXT_EDGES, details["context_length"].to_numpy(), side="right") - 1


def _answer_bucket(details: pa.Table) -> IntArray:
    bucket = np.searchsorted(_ANSWER_EDGES, np.maximum(details["answer_length"].to_numpy(), 1), side="right")
    return np.where(details["has_answer"].to_numpy(), bucket, 0)


def _position_bucket(details: pa.Table) -> IntArray:
    position = details["answer_position"].to_numpy()
    inside = np.clip(np.nan_to_num(position) * 5, 0, 4).astype(np.int64) + 1
    return np.where(details["has_answer"].to_numpy(), inside, 0)


def _word_bucket(details: pa.Table) -> IntArray:
    number = {word: i for i, word in enumerate(QUESTION_WORDS)}
    return np.array([number[word] for word in details["question_word"].to_pylist()], np.int64)


DIMENSIONS = (
    Dimension(
        "question_word", "Question word", QUESTION_WORDS, _word_bucket,
    ),
    Dimension(
        "answer_length", "Length of the answer, tokens", ("no answer", "1", "2", "3", "4–5", "6–10", "11 and more"),
        _answer_bucket,
    ),
    Dimension(
        "answer_position", "Where the answer begins in the context",
        ("no answer", "first fifth", "second fifth", "middle fifth", "fourth fifth", "last fifth"), _position_bucket,
    ),
    Dimension(
        "context_length", "Length of the context, tokens",
        ("unknown", "under 100", "100–149", "150–199", "200–299", "300–399", "400–799", "800–1,599", "1,600 and more"),
        _context_bucket,
    ),
    Dimension(
        "num_windows", "Windows that the model reads", ("none (error)", "one", "several"),
        lambda details: np.minimum(details["num_windows"].to_numpy(), 2),
    ),
)
_OFFSETS = np.cumsum([0, *(len(dimension.labels) for dimension in DIMENSIONS)])

#: Bins of the score from 0 to 1 that the reliability diagram and the coverage curve are made of.
NUM_BINS = 1_000
NUM_WORST = 50
# F1 and scores are kept in units of 2**-30 and losses in units of 2**-20: an int64 holds the sums of 8e9 rows.
_UNIT, _LOSS_UNIT = 1 << 30, 1 << 20
_ROWS, _EXACT, _F1, _LOSS, _WINDOWS = range(5)
_SCORE = 3

_CONTEXT_SHOWN, _TEXT_SHOWN, _GOLDS_SHOWN = 300, 300, 5


class WorstRow(NamedTuple):
    """A row as the report shows it; long texts are cut. Sorts worst first: low F1, then high loss.

    ``pieces`` are the context in order, each with what it is: "" (plain), "gold", "prediction", "both", or "gap"
    for what was left out.
    """

    f1: float
    negative_loss: float
    row_index: int
    question: str
    golds: tuple[str, ...]
    prediction: str
    score: float
    error: str | None
    pieces: tuple[tuple[str, str], ...]


def _no_slices() -> IntArray:
    return np.zeros((_OFFSETS[-1], 5), np.int64)


def _no_bins() -> IntArray:
    return np.zeros((NUM_BINS, 4), np.int64)


@dataclass(frozen=True)
class Summary:
    """Sums per slice and per score, and the `NUM_WORST` worst rows; ``a + b`` is the same over the rows of both."""

    slices: IntArray = field(default_factory=_no_slices)
    """int64 [labels of all dimensions, (rows, exact matches, F1, loss, windows)]."""
    bins: IntArray = field(default_factory=_no_bins)
    """int64 [NUM_BINS, (rows, exact matches, F1, score)]."""
    worst: tuple[WorstRow, ...] = ()

    @classmethod
    def of(cls, details: pa.Table, contexts: Sequence[str]) -> Summary:
        """The sums over a table with schema `DETAILS`, and ``contexts``, the context of each of its rows."""
        exact = details["exact_match"].to_numpy().astype(np.int64)
        f1 = details["f1"].to_numpy()
        loss = np.nan_to_num(details["loss"].to_numpy().astype(np.float64))
        windows = details["num_windows"].to_numpy()
        score = details["score"].to_numpy()
        rows = np.ones(len(exact), np.int64)
        f1_units = np.rint(f1 * _UNIT).astype(np.int64)
        loss_units = np.rint(loss * windows * _LOSS_UNIT).astype(np.int64)
        slices, bins = _no_slices(), _no_bins()
        values = np.stack([rows, exact, f1_units, loss_units, windows], axis=1)
        for dimension, offset in zip(DIMENSIONS, _OFFSETS, strict=False):
            np.add.at(slices, dimension.bucket_of(details) + offset, values)
        place = np.clip(score * NUM_BINS, 0, NUM_BINS - 1).astype(np.int64)
        np.add.at(bins, place, np.stack([rows, exact, f1_units, np.rint(score * _UNIT).astype(np.int64)], axis=1))
        keys = zip(f1.tolist(), (-loss).tolist(), details[ROW_INDEX].to_pylist(), range(len(rows)), strict=True)
        chosen = [key[3] for key in heapq.nsmallest(NUM_WORST, keys)]
        lines = details.take(pa.array(chosen, pa.int64())).to_pylist()
        worst = [_worst(line, contexts[i]) for line, i in zip(lines, chosen, strict=True)]
        return cls(slices, bins, tuple(worst))

    def __add__(self, other: Summary) -> Summary:
        worst = heapq.nsmallest(NUM_WORST, [*self.worst, *other.worst], key=lambda row: row[:3])
        return Summary(self.slices + other.slices, self.bins + other.bins, tuple(worst))

    def to_json(self) -> dict[str, Any]:
        """The summary without the worst rows, in figures: percentages, means, and a list per chart."""
        return {
            "slices": [self._slice(number) for number in range(len(DIMENSIONS))],
            "reliability": self.reliability(),
            "expected_calibration_error": self.expected_calibration_error(),
            "coverage": self.coverage(),
        }

    def _slice(self, number: int) -> dict[str, Any]:
        dimension = DIMENSIONS[number]
        table = self.slices[_OFFSETS[number] : _OFFSETS[number + 1]]
        buckets = []
        for label, sums in zip(dimension.labels, table.tolist(), strict=True):
            if sums[_ROWS]:
                low, high = wilson_interval(sums[_EXACT], sums[_ROWS])
                buckets.append({
                    "label": label, "num_rows": sums[_ROWS], "exact_match": 100 * sums[_EXACT] / sums[_ROWS],
                    "exact_match_low": 100 * low, "exact_match_high": 100 * high,
                    "f1": 100 * sums[_F1] / _UNIT / sums[_ROWS],
                    "loss": sums[_LOSS] / _LOSS_UNIT / sums[_WINDOWS] if sums[_WINDOWS] else None,
                })
        return {"name": dimension.name, "title": dimension.title, "buckets": buckets}

    def reliability(self, num_bins: int = 10) -> list[dict[str, Any]]:
        """Mean score against the share of exact matches, in ``num_bins`` even bins of the score; no empty ones."""
        sums = self.bins.reshape(num_bins, -1, 4).sum(1)
        return [
            {
                "low": i / num_bins, "high": (i + 1) / num_bins, "num_rows": rows,
                "score": score / _UNIT / rows, "exact_match": 100 * exact / rows,
            }
            for i, (rows, exact, _, score) in enumerate(sums.tolist()) if rows
        ]

    def expected_calibration_error(self) -> float | None:
        """Mean distance, over rows, between score and share of exact matches in the bins of `reliability`, 0..1."""
        bins = self.reliability()
        total = sum(found["num_rows"] for found in bins)
        gaps = (found["num_rows"] * abs(found["score"] - found["exact_match"] / 100) for found in bins)
        return math.fsum(gaps) / total if total else None

    def coverage(self, num_points: int = 100) -> list[dict[str, Any]]:
        """Exact match and F1 over the rows that score at least ``threshold``, from few rows to all of them.

        ``coverage`` is the share of rows, in percent; about ``num_points`` of them are given.
        """
        running = np.cumsum(self.bins[::-1], axis=0)
        total = int(running[-1, _ROWS])
        points: list[dict[str, Any]] = []
        shown = 0
        for i, (rows, exact, f1, _) in enumerate(running.tolist()):
            if rows and (rows - shown >= total / num_points or (rows == total and rows > shown)):
                shown = rows
                points.append({
                    "coverage": 100 * rows / total, "threshold": (NUM_BINS - 1 - i) / NUM_BINS, "num_rows": rows,
                    "exact_match": 100 * exact / rows, "f1": 100 * f1 / _UNIT / rows,
                })
        return points


def wilson_interval(successes: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share of ``total`` independent tries (Wilson 1927); ``z`` = 1.96 is 95 %."""
    share, square = successes / total, z * z / total
    middle = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (middle - spread) / (1 + square)), min(1.0, (middle + spread) / (1 + square))


def _worst(line: dict[str, Any], context: str) -> WorstRow:
    spans = {"gold": (line["answer_start"], line["answer_end"]), "prediction": (line["start"], line["end"])}
    golds = tuple(gold[:_TEXT_SHOWN] for gold in line["golds"][:_GOLDS_SHOWN])
    return WorstRow(
        line["f1"], -(line["loss"] or 0.0), line[ROW_INDEX], line["question"][:_TEXT_SHOWN], golds,
        line["prediction"][:_TEXT_SHOWN], line["score"], line["error"], marked(context, **spans),
    )


def marked(context: str, gold: tuple[int, int], prediction: tuple[int, int]) -> tuple[tuple[str, str], ...]:
    """``context`` cut at the ends of two spans [start, end), each piece with its mark (see `WorstRow`).

    An empty span marks nothing. What is far from both spans is left out: 300 characters stay on either side.
    """
    cuts = sorted({0, len(context), *(min(max(at, 0), len(context)) for at in (*gold, *prediction))})
    pieces: list[tuple[str, str]] = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        in_gold, in_prediction = (span[0] <= begin and end <= span[1] for span in (gold, prediction))
        mark = {(True, True): "both", (True, False): "gold", (False, True): "prediction"}.get(
            (in_gold, in_prediction), ""
        )
        text = context[begin:end]
        if len(text) <= 2 * _CONTEXT_SHOWN:
            pieces.append((text, mark))
            continue
        alone = begin == 0 and end == len(context)
        if mark or begin > 0 or alone:
            pieces.append((text[:_CONTEXT_SHOWN], mark))
        pieces.append((f"{len(text):,} characters", "gap"))
        if mark or end < len(context):
            pieces.append((text[-_CONTEXT_SHOWN:], mark))
    return tuple(pieces)
