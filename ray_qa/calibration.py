"""From a score to the probability that the answer is right.

A score says how sure the model is, not how often it is right. Two numbers mend that: the log-odds of the score are
divided by a temperature and moved by an offset (Platt 1999; with offset 0 it is temperature scaling, Guo et al. 2017),
which keeps the order of the answers. Whether it helps is measured on contexts that the fit has not seen.

Knows scores, outcomes and which rows share a context; not models, files or workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_qa.errors import InputError

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer[Any]]

#: Rows that a sample keeps at most. Whole contexts are left out, by their identity, not by their place.
MAX_SAMPLE = 200_000
#: Rows, contexts and answers of either kind that a fit needs at least.
MIN_ROWS, MIN_CONTEXTS, MIN_EACH = 50, 10, 5
NUM_RESAMPLES = 1_000
_EDGE = 1e-6
# A little pull towards 1 / temperature = 1 and, weaker, offset = 0: outcomes that a threshold separates have a finite
# fit, and scores that are all alike are mended by the offset.
_PULL = np.array([1.0, 0.01])
_LEAST_SLOPE = 1e-3


@dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(log-odds(score) / temperature + offset)."""

    temperature: float = 1.0
    offset: float = 0.0

    def probability(self, score: FloatArray) -> FloatArray:
        """Of each score (0..1) the probability that the answer is right."""
        return _sigmoid(_log_odds(score) / self.temperature + self.offset)


@dataclass(frozen=True)
class Sample:
    """Scores and outcomes of rows, at most MAX_SAMPLE of them; ``a + b`` is a sample of the rows of both.

    Arrays have one entry per row; ``context`` identifies the row's context by 64 evenly spread bits. The rows kept are
    those with ``context <= limit``: the outcome depends neither on the order of merging nor on how rows are spread.
    """

    score: FloatArray = field(default_factory=lambda: np.zeros(0))
    right: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_))
    context: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    limit: int = 2**64 - 1

    @classmethod
    def of(cls, details: pa.Table) -> Self:
        """The rows of a table with the columns score, exact_match, context_id (16 hex digits) of `slices.DETAILS`."""
        context = np.array([int(name, 16) for name in details["context_id"].to_pylist()], np.uint64)
        return cls(details["score"].to_numpy(), details["exact_match"].to_numpy(), context)._thinned()

    def __add__(self, other: Sample) -> Sample:
        joined = Sample(
            np.concatenate([self.score, other.score]), np.concatenate([self.right, other.right]),
            np.concatenate([self.context, other.context]), min(self.limit, other.limit),
        )
        return joined._thinned()

    def _thinned(self) -> Self:
        limit = self.limit
        while np.count_nonzero(self.context <= np.uint64(limit)) > MAX_SAMPLE and limit:
            limit //= 2
        return self._select(self.context <= np.uint64(limit), limit)

    def _select(self, keep: BoolArray, limit: int | None = None) -> Self:
        return dataclasses.replace(
            self, score=self.score[keep], right=self.right[keep], context=self.context[keep],
            limit=self.limit if limit is None else limit,
        )

    def ordered(self) -> Self:
        """The same rows in an order that depends on nothing but the rows."""
        order = np.lexsort((self.right, self.score, self.context))
        return dataclasses.replace(
            self, score=self.score[order], right=self.right[order], context=self.context[order]
        )

    def halves(self) -> tuple[Self, Self]:
        """The rows of every second context, and the others'."""
        number = np.unique(self.context, return_inverse=True)[1]
        return self._select(number % 2 == 0), self._select(number % 2 == 1)


def fit(score: FloatArray, right: BoolArray) -> Calibration:
    """The calibration under which the outcomes are most likely (logistic regression), with a positive temperature."""
    odds, outcome = _log_odds(score), right.astype(np.float64)
    one = np.ones_like(odds)
    slope, offset = _most_likely(np.stack([odds, one]), np.zeros_like(odds), outcome, np.array([1.0, 0.0]), _PULL)
    if slope < _LEAST_SLOPE:
        # A score that says nothing, or the opposite: the order of the answers is kept all the same.
        slope = _LEAST_SLOPE
        (offset,) = _most_likely(one[None], slope * odds, outcome, np.zeros(1), _PULL[1:])
    return Calibration(1 / float(slope), float(offset))


