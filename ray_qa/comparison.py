"""Two models on the same rows: what the second gains, whether it may be chance, and the rows won and lost.

Rows of one context are no independent tries, so whole contexts are drawn. The input may be of any size and a context
may stand in many parts: the *Poisson bootstrap* (Hanley and MacGibbon 2006; Chamandy et al. 2012, "Estimating
uncertainty for massive data streams") gives a context in each resample a weight that is Poisson distributed with mean
1, here a hash of the context and the number of the resample. So every part finds the same weights by itself, and a
resample is three sums.

Works on *pairs*, a table with one line per row (`PAIRS`). Sums are whole numbers and examples have one order: the
outcome depends neither on how rows are spread over parts nor on the order of merging, and its size does not grow with
the input. Knows nothing of models, files or workers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_qa.schema import ROW_INDEX

IntArray = npt.NDArray[np.integer[Any]]
Pieces = tuple[tuple[str, str], ...]

#: One row as both models answered it; ``f1`` runs from 0 to 1, ``context_id`` is that of `slices.DETAILS`.
PAIRS = pa.schema(
    [
        pa.field(ROW_INDEX, pa.int64(), nullable=False),
        pa.field("context_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("golds", pa.list_(pa.string()), nullable=False),
        *(
            pa.field(f"{name}_{model}", kind, nullable=False)
            for name, kind in (
                ("prediction", pa.string()), ("score", pa.float64()), ("exact_match", pa.bool_()), ("f1", pa.float64())
            )
            for model in ("a", "b")
        ),
    ]
)

NUM_RESAMPLES = 1_000
NUM_EXAMPLES = 25
#: Contexts that an interval needs at least.
MIN_CONTEXTS = 10
# Contexts up to this number are counted exactly; beyond, their smallest identities tell how many there are.
_KEPT_CONTEXTS = 1_024
# F1 in units of 2**-24: an int64 holds the sums of 5e11 rows.
_UNIT = 1 << 24
_ROWS, _EXACT, _F1 = range(3)
_CHUNK = 1_024
_TEXT_SHOWN, _GOLDS_SHOWN = 300, 5


class Difference(NamedTuple):
    """What the second model gains in one figure, in percentage points, with its 95 % interval (None for too few
    contexts), and the rows on which it is better, worse, and equal."""

    difference: float
    low: float | None
    high: float | None
    won: int
    lost: int
    tied: int


class Example(NamedTuple):
    """A row won or lost; long texts are cut. Sorts by the size of the difference, then by how sure the loser was.

    ``pieces`` are the context with the right answer marked, see `slices.marked`.
    """

    negative_size: float
    negative_score: float
    row_index: int
    question: str
    golds: tuple[str, ...]
    prediction_a: str
    prediction_b: str
    score_a: float
    score_b: float
    f1_a: float
    f1_b: float
    pieces: Pieces


def _no_sums() -> IntArray:
    return np.zeros((NUM_RESAMPLES + 1, 3), np.int64)


def _no_counts() -> IntArray:
    return np.zeros((2, 3), np.int64)


@dataclass(frozen=True)
class Comparison:
    """Sums over pairs and the clearest examples; ``a + b`` is the same over the pairs of both."""

    sums: IntArray = field(default_factory=_no_sums)
    """int64 [1 + NUM_RESAMPLES, (rows, exact match, F1)]: of the rows themselves, then of each resample."""
    counts: IntArray = field(default_factory=_no_counts)
    """int64 [(exact match, F1), (won, lost, tied)]."""
    contexts: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The smallest identities of contexts, ascending, at most _KEPT_CONTEXTS."""
    won: tuple[Example, ...] = ()
    lost: tuple[Example, ...] = ()

    @classmethod
    def of(cls, pairs: pa.Table, pieces_of: Callable[[int], Pieces]) -> Comparison:
        """The sums over a table with schema `PAIRS`; ``pieces_of`` gives the pieces of a row by its place in it."""
        names = [int(name, 16) for name in pairs["context_id"].to_pylist()]
        contexts, place = np.unique(np.array(names, np.uint64), return_inverse=True)
        exact = pairs["exact_match_b"].to_numpy().astype(np.int64) - pairs["exact_match_a"].to_numpy().astype(np.int64)
        f1_a, f1_b = (np.rint(pairs[f"f1_{model}"].to_numpy() * _UNIT).astype(np.int64) for model in "ab")
        f1 = f1_b - f1_a
        values = np.zeros((len(contexts), 3), np.int64)
        np.add.at(values, place, np.stack([np.ones_like(exact), exact, f1], axis=1))
        sums = _no_sums()
        sums[0] = values.sum(0)
        for begin in range(0, len(contexts), _CHUNK):
            chosen = slice(begin, begin + _CHUNK)
            sums[1:] += _weights(contexts[chosen]).T @ values[chosen]
        counts = np.array([[(d > 0).sum(), (d < 0).sum(), (d == 0).sum()] for d in (exact, f1)], np.int64)
        row_index = pairs[ROW_INDEX].to_numpy()
        scores = [pairs[f"score_{model}"].to_numpy() for model in "ab"]

        def examples(size: IntArray, loser: npt.NDArray[np.floating[Any]]) -> tuple[Example, ...]:
            places = np.flatnonzero(size > 0)
            keys = zip(
                (-size[places]).tolist(), (-loser[places]).tolist(), row_index[places].tolist(), places.tolist(),
                strict=True,
            )
            return tuple(_example(pairs, key, pieces_of) for key in heapq.nsmallest(NUM_EXAMPLES, keys))

        return cls(sums, counts, contexts[:_KEPT_CONTEXTS], examples(f1, scores[0]), examples(-f1, scores[1]))

    def __add__(self, other: Comparison) -> Comparison:
        contexts = np.unique(np.concatenate([self.contexts, other.contexts]))[:_KEPT_CONTEXTS]
        won, lost = (
            tuple(heapq.nsmallest(NUM_EXAMPLES, [*mine, *theirs], key=lambda example: example[:3]))
            for mine, theirs in ((self.won, other.won), (self.lost, other.lost))
        )
        return Comparison(self.sums + other.sums, self.counts + other.counts, contexts, won, lost)

    @property
    def num_rows(self) -> int:
        return int(self.sums[0, _ROWS])

    @property
    def num_contexts(self) -> int:
        """Exact up to about a thousand; beyond, an estimate that is off by some 3 % (Bar-Yossef et al. 2002)."""
        if len(self.contexts) < _KEPT_CONTEXTS:
            return len(self.contexts)
        return round((_KEPT_CONTEXTS - 1) * 2.0**64 / float(self.contexts[-1]))

    @property
    def exact_match(self) -> Difference:
        return self._difference(_EXACT, 1)

    @property
    def f1(self) -> Difference:
        return self._difference(_F1, _UNIT)

    def _difference(self, column: int, unit: int) -> Difference:
        rows, totals = self.sums[:, _ROWS].astype(np.float64), self.sums[:, column] * (100 / unit)
        won, lost, tied = self.counts[column - 1].tolist()
        low = high = None
        if len(self.contexts) >= MIN_CONTEXTS:
            drawn = np.flatnonzero(rows[1:] > 0) + 1
            low, high = np.quantile(totals[drawn] / rows[drawn], [0.025, 0.975]).tolist()
        difference = float(totals[0] / rows[0]) if rows[0] else math.nan
        return Difference(difference, low, high, won, lost, tied)


