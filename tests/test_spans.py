"""Span decoding against a plain search over the full matrix of starts and ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa.spans import best_spans, best_window, merge_spans, null_scores


def plain(start, end, context, null, longest):
    """All spans of one window as (score, start, end), best first, and the score of no answer; fp32."""
    allowed = np.zeros(len(start), bool)
    allowed[context[0] : context[0] + context[1]] = True
    if null is not None:
        allowed[null] = True
    probability = []
    for logits in (start, end):
        probability.append(torch.softmax(torch.from_numpy(logits).masked_fill(~torch.from_numpy(allowed), -torch.inf),
                                         0).numpy())
    nothing = 0.0 if null is None else probability[0][null] * probability[1][null]
    inside = range(context[0], context[0] + context[1])
    spans = [(probability[0][s] * probability[1][e], s, e) for s in inside for e in inside if 0 <= e - s < longest]
    return sorted(spans, key=lambda span: (-span[0], span[1], span[2])), nothing


@st.composite
def batches(draw):
    count, width = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    # A few values only, so that ties are common.
    values = st.sampled_from([-30000.0, -3.0, 0.0, 0.5, 2.0, 60.0])
    logits = [np.array(draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=count,
                                     max_size=count)), np.float32) for _ in range(2)]
    first = [draw(st.integers(1, width - 1)) for _ in range(count)]
    size = [draw(st.integers(1, width - begin)) for begin in first]
    return *logits, first, size, draw(st.booleans()), draw(st.integers(1, 14)), draw(st.sampled_from([1, 2, 5, 300]))


@settings(deadline=None, max_examples=150)
@given(batches())
def test_spans_equal_a_plain_search(batch):
    start, end, first, size, has_null, longest, top_k = batch
    null = torch.zeros(len(first), dtype=torch.long) if has_null else None
    found = best_spans(
        torch.from_numpy(start), torch.from_numpy(end), context_start=torch.tensor(first),
        context_length=torch.tensor(size), null_position=null, max_answer_length=longest, top_k=top_k,
    )
    for row in range(len(first)):
        expected, nothing = plain(start[row], end[row], (first[row], size[row]), 0 if has_null else None, longest)
        got = list(zip(found.score[row].tolist(), found.start[row].tolist(), found.end[row].tolist(), strict=True))
        got = [span for span in got if span[0] >= 0]
        assert [span[1:] for span in got] == [span[1:] for span in expected[:top_k]]
        assert [span[0] for span in got] == pytest.approx([span[0] for span in expected[:top_k]], rel=1e-6)
        assert found.null_score[row].item() == pytest.approx(nothing, rel=1e-6)


@settings(deadline=None, max_examples=100)
@given(batches(), st.integers(1, 4))
def test_spans_with_equal_keys_count_once(batch, grain):
    start, end, first, size, has_null, longest, top_k = batch
    if top_k == 1:
        top_k = 3
    key = torch.arange(start.shape[1]).expand(len(first), -1) // grain
    null = torch.zeros(len(first), dtype=torch.long) if has_null else None
    found = best_spans(
        torch.from_numpy(start), torch.from_numpy(end), context_start=torch.tensor(first),
        context_length=torch.tensor(size), null_position=null, max_answer_length=longest, top_k=top_k,
        span_keys=(key, key),
    )
    for row in range(len(first)):
        expected: dict[tuple[int, int], float] = {}
        for score, s, e in plain(start[row], end[row], (first[row], size[row]), 0 if has_null else None, longest)[0]:
            expected.setdefault((s // grain, e // grain), score)
        seen: dict[tuple[int, int], float] = {}
        for score, s, e in zip(found.score[row], found.start[row], found.end[row], strict=True):
            if score >= 0:
                seen.setdefault((int(s) // grain, int(e) // grain), float(score))
        wanted = list(expected.items())[:top_k]
        assert list(seen)[: len(wanted)] == [key for key, _ in wanted]
        assert list(seen.values())[: len(wanted)] == pytest.approx([score for _, score in wanted], rel=1e-6)


def test_no_matrix_of_all_starts_by_all_ends():
    """A window of a million tokens would need 4 TB for one."""
    logits = torch.zeros(1, 1_000_000)
    logits[0, 123_456] = 50.0
    found = best_spans(
        logits, logits.roll(2, 1), context_start=torch.tensor([1]), context_length=torch.tensor([999_000]),
        null_position=torch.tensor([0]), max_answer_length=15,
    )
    assert (found.start.item(), found.end.item()) == (123_456, 123_458)


def test_the_best_window_of_each_row_and_the_earlier_one_in_a_tie():
    row = np.array([0, 0, 0, 2, 2, 5])
    score = np.array([0.1, 0.7, 0.7, 0.2, 0.1, 0.0], np.float32)
    assert best_window(row, score).tolist() == [1, 3, 5]
    assert best_window(row[:0], score[:0]).tolist() == []


def test_merging_keeps_the_best_of_each_span():
    row = np.array([0, 0, 0, 0, 1, 1, 1])
    start = np.array([3, 8, 3, 9, 0, 0, 0])
    end = np.array([5, 9, 5, 9, 1, 2, 0])
    score = np.array([0.2, 0.4, 0.5, 0.4, 0.1, 0.3, -1.0], np.float32)
    indices, rank = merge_spans(row, start, end, score, 2)
    assert indices.tolist() == [2, 1, 5, 4] and rank.tolist() == [0, 1, 0, 1]
    indices, rank = merge_spans(row, start, end, score, 9)
    assert indices.tolist() == [2, 1, 3, 5, 4] and rank.tolist() == [0, 1, 2, 0, 1]
    assert [part.tolist() for part in merge_spans(row[:0], start[:0], end[:0], score[:0], 3)] == [[], []]


def test_no_answer_scores_the_smallest_over_the_windows():
    scores = null_scores(np.array([0, 0, 2]), np.array([0.5, 0.25, 0.75], np.float32), 4)
    assert scores.tolist() == [0.25, np.inf, 0.75, np.inf]