def _most_likely(
    features: FloatArray, fixed: FloatArray, outcome: FloatArray, usual: FloatArray, pull: FloatArray
) -> FloatArray:
    """Weights under which sigmoid(weights @ features + fixed) makes the outcomes most likely, pulled to the ``usual``.

    Newton's method; a step is halved until it improves, which for this convex function finds the optimum.
    """

    def cost(weights: FloatArray) -> float:
        value = weights @ features + fixed
        pulled = float((pull * (weights - usual) ** 2).sum()) / 2
        return float((np.logaddexp(0, value) - outcome * value).sum()) + pulled

    weights, least = usual, cost(usual)
    for _ in range(100):
        probability = _sigmoid(weights @ features + fixed)
        gradient = features @ (probability - outcome) + pull * (weights - usual)
        curvature = (features * (probability * (1 - probability))) @ features.T + np.diag(pull)
        step = np.linalg.solve(curvature, gradient)
        for _ in range(60):
            if cost(weights - step) < least:
                break
            step = step / 2
        else:
            break
        weights = weights - step
        least = cost(weights)
    return weights


def calibrate(sample: Sample) -> tuple[Calibration, dict[str, Any]]:
    """A calibration fitted on all rows, and what one fitted on half of the contexts does for the other half.

    The figures: ``negative_log_likelihood`` and ``brier_score`` of "the answer is right", each ``before``, ``after``,
    and the 95 % interval of what is gained (``gain_low``, ``gain_high``; bootstrap over contexts).

    Raises:
        InputError: too few rows, contexts, or right or wrong answers to fit anything.
    """
    sample = sample.ordered()
    num_contexts, num_right = len(np.unique(sample.context)), int(sample.right.sum())
    num_wrong = len(sample.right) - num_right
    if len(sample.right) < MIN_ROWS or num_contexts < MIN_CONTEXTS or min(num_right, num_wrong) < MIN_EACH:
        raise InputError(
            f"calibrate found {len(sample.right)} rows with {num_contexts} contexts, {num_right} of them answered "
            f"right and {num_wrong} wrong; needed are at least {MIN_ROWS} rows with {MIN_CONTEXTS} contexts and "
            f"{MIN_EACH} of either kind"
        )
    seen, unseen = sample.halves()
    half = fit(seen.score, seen.right)
    probability = half.probability(unseen.score)
    context = np.unique(unseen.context, return_inverse=True)[1]
    figures: dict[str, Any] = {
        "num_rows": len(sample.right), "num_contexts": num_contexts, "num_rows_measured": len(unseen.right),
    }
    for name, measure in (("negative_log_likelihood", _negative_log_likelihood), ("brier_score", _brier_score)):
        before, after = measure(unseen.score, unseen.right), measure(probability, unseen.right)
        low, high = bootstrap_interval(before - after, context)
        figures[name] = {
            "before": float(before.mean()), "after": float(after.mean()), "gain_low": low, "gain_high": high,
        }
    return fit(sample.score, sample.right), figures


def bootstrap_interval(values: FloatArray, cluster: IntArray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of ``values``, whole clusters drawn with replacement (percentile bootstrap).

    Args:
        cluster: of each value the number of its cluster, 0..n-1; rows of one context are no independent tries.
    """
    sums, counts = np.bincount(cluster, weights=values), np.bincount(cluster)
    rng = np.random.default_rng(seed)
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def to_json(calibration: Calibration, figures: Mapping[str, Any], null_threshold: float | None) -> dict[str, Any]:
    """What calibration.json holds: the two numbers, the null threshold (None without null answers), and the figures."""
    return dataclasses.asdict(calibration) | {"null_threshold": null_threshold} | dict(figures)


def _log_odds(score: FloatArray) -> FloatArray:
    clipped = np.clip(np.asarray(score, np.float64), _EDGE, 1 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(value: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(0.5 * value))  # which cannot overflow


def _negative_log_likelihood(probability: FloatArray, right: BoolArray) -> FloatArray:
    clipped = np.clip(probability, _EDGE, 1 - _EDGE)
    return -np.where(right, np.log(clipped), np.log1p(-clipped))


def _brier_score(probability: FloatArray, right: BoolArray) -> FloatArray:
    return (probability - right) ** 2