def pairs_of(a: pa.Table, b: pa.Table) -> pa.Table:
    """The pairs of two tables with schema `slices.DETAILS` over the same rows.

    Raises:
        ValueError: the rows are not the same.
    """
    if not a[ROW_INDEX].equals(b[ROW_INDEX]) or not a["context_id"].equals(b["context_id"]):
        raise ValueError("the two models were not evaluated on the same rows")
    columns = {}
    for column in PAIRS:
        name, separator, model = column.name.rpartition("_")
        paired = separator and model in ("a", "b")
        columns[column.name] = ({"a": a, "b": b}[model])[name] if paired else b[column.name]
    return pa.table(columns, schema=PAIRS)


def _example(pairs: pa.Table, key: Sequence[Any], pieces_of: Callable[[int], Pieces]) -> Example:
    size, score, row_index, place = key
    line = pairs.slice(place, 1).to_pylist()[0]
    return Example(
        size / _UNIT, score, row_index, line["question"][:_TEXT_SHOWN],
        tuple(gold[:_TEXT_SHOWN] for gold in line["golds"][:_GOLDS_SHOWN]), line["prediction_a"][:_TEXT_SHOWN],
        line["prediction_b"][:_TEXT_SHOWN], line["score_a"], line["score_b"], line["f1_a"], line["f1_b"],
        pieces_of(place),
    )


def _poisson_limits() -> npt.NDArray[np.uint64]:
    """2**64 times P(X <= k) of a Poisson variable with mean 1, for k = 0, 1, ... while it is below 2**64."""
    limits = []
    share = 0.0
    for k in range(20):
        share += math.exp(-1) / math.factorial(k)
        limit = int(share * 2.0**64)
        if limit >= 2**64 - 1:
            break
        limits.append(limit)
    return np.array(limits, np.uint64)


_LIMITS = _poisson_limits()


def _weights(contexts: npt.NDArray[np.uint64]) -> IntArray:
    """int64 [contexts, NUM_RESAMPLES]: the weight of each context in each resample.

    The generator is splitmix64 (Steele, Lea and Flood 2014), started at the identity of the context: the same on
    every machine and with every version of numpy.
    """
    state = contexts[:, None] + np.arange(1, NUM_RESAMPLES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.searchsorted(_LIMITS, state ^ (state >> np.uint64(31)), side="right")
