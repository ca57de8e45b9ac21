"""Two models on the same rows: intervals against another bootstrap, sums that merge to the same, examples."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa import comparison
from ray_qa.calibration import bootstrap_interval
from ray_qa.comparison import NUM_EXAMPLES, NUM_RESAMPLES, PAIRS, Comparison, pairs_of
from ray_qa.slices import DETAILS
from tests.test_slices import random_lines


def identity(name: object) -> str:
    return hashlib.blake2b(str(name).encode(), digest_size=8).hexdigest()


def pairs(seed: int, size: int, *, gain: float = 0.05, contexts: int = 40) -> pa.Table:
    """Rows on which b is right more often by about ``gain``; rows of a context resemble each other."""
    rng = np.random.default_rng(seed)
    context = rng.integers(0, contexts, size)
    ease = rng.normal(0, 0.15, contexts)[context]
    lines: list[dict[str, Any]] = []
    for row in range(size):
        f1 = [float(np.clip(0.5 + ease[row] * i + i * gain + rng.normal(0, 0.2), 0, 1).round(2)) for i in (0, 1)]
        lines.append({
            "row_index": row, "context_id": identity(context[row]), "question": f"who {row}?", "golds": ["Ann"],
            "prediction_a": "a", "prediction_b": "b", "score_a": float(rng.random()), "score_b": float(rng.random()),
            "exact_match_a": f1[0] > 0.7, "exact_match_b": f1[1] > 0.7, "f1_a": f1[0], "f1_b": f1[1],
        })
    return pa.Table.from_pylist(lines, schema=PAIRS)


def of(table: pa.Table) -> Comparison:
    return Comparison.of(table, lambda row: ((f"context of {table['row_index'][row]}", ""),))


def test_intervals_are_those_of_a_bootstrap_over_contexts() -> None:
    table = pairs(0, 2_000, contexts=200)
    found = of(table)
    cluster = np.unique(table["context_id"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    f1 = table["f1_b"].to_numpy() - table["f1_a"].to_numpy()
    exact = (
        table["exact_match_b"].to_numpy(zero_copy_only=False).astype(float)
        - table["exact_match_a"].to_numpy(zero_copy_only=False)
    )
    for values, difference in ((f1, found.f1), (exact, found.exact_match)):
        low, high = (100 * bound for bound in bootstrap_interval(values, cluster))
        assert difference.difference == pytest.approx(100 * values.mean(), abs=1e-4)
        assert difference.low is not None and difference.high is not None
        assert difference.high - difference.low == pytest.approx(high - low, rel=0.1)
        assert difference.low == pytest.approx(low, abs=0.1 * (high - low))
        counts = ((values > 1e-9).sum(), (values < -1e-9).sum(), (abs(values) <= 1e-9).sum())
        assert (difference.won, difference.lost, difference.tied) == counts
    assert (found.num_rows, found.num_contexts) == (2_000, 200)
    # Rows of a context resemble each other: an interval over rows would be too narrow.
    low, high = (100 * bound for bound in bootstrap_interval(f1, np.arange(len(f1))))
    assert found.f1.high - found.f1.low > 1.2 * (high - low)  # type: ignore[operator]


def test_weights_are_poisson_and_belong_to_the_context() -> None:
    names = np.array([int(identity(i), 16) for i in range(2_000)], np.uint64)
    weights = comparison._weights(names)
    assert weights.shape == (2_000, NUM_RESAMPLES)
    for k in range(6):
        expected = math.exp(-1) / math.factorial(k)
        assert (weights == k).mean() == pytest.approx(expected, abs=5 * (expected / weights.size) ** 0.5)
    assert abs(np.corrcoef(weights[:50])[np.triu_indices(50, 1)]).max() < 0.2  # contexts are independent
    assert abs(np.corrcoef(weights[:, :50].T)[np.triu_indices(50, 1)]).max() < 0.2  # and so are resamples
    assert np.array_equal(comparison._weights(names[7:9]), weights[7:9])
    assert comparison._weights(names[:1])[0].tolist() == weights_of(int(names[0]))


def weights_of(state: int) -> list[int]:
    """splitmix64 and the distribution function of Poisson, one number after the other."""
    weights = []
    for _ in range(NUM_RESAMPLES):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
        share, weight = (z ^ z >> 31) / 2**64, 0
        while share >= sum(math.exp(-1) / math.factorial(k) for k in range(weight + 1)):
            weight += 1
        weights.append(weight)
    return weights


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.lists(st.integers(0, 150), max_size=4), st.randoms(use_true_random=False))
def test_comparisons_merge_to_the_same_in_any_order(seed: int, cuts: list[int], rng: random.Random) -> None:
    table = pairs(seed, 150)
    edges = [0, *sorted(cuts), 150]
    parts = [of(table.slice(a, b - a)) for a, b in zip(edges, edges[1:], strict=False)]
    rng.shuffle(parts)
    merged, whole = sum(parts, Comparison()), of(table)
    for name in ("num_rows", "num_contexts", "exact_match", "f1"):
        assert getattr(merged, name) == getattr(whole, name)
    assert merged.won == whole.won and merged.lost == whole.lost
    assert np.array_equal(merged.sums, whole.sums)


def test_the_same_model_twice_gains_nothing() -> None:
    table = pairs(1, 300)
    for name in ("prediction", "score", "exact_match", "f1"):
        number = table.column_names.index(f"{name}_b")
        table = table.set_column(number, PAIRS.field(number), table[f"{name}_a"])
    found = of(table)
    assert found.f1 == (0.0, 0.0, 0.0, 0, 0, 300) == found.exact_match and found.won == found.lost == ()


def test_the_clearest_examples_come_first_and_long_texts_are_cut() -> None:
    table = pairs(2, 500, gain=0.2)
    lines = table.to_pylist()
    lines[123] |= {"f1_a": 0.0, "f1_b": 1.0, "score_a": 1.5, "question": "long " * 1_000, "golds": ["g"] * 50}
    lines[200] |= {"f1_a": 1.0, "f1_b": 0.0, "score_b": 1.5}
    found = of(pa.Table.from_pylist(lines, schema=PAIRS))
    assert len(found.won) == len(found.lost) == NUM_EXAMPLES
    assert found.won[0].row_index == 123 and found.lost[0].row_index == 200
    assert len(found.won[0].question) == 300 and len(found.won[0].golds) == 5
    assert found.won[0].pieces == (("context of 123", ""),)
    gains = [round(example.f1_b - example.f1_a, 6) for example in found.won]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert all(example.f1_a > example.f1_b for example in found.lost)


def test_too_few_contexts_have_no_interval() -> None:
    found = of(pairs(3, 60, contexts=comparison.MIN_CONTEXTS - 1))
    assert found.f1.low is None and found.f1.high is None and math.isfinite(found.f1.difference)
    nothing = Comparison()
    assert math.isnan(nothing.f1.difference) and nothing.f1.low is None and nothing.num_contexts == 0


def test_many_contexts_are_estimated() -> None:
    table = pairs(4, 30_000, contexts=30_000)
    exact = len(set(table["context_id"].to_pylist()))
    found = of(table)
    assert len(found.contexts) == 1_024 and found.num_contexts == pytest.approx(exact, rel=0.12)


def test_pairs_are_of_the_same_rows() -> None:
    a = pa.Table.from_pylist(random_lines(0, 20), schema=DETAILS)
    b = pa.Table.from_pylist(random_lines(1, 20), schema=DETAILS)
    found = pairs_of(a, b)
    assert found.schema.equals(PAIRS) and found["f1_a"].equals(a["f1"]) and found["f1_b"].equals(b["f1"])
    with pytest.raises(ValueError, match="not evaluated on the same rows"):
        pairs_of(a, b.slice(1))
