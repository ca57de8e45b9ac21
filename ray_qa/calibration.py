"""From a score to the probability that the answer is right.

A score says how sure the model is, not how often it is right. Two numbers mend that: the log-odds of the score are
divided by a temperature and moved by an offset (Platt 1999; with offset 0 it is temperature scaling, Guo et al. 2017),
which keeps the order of the answers. Whether it helps is measured on contexts that the fit has not seen.

Whoever wants "answers that are right 95 times in 100" gets the lowest score from which on the rows of the fit prove it
(see `lowest_score`). Both work on answers to come as far as those are like the rows of the fit.

Knows scores, outcomes and which rows share a context; not models, files or workers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_qa import schema
from ray_qa.errors import InputError, OptionError

FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer[Any]]

#: The file beside a model that `to_json` fills.
FILE_NAME = "calibration.json"

#: Rows that a sample keeps at most. Whole contexts are left out, by their identity, not by their place.
MAX_SAMPLE = 200_000
#: Rows, contexts and answers of either kind that a fit needs at least.
MIN_ROWS, MIN_CONTEXTS, MIN_EACH = 50, 10, 5
NUM_RESAMPLES = 1_000
_EDGE = 1e-6
#: Steps of the score that are kept to find a threshold with.
NUM_STEPS = 500
#: How sure a target precision is: the chance that it is missed on rows like those of the fit.
RISK = 0.05
_NUM_STARTS = 5
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
class Probabilities:
    """Adds to predictions the probability of being right and, with ``min_probability``, whether to abstain."""

    calibration: Calibration
    min_probability: float | None = None

    def add_to(self, predictions: pa.Table) -> pa.Table:
        """A table with schema `schema.PREDICTIONS` or `schema.RANKED_PREDICTIONS` and the columns ``probability`` (null
        where the row has an error) and, with ``min_probability``, ``abstain``; answers stay as they are.

        What was fitted are best answers: lines of another rank have no probability, and abstain.
        """
        known = predictions["error"].is_null().to_numpy()
        if schema.RANK in predictions.column_names:
            known = known & (predictions[schema.RANK].to_numpy() == 0)
        probability = self.calibration.probability(predictions["score"].to_numpy().astype(np.float64))
        table = predictions.append_column(schema.PROBABILITY, pa.array(probability, mask=~known))
        if self.min_probability is None:
            return table
        return table.append_column(schema.ABSTAIN, pa.array(~known | (probability < self.min_probability)))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self.calibration) | {"min_probability": self.min_probability}


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


class Step(NamedTuple):
    """The rows of a fit that score at least ``score``: how many there are, and how many of them are right."""

    score: float
    num_rows: int
    num_right: int


def steps_of(sample: Sample) -> list[Step]:
    """At most `NUM_STEPS` steps from the highest score down to all rows; where they lie, the scores alone decide."""
    order = np.argsort(-sample.score, kind="stable")
    score, right = sample.score[order], np.cumsum(sample.right[order])
    last = np.flatnonzero(np.append(score[1:] != score[:-1], len(score) > 0))  # rows of one score stay together
    wanted = np.linspace(0, len(last) - 1, min(NUM_STEPS, len(last))).astype(np.int64)
    return [Step(float(score[i]), i + 1, int(right[i])) for i in last[wanted].tolist()]


def lowest_score(steps: Sequence[Step], target: float) -> Step | None:
    """The lowest step whose rows prove that answers from its score on are right with a share of at least ``target``.

    A step proves it where a share below ``target`` would give so many right answers with a chance of at most a small
    risk, which is that the one-sided lower bound of Clopper and Pearson (1934) reaches ``target``. The best of many
    steps would prove too much: so steps are tried downwards from a start until one fails (fixed-sequence testing, as
    in "Learn then Test", Angelopoulos et al. 2021), from five starts at most, which lie at fixed numbers of rows
    and share `RISK`. Rows count as independent. None where no step proves it.

    Args:
        steps: those of `steps_of`.
        target: above 0 and below 1.
    """
    fewest = math.log(RISK / _NUM_STARTS) / math.log(target)  # rows that can prove it when all are right
    total = steps[-1].num_rows if steps else 0
    starts = [fewest * 2**i for i in range(_NUM_STARTS) if fewest * 2**i <= total]
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    lowest: Step | None = None
    for start in starts:
        for step in (step for step in steps if step.num_rows >= start):
            if _chance_of_so_many(step.num_right, step.num_rows, target, log_factorial) > RISK / _NUM_STARTS:
                break
            if lowest is None or step.num_rows > lowest.num_rows:
                lowest = step
    return lowest


def _chance_of_so_many(successes: int, total: int, share: float, log_factorial: FloatArray) -> float:
    """P(X >= successes) for a binomial X of ``total`` tries that succeed with ``share``."""
    if successes <= total * share:
        return 1.0  # near a half, and far from any risk that is asked for
    k = np.arange(successes, total + 1)
    ways = log_factorial[total] - log_factorial[k] - log_factorial[total - k]
    return float(np.exp(ways + k * math.log(share) + (total - k) * math.log1p(-share)).sum())


def to_json(
    calibration: Calibration, figures: Mapping[str, Any], null_threshold: float | None, steps: Sequence[Step] = (),
) -> dict[str, Any]:
    """What calibration.json holds: the two numbers, the null threshold (None without null answers), the figures, and
    the steps of the score that `lowest_score` needs."""
    return (
        dataclasses.asdict(calibration) | {"null_threshold": null_threshold} | dict(figures)
        | {"steps": [list(step) for step in steps]}
    )


def from_json(
    stored: Mapping[str, Any], *, min_probability: float | None = None, target_precision: float | None = None
) -> Probabilities:
    """What a calibration.json says, for the answers of a test run; at most one of the two limits is given.

    Raises:
        OptionError: the rows of the fit do not prove ``target_precision`` for any score.
        KeyError, TypeError, ValueError: the file was not written by this version.
    """
    found = Calibration(float(stored["temperature"]), float(stored["offset"]))
    steps = [Step(float(score), int(rows), int(right)) for score, rows, right in stored["steps"]]
    if not (found.temperature > 0 and math.isfinite(found.temperature) and math.isfinite(found.offset)):
        raise ValueError(f"temperature {found.temperature}, offset {found.offset}")
    if target_precision is None:
        return Probabilities(found, min_probability)
    step = lowest_score(steps, target_precision)
    if step is None:
        needed = math.ceil(math.log(RISK / _NUM_STARTS) / math.log(target_precision))
        best = max((step for step in steps if step.num_rows >= needed), key=lambda s: s.num_right / s.num_rows,
                   default=None)
        seen = "" if best is None else (
            f"; the best found was {best.num_right} right of the {best.num_rows} answers with the highest scores"
        )
        raise OptionError(
            f"target_precision is {target_precision:g}, which the {steps[-1].num_rows if steps else 0} rows of the "
            f"calibration do not prove for any share of the answers (at least {needed} rows are needed for it{seen}); "
            "allowed: a lower target_precision, min_probability, or a calibration on more rows"
        )
    # A hair lower: the last bit of a logarithm may differ between two processors.
    (lowest,) = found.probability(np.array([step.score])).tolist()
    return Probabilities(found, lowest * (1 - 1e-9))


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
