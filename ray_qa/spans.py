"""Start and end logits become spans, and the spans of a row's windows become its answer.

`best_spans` works on one batch of windows where the logits are (CPU or GPU), without a matrix of all starts
by all ends; `best_window` and `merge_spans` choose among the windows of a row, on the host.

The scores are those of the question-answering pipeline of transformers up to 4.52: a softmax over the context
tokens and CLS, one for starts and one for ends; CLS then leaves the race; a span scores the product of its two
probabilities. Ties go to the earlier window, then the earlier start, then the shorter span.

Knows nothing of tokenizers, text or models: positions are token positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class BatchSpans:
    """The best spans of each window of a batch, best first: tensors [windows, top_k] on one device.

    ``start`` and ``end`` are positions in the window, ``end`` being the span's last token. ``score`` is negative
    where a window has fewer than ``top_k`` spans. ``null_score`` [windows] is the probability product of CLS, the
    score of "no answer" (0 where windows have no CLS).
    """

    start: torch.Tensor
    end: torch.Tensor
    score: torch.Tensor
    null_score: torch.Tensor


def best_spans(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    *,
    context_start: torch.Tensor,
    context_length: torch.Tensor,
    null_position: torch.Tensor | None,
    max_answer_length: int,
    top_k: int = 1,
    span_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> BatchSpans:
    """The ``top_k`` best spans of each window.

    Args:
        start_logits, end_logits: [windows, tokens], right-padded.
        context_start, context_length: [windows], where the context lies in each window; at least one token.
        null_position: [windows], position of CLS; None where windows have none.
        max_answer_length: tokens in a span at most.
        span_keys: two [windows, tokens] integer tensors; spans whose (keys[0][start], keys[1][end]) are equal
            are one span (tokens widened to the same words), and only its best score counts.

    With ``top_k=1`` nothing waits for the device. Time and memory grow with tokens (top 1) or with
    tokens x max_answer_length (top k).
    """
    import torch

    num_windows, width = start_logits.shape
    column = torch.arange(width, device=start_logits.device)
    in_context = (column >= context_start[:, None]) & (column < (context_start + context_length)[:, None])
    answerable = in_context
    if null_position is not None:
        answerable = in_context | (column == null_position[:, None])
    start = _probabilities(start_logits, answerable)
    end = _probabilities(end_logits, answerable)
    if null_position is None:
        null_score = torch.zeros(num_windows, device=start.device)
    else:
        at = null_position[:, None]
        null_score = (start.gather(1, at) * end.gather(1, at))[:, 0]
    # -1 keeps what is no context out of the race even where every real product underflows to 0.
    start = torch.where(in_context, start, 0.0)
    end = torch.where(in_context, end, -1.0)
    longest = max(min(max_answer_length, width), 1)
    ahead = torch.nn.functional.pad(end, (0, longest - 1), value=-1.0)

    if top_k == 1:
        best_end = torch.nn.functional.max_pool1d(ahead[:, None], longest, stride=1)[:, 0]
        products = torch.where(in_context, start * best_end, -1.0)
        score = products.amax(1, keepdim=True)
        best = _first(products == score)
        # Of the ends that reach this score the first, as products of different ends may round to one value.
        reach = best + torch.arange(longest, device=best.device)
        candidates = ahead.gather(1, reach)
        candidates = torch.where(candidates >= 0, start.gather(1, best) * candidates, -1.0)
        return BatchSpans(best, best + _first(candidates == score), score, null_score)

    ends = ahead.unfold(1, longest, 1)
    products = torch.where((ends >= 0) & in_context[:, :, None], start[:, :, None] * ends, -1.0)
    score, flat = products.flatten(1).sort(dim=1, descending=True, stable=True)
    begin = flat // longest
    finish = (begin + flat % longest).clamp(max=width - 1)  # beyond lie only spans that are none
    if span_keys is not None:
        keep = _distinct_spans(score, begin, finish, span_keys, top_k)
        score, begin, finish = score.gather(1, keep), begin.gather(1, keep), finish.gather(1, keep)
    return BatchSpans(begin[:, :top_k], finish[:, :top_k], score[:, :top_k], null_score)


def _probabilities(logits: torch.Tensor, answerable: torch.Tensor) -> torch.Tensor:
    """Softmax of each row over its answerable tokens, in fp32; 0 elsewhere."""
    import torch

    return torch.softmax(logits.float().masked_fill(~answerable, -torch.inf), dim=1)


def _first(true: torch.Tensor) -> torch.Tensor:
    """Index of the first True in each row, [rows, 1]; argmax does not promise the first of equals."""
    import torch

    width = true.shape[1]
    index = torch.arange(width, device=true.device)
    return torch.where(true, index, width - 1).amin(1, keepdim=True)


def _distinct_spans(
    score: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, span_keys: tuple[torch.Tensor, torch.Tensor],
    top_k: int,
) -> torch.Tensor:
    """Columns of the ``top_k`` best spans with distinct keys, for rows sorted best first.

    Looks at the best few first; only where too many of them are one and the same does it look at all.
    A row with fewer distinct spans is filled up with its last columns, which are no spans (score -1), or
    with repetitions, which `merge_spans` drops.
    """
    import torch

    total = score.shape[1]
    looked = min(4 * top_k + 32, total)
    while True:
        few_begin, few_end = begin[:, :looked], end[:, :looked]
        # One number per pair of keys; order does not matter, only equality.
        scale = span_keys[1].amax() + 1
        key = span_keys[0].gather(1, few_begin) * scale + span_keys[1].gather(1, few_end)
        ordered, order = key.sort(dim=1, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        fresh = torch.zeros_like(first).scatter(1, order, first) & (score[:, :looked] >= 0)
        enough = (fresh.sum(1) >= top_k) | (score[:, looked - 1] < 0)
        if looked == total or bool(enough.all()):
            break
        looked = min(4 * looked, total)
    # Distinct spans first, in their order; a stable sort keeps it.
    keep = (~fresh).to(torch.int8).sort(dim=1, stable=True).indices[:, :top_k]
    if keep.shape[1] < top_k:
        keep = torch.nn.functional.pad(keep, (0, top_k - keep.shape[1]), value=total - 1)
    return keep


def best_window(row: IntArray, score: FloatArray) -> IntArray:
    """For each row that occurs, in rising order, the index of its window with the highest score.

    ``row`` and ``score`` are per window, the windows of a row in their order; ties go to the earlier one.
    """
    order = np.lexsort((-score, row))
    ordered = row[order]
    first = np.ones(len(row), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def merge_spans(
    row: IntArray, start: IntArray, end: IntArray, score: FloatArray, top_k: int
) -> tuple[IntArray, IntArray]:
    """The ``top_k`` best distinct spans of each row, as (indices, rank of each), by row and rank.

    All arrays have one entry per span, in the order of windows and of spans within a window; equal (start, end)
    of a row are one span with the best of its scores. Entries with a negative score are no spans.
    """
    real = np.flatnonzero(score >= 0)
    # The best entry of each (row, start, end); lexsort is stable, so the earlier one in a tie.
    order = real[np.lexsort((-score[real], end[real], start[real], row[real]))]
    key = np.stack((row[order], start[order], end[order]))
    first = np.ones(len(order), np.bool_)
    first[1:] = (key[:, 1:] != key[:, :-1]).any(0)
    distinct = np.sort(order[first])
    order = distinct[np.lexsort((-score[distinct], row[distinct]))]
    rank = _rank_in_group(row[order])
    return order[rank < top_k], rank[rank < top_k]


def null_scores(row: IntArray, null_score: FloatArray, num_rows: int) -> FloatArray:
    """The score of "no answer" of each row: the smallest over its windows; inf for rows without windows."""
    smallest = np.full(num_rows, np.inf, null_score.dtype)
    np.minimum.at(smallest, row, null_score)
    return smallest


def _rank_in_group(group: IntArray) -> IntArray:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(group))
    begins = np.ones(len(group), np.bool_)
    begins[1:] = group[1:] != group[:-1]
    return index - np.maximum.accumulate(np.where(begins, index, 0)) if len(group) else index
