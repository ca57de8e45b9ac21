"""Rows in, answers out, in one process: windows, batches, logits, spans, answers.

The engine owns the order of the steps and nothing else: each step is a module of its own.

    rows -> (identical rows once) -> windows -> batches -> logits -> best spans per window, and losses
         -> best over a row's windows -> characters of the context -> one answer per row

Two halves, which may run in different processes: `make_windows` needs a tokenizer and a CPU, `Engine.answer`
a model. Knows nothing of files, parts or Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ray_qa import schema
from ray_qa.batches import collate, padded_width, split_by_tokens
from ray_qa.errors import OptionError, WorkError
from ray_qa.labels import check_inputs
from ray_qa.model import (
    QAModel,
    default_tokens_per_batch,
    is_out_of_memory,
    padding_multiple,
    to_device,
    window_losses,
)
from ray_qa.options import AnswerOptions, ModelOptions
from ray_qa.spans import BatchSpans, best_spans, best_window, merge_spans, null_scores
from ray_qa.windows import WindowMaker, Windows

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]

# Scripts written without spaces between words. Where a tokenizer's "word" holds one of these, it is a clause or a
# whole sentence, and an answer is not widened to it.
_UNSPACED = np.array(
    [
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x0F00, 0x0FFF),  # Tibetan
        (0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),  # Myanmar
        (0x1780, 0x17FF), (0x19E0, 0x19FF),  # Khmer
        (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF),  # Tai scripts
        (0x1B00, 0x1B7F), (0xA980, 0xA9DF),  # Balinese, Javanese
        (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B),  # Han
        (0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D), (0x1B000, 0x1B16F),  # Kana
        (0x3100, 0x312F), (0x31A0, 0x31BF),  # Bopomofo
        (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),  # Han
        (0xA000, 0xA4CF),  # Yi
    ]
)
_SPACES = np.array(
    [9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
)


@dataclass(frozen=True)
class EngineOutput:
    """Answers, and losses where they were asked for, of one table of rows.

    ``predictions`` has schema `schema.PREDICTIONS` and one entry per row in the table's order, or
    `schema.RANKED_PREDICTIONS` and up to ``top_k`` entries per row. ``loss_sum`` (float64 [rows]) adds up the losses
    of a row's ``num_windows`` (int64 [rows]) windows; it is None without ``with_loss``. ``num_tokens`` of
    ``num_padded_tokens`` that went through the model were no padding; identical rows go through it once.
    ``null_score`` (float64 [rows]) is the probability of "no answer", NaN where a row has no windows;
    ``context_length`` (int64 [rows]) counts the tokens of a row's context, 0 where it has no windows.
    ``text_predictions`` is ``predictions`` without null answers, the best answer with text of every row; None without
    ``with_loss``.
    """

    predictions: pa.Table
    loss_sum: FloatArray | None
    num_windows: IntArray
    num_tokens: int
    num_padded_tokens: int
    null_score: FloatArray
    context_length: IntArray
    text_predictions: pa.Table | None = None

    @property
    def padding_share(self) -> float:
        """Share of the tokens in all batches that were padding, 0..1."""
        return 1 - self.num_tokens / self.num_padded_tokens if self.num_padded_tokens else 0.0

    def join(self, other: EngineOutput) -> EngineOutput:
        """The output of this one's rows, followed by those of ``other``."""
        def ends(ours: Any, theirs: Any, join: Callable[[list[Any]], Any]) -> Any:
            return None if ours is None or theirs is None else join([ours, theirs])

        return EngineOutput(
            predictions=pa.concat_tables([self.predictions, other.predictions]),
            loss_sum=ends(self.loss_sum, other.loss_sum, np.concatenate),
            num_windows=np.concatenate([self.num_windows, other.num_windows]),
            num_tokens=self.num_tokens + other.num_tokens,
            num_padded_tokens=self.num_padded_tokens + other.num_padded_tokens,
            null_score=np.concatenate([self.null_score, other.null_score]),
            context_length=np.concatenate([self.context_length, other.context_length]),
            text_predictions=ends(self.text_predictions, other.text_predictions, pa.concat_tables),
        )


def window_maker(tokenizer: Any, options: ModelOptions, *, model_max_length: int | None = None) -> WindowMaker:
    """The window maker that ``options`` ask for; tokenizer and length come from `model.load_tokenizer`."""
    return WindowMaker(
        tokenizer, max_seq_length=options.max_seq_length, doc_stride=options.doc_stride,
        pair_order=options.pair_order, model_max_length=model_max_length,
    )


def checked_window_maker(tokenizer: Any, options: AnswerOptions, *, model_max_length: int | None = None) -> WindowMaker:
    """`window_maker`, with the options checked that only a tokenizer can tell to be wrong.

    Raises:
        OptionError: ``handle_impossible_answer`` with windows that have no CLS token, or a ``doc_stride`` that is too
            large for the windows.
    """
    maker = window_maker(tokenizer, options, model_max_length=model_max_length)
    if options.handle_impossible_answer and maker.template.cls_position is None:
        raise OptionError(
            "handle_impossible_answer is True, but windows of this model have no CLS token that could mean 'no "
            f"answer' ({type(tokenizer).__name__}); allowed: False, or a model with a CLS token"
        )
    return maker


def make_windows(table: pa.Table, maker: WindowMaker, *, with_labels: bool = False) -> Windows:
    """Windows of a table's rows (columns context, question; with labels answer_text, answer_start).

    Identical rows get windows once: those of their first occurrence. Rows that cannot be answered (blank
    question or context, a question too long) are named in the windows' ``errors``.
    """
    blank = check_inputs(table.select([schema.CONTEXT, schema.QUESTION]))
    errors = {row: why for row, why in enumerate(blank) if why is not None}
    first = _first_occurrence(table, with_labels=with_labels)
    rows = np.flatnonzero(first == np.arange(table.num_rows))
    if errors:
        rows = rows[~np.isin(rows, list(errors))]
    chosen = table if len(rows) == table.num_rows else table.take(pa.array(rows))
    labels: dict[str, Any] = {}
    if with_labels:
        labels = {
            "answer_starts": _answer_starts(chosen),
            "answer_texts": chosen.column(schema.ANSWER_TEXT).to_pylist(),
        }
    windows = maker.make(
        chosen.column(schema.CONTEXT).to_pylist(), chosen.column(schema.QUESTION).to_pylist(), **labels
    ).for_rows(rows)
    windows.errors.update(errors)
    return windows


class Engine:
    """Answers questions with one model under one set of options.

    ``tokens_per_batch`` is the present budget of padded tokens in a forward pass; it is halved for good when
    memory runs out.
    """

    def __init__(self, qa_model: QAModel, options: AnswerOptions | None = None) -> None:
        """Raises:
            OptionError: ``handle_impossible_answer`` with a model whose windows have no CLS token, or a
                ``doc_stride`` that is too large for the windows.
        """
        self.qa_model = qa_model
        self.options = options or AnswerOptions()
        self.maker = checked_window_maker(
            qa_model.tokenizer, self.options, model_max_length=qa_model.model_max_length
        )
        self.tokens_per_batch = self.options.tokens_per_batch or default_tokens_per_batch(qa_model.device)
        self._padding = {
            "pad_to_multiple": padding_multiple(qa_model.device), "at_most": qa_model.model_max_length,
        }

    def windows(self, table: pa.Table, *, with_labels: bool = False) -> Windows:
        """The windows of a table's rows; see `make_windows`."""
        return make_windows(table, self.maker, with_labels=with_labels)

    def give_up(
        self, table: pa.Table, reason: str, *, with_loss: bool = False, top_k: int = 1
    ) -> EngineOutput:
        """What `answer` would give if no row of the table could be answered, for ``reason``."""
        windows = self.maker.make([], [], **({"answer_starts": [], "answer_texts": []} if with_loss else {}))
        windows.errors.update(dict.fromkeys(range(table.num_rows), reason))
        return self.answer(table, windows, with_loss=with_loss, top_k=top_k)

    def answer(
        self, table: pa.Table, windows: Windows | None = None, *, with_loss: bool = False, top_k: int = 1
    ) -> EngineOutput:
        """Answer every row of a table; every row is in the result, with an answer or an error.

        Args:
            table: columns row_index, context, question; with ``with_loss`` also answer_text and answer_start
                (character, -1 or blank for no answer), checked by `labels.check_labels`.
            windows: what `make_windows` made of the same table, perhaps elsewhere.
            with_loss: also compute the loss of every window, from the same forward passes.
            top_k: answers per row at most.

        Raises:
            WorkError: not even a single window fits into memory.
        """
        if top_k < 1:
            raise OptionError(f"top_k is {top_k}; allowed: a whole number of at least 1")
        if windows is None:
            windows = self.windows(table, with_labels=with_loss)
        if with_loss and windows.start_position is None and windows.num_windows:
            raise ValueError("with_loss needs windows that were made with labels")
        num_rows = table.num_rows
        first = _first_occurrence(table, with_labels=with_loss)
        places = _Places(table, windows, self.maker, self.options.align_to_words)
        result = self._run(windows, top_k, with_loss, places if top_k > 1 else None)

        if top_k == 1:
            chosen = best_window(windows.row, result.score[:, 0])
            rank: IntArray = np.zeros(len(chosen), np.int64)
            start, end = places.characters(chosen, result.start[chosen, 0], result.end[chosen, 0])
            row, score = windows.row[chosen], result.score[chosen, 0]
        else:
            window = np.repeat(np.arange(windows.num_windows), result.score.shape[1])
            start, end = places.characters(window, result.start.ravel(), result.end.ravel())
            row, score = windows.row[window], result.score.ravel()
            keep, rank = merge_spans(row, start, end, score, top_k)
            row, start, end, score = row[keep], start[keep], end[keep], score[keep]
        answers = _Answers(row.astype(np.int64), rank, start, end, score)
        null = null_scores(windows.row, result.null_score, num_rows)
        text_predictions: pa.Table | None = None
        if self.options.handle_impossible_answer:
            if with_loss:
                text_predictions = _predictions(table, answers, first, windows.errors, ranked=top_k > 1)
            answers = answers.with_null(null, top_k)
        predictions = _predictions(table, answers, first, windows.errors, ranked=top_k > 1)

        num_windows = np.bincount(windows.row, minlength=num_rows)
        context_length = np.zeros(num_rows, np.int64)
        np.maximum.at(context_length, windows.row, windows.context_offset.astype(np.int64) + windows.context_length)
        loss_sum: FloatArray | None = None
        if with_loss:
            # astype: bincount of nothing is integer.
            loss_sum = np.bincount(windows.row, weights=result.loss, minlength=num_rows).astype(np.float64)[first]
        return EngineOutput(
            predictions=predictions,
            loss_sum=loss_sum,
            num_windows=num_windows[first],
            num_tokens=int(windows.splits[-1]),
            num_padded_tokens=result.num_padded_tokens,
            null_score=np.where(np.isfinite(null), null, np.nan).astype(np.float64)[first],
            context_length=context_length[first],
            text_predictions=predictions if with_loss and text_predictions is None else text_predictions,
        )

    def _run(self, windows: Windows, top_k: int, with_loss: bool, places: _Places | None) -> _WindowResults:
        """All windows through the model, in batches under the token budget."""
        lengths = windows.lengths
        pending = deque(split_by_tokens(lengths, self.tokens_per_batch))
        done: list[tuple[IntArray, BatchSpans, torch.Tensor | None]] = []
        num_padded = 0
        while pending:
            indices = pending.popleft()
            size = len(indices) * padded_width(int(lengths[indices].max()), **self._padding)
            batch = None
            try:
                batch = self._batch(windows, indices, top_k, with_loss, places)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise WorkError(
                        f"memory ran out on a single window of {size} tokens on {self.qa_model.device}; use a smaller "
                        "max_seq_length, a smaller model, or a larger device"
                    ) from error
            if batch is None:  # outside of `except`, where the traceback would keep the tensors alive
                if self.qa_model.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.tokens_per_batch = max(size // 2, 1)
                rest = np.concatenate([indices, *pending])
                pending = deque(rest[part] for part in split_by_tokens(lengths[rest], self.tokens_per_batch))
                continue
            num_padded += size
            done.append((indices, *batch))
        return _WindowResults.gather(done, windows.num_windows, top_k, num_padded)

    @torch.inference_mode()
    def _batch(
        self, windows: Windows, indices: IntArray, top_k: int, with_loss: bool, places: _Places | None
    ) -> tuple[BatchSpans, torch.Tensor | None]:
        """Best spans and losses of one batch of windows, left on the device."""
        template, device = self.maker.template, self.qa_model.device
        batch = collate(windows, indices, template, template.pad_token_id, with_labels=with_loss, **self._padding)
        start_logits, end_logits = self.qa_model.forward(batch)
        loss = None
        if with_loss:
            loss = window_losses(
                start_logits, end_logits, to_device(batch["attention_mask"], device),
                to_device(batch["start_positions"], device), to_device(batch["end_positions"], device),
            )
        context_length = windows.context_length[indices].astype(np.int64)
        lengths = (windows.splits[indices + 1] - windows.splits[indices]).astype(np.int64)
        context_start = template.context_start(windows.question_length[indices].astype(np.int64))
        null = None if template.cls_position is None else template.null_position(lengths)
        spans = best_spans(
            start_logits,
            end_logits,
            context_start=to_device(context_start, device),
            context_length=to_device(context_length, device),
            null_position=None if null is None else to_device(null, device),
            max_answer_length=self.options.max_answer_length,
            top_k=top_k,
            span_keys=None if places is None else places.keys(indices, start_logits.shape[1], device),
        )
        return spans, loss


@dataclass(frozen=True)
class _WindowResults:
    """What the model found in every window, on the host: [windows, top_k] and [windows]."""

    start: IntArray
    end: IntArray
    score: npt.NDArray[np.float32]
    null_score: npt.NDArray[np.float32]
    loss: FloatArray
    num_padded_tokens: int

    @classmethod
    def gather(
        cls, done: Sequence[tuple[IntArray, BatchSpans, torch.Tensor | None]], num_windows: int, top_k: int,
        num_padded: int,
    ) -> _WindowResults:
        """Bring the results of all batches to the host in one go, in the order of the windows."""
        start, end = np.zeros((2, num_windows, top_k), np.int64)
        score = np.full((num_windows, top_k), -1, np.float32)
        null_score = np.zeros(num_windows, np.float32)
        loss = np.zeros(num_windows, np.float64)
        for indices, spans, losses in done:
            found = spans.score.shape[1]
            start[indices, :found] = spans.start.cpu().numpy()
            end[indices, :found] = spans.end.cpu().numpy()
            score[indices, :found] = spans.score.cpu().numpy()
            null_score[indices] = spans.null_score.cpu().numpy()
            if losses is not None:
                loss[indices] = losses.cpu().numpy()
        return cls(start, end, score, null_score, loss, num_padded)


class _Places:
    """From positions in windows to characters of contexts, widened to words.

    Each distinct context is tokenized once more for this, with offsets: windows that come from another process
    carry none, and would be twice as large if they did. Arrays run over the tokens of all distinct contexts,
    end to end.
    """

    def __init__(self, table: pa.Table, windows: Windows, maker: WindowMaker, align_to_words: bool) -> None:
        rows = np.unique(windows.row)
        column = table.column(schema.CONTEXT).combine_chunks().take(pa.array(rows)).dictionary_encode()
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        texts: list[str] = column.dictionary.to_pylist()
        context_of_row = np.zeros(table.num_rows, np.int64)
        context_of_row[rows] = column.indices.to_numpy()

        pieces: list[IntArray] = []
        aligned: list[tuple[IntArray, IntArray]] = []
        for text, encoding in zip(texts, maker.encode(texts), strict=True):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            pieces.append(offsets)
            if align_to_words:
                aligned.append(_words(text, offsets, encoding.word_ids))
        counts = np.array([len(piece) for piece in pieces], np.int64)
        splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._offsets = np.concatenate([*pieces, np.zeros((0, 2), np.int64)])
        if align_to_words:
            shift = np.repeat(splits[:-1], counts)
            nothing = np.zeros(0, np.int64)
            self._word_first = np.concatenate([*(first for first, _ in aligned), nothing]) + shift
            self._word_last = np.concatenate([*(last for _, last in aligned), nothing]) + shift
        else:
            self._word_first = self._word_last = np.arange(splits[-1])
        # The context tokens of window i are [low, high] here, and begin at `start` in the window.
        self._low = splits[context_of_row[windows.row]] + windows.context_offset
        self._high = self._low + windows.context_length - 1
        self._start = maker.template.context_start(windows.question_length.astype(np.int64))

    def characters(self, window: IntArray, start: IntArray, end: IntArray) -> tuple[IntArray, IntArray]:
        """First and last-plus-one character of spans, given as positions of tokens in windows."""
        low, high = self._low[window], self._high[window]
        first = np.clip(low + start - self._start[window], low, high)
        last = np.clip(low + end - self._start[window], low, high)
        # A word that the window cuts is widened as far as the window sees it.
        begin = self._offsets[np.maximum(self._word_first[first], low), 0]
        finish = self._offsets[np.minimum(self._word_last[last], high), 1]
        return begin, np.maximum(finish, begin)

    def keys(self, indices: IntArray, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For every token of the given windows where a span would begin or end that begins or ends there."""
        token = np.broadcast_to(np.arange(width), (len(indices), width))
        window = np.broadcast_to(np.asarray(indices)[:, None], token.shape)
        low, high = self._low[window], self._high[window]
        place = np.clip(low + token - self._start[window], low, high)
        begin = self._offsets[np.maximum(self._word_first[place], low), 0]
        finish = self._offsets[np.minimum(self._word_last[place], high), 1]
        return to_device(begin, device), to_device(finish, device)


def _words(text: str, offsets: IntArray, word_ids: Sequence[int | None]) -> tuple[IntArray, IntArray]:
    """For each token the first and the last token of its word; itself where the word is of no use.

    Of no use are words that hold white space (the tokenizer does not split into words at all) and words of
    scripts without spaces.
    """
    count = len(offsets)
    index = np.arange(count)
    words = np.array([-1 if word is None else word for word in word_ids], np.int64)
    begins = np.ones(count, np.bool_)
    begins[1:] = (words[1:] != words[:-1]) | (words[1:] < 0)
    heads = np.flatnonzero(begins)
    tails = np.append(heads[1:], count) - 1
    several = np.flatnonzero(tails > heads)
    first, last = index.copy(), index.copy()
    if not len(several):
        return first, last
    usable = _usable(text, offsets[heads[several], 0], offsets[tails[several], 1])
    heads, sizes = heads[several][usable], (tails - heads + 1)[several][usable]
    inside = np.repeat(heads - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(sizes.sum())
    first[inside] = np.repeat(heads, sizes)
    last[inside] = np.repeat(heads + sizes - 1, sizes)
    return first, last


def _usable(text: str, start: IntArray, end: IntArray) -> npt.NDArray[np.bool_]:
    """Which of the stretches [start, end) of a text are single words of a script with spaces."""
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    space = np.isin(code, _SPACES)
    number = np.arange(len(code))
    # Leading and trailing white space does not count: byte-level tokenizers keep it with the word.
    next_solid = np.minimum.accumulate(np.where(space, len(code), number)[::-1])[::-1]
    last_solid = np.maximum.accumulate(np.where(space, -1, number))
    begin = np.append(next_solid, len(code))[start]
    finish = np.append(-1, last_solid)[end] + 1
    finish = np.maximum(finish, begin)
    usable = _count_inside(space, begin, finish) == 0
    if code.max(initial=0) >= _UNSPACED[:, 0].min():
        place = np.searchsorted(_SORTED_UNSPACED[:, 0], code, side="right") - 1
        unspaced = (place >= 0) & (code <= _SORTED_UNSPACED[np.maximum(place, 0), 1])
        usable &= _count_inside(unspaced, begin, finish) == 0
    return usable


_SORTED_UNSPACED = _UNSPACED[np.argsort(_UNSPACED[:, 0])]


def _count_inside(flags: npt.NDArray[np.bool_], start: IntArray, end: IntArray) -> IntArray:
    total = np.concatenate([[0], np.cumsum(flags)])
    return total[end] - total[start]


@dataclass(frozen=True)
class _Answers:
    """Answers as columns, by row and rank; rows without any are absent."""

    row: IntArray
    rank: IntArray
    start: IntArray
    end: IntArray
    score: npt.NDArray[np.float32]

    def with_null(self, null: FloatArray, top_k: int) -> _Answers:
        """With the answer "" among those of each row, after spans of equal score."""
        rows = np.flatnonzero(np.isfinite(null))
        zeros = np.zeros(len(rows), np.int64)
        row = np.concatenate([self.row, rows])
        score = np.concatenate([self.score, null[rows].astype(np.float32)])
        start, end = np.concatenate([self.start, zeros]), np.concatenate([self.end, zeros])
        rank = np.concatenate([self.rank, zeros + top_k])
        order = np.lexsort((rank, -score, row))
        row = row[order]
        position = np.arange(len(row)) - np.searchsorted(row, row)
        keep = position < top_k
        order = order[keep]
        return _Answers(row[keep], position[keep], start[order], end[order], score[order])


def _predictions(
    table: pa.Table, answers: _Answers, first: IntArray, errors: dict[int, str], *, ranked: bool
) -> pa.Table:
    """The answers of all rows, identical rows included, in the table's order."""
    num_rows = table.num_rows
    # Where the answers of each row begin among all answers; identical rows share those of the first.
    bounds = np.searchsorted(answers.row, np.arange(num_rows + 1))
    begin, count = bounds[first], np.diff(bounds)[first]
    size = np.maximum(count, 1)  # a row without an answer has one entry too
    row = np.repeat(np.arange(num_rows), size)
    position = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
    found = count[row] > 0
    source = np.where(found, begin[row] + position, 0)

    def column(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(found, values[source] if len(values) else 0, 0).astype(values.dtype)

    start, end = column(answers.start), column(answers.end)
    reasons: list[str | None] = [None] * len(row)
    for entry in np.flatnonzero(~found).tolist():
        at = int(row[entry])
        reasons[entry] = errors.get(at) or errors.get(int(first[at])) or "no answer was found in this row"
    columns = {
        schema.ROW_INDEX: table.column(schema.ROW_INDEX).take(pa.array(row)).cast(pa.int64()),
        schema.RANK: pa.array(position.astype(np.int32)),
        "answer": pa.array(_slices(table.column(schema.CONTEXT), row, start, end, found), pa.string()),
        "score": pa.array(column(answers.score).astype(np.float32)),
        "start": pa.array(start),
        "end": pa.array(end),
        "error": pa.array(reasons, pa.string()),
    }
    target = schema.RANKED_PREDICTIONS if ranked else schema.PREDICTIONS
    return pa.Table.from_arrays([columns[name] for name in target.names], schema=target)


def _slices(
    contexts: pa.ChunkedArray, row: IntArray, start: IntArray, end: IntArray, found: npt.NDArray[np.bool_]
) -> list[str]:
    """context[start:end] of each entry, counted in code points."""
    texts = contexts.to_pylist()
    return [
        texts[at][begin:stop] if real else ""
        for at, begin, stop, real in zip(row.tolist(), start.tolist(), end.tolist(), found.tolist(), strict=True)
    ]


def _answer_starts(table: pa.Table) -> npt.NDArray[np.int64]:
    column = table.column(schema.ANSWER_START)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.if_else(pc.equal(column, ""), "-1", column).cast(pa.int64())
    return pc.fill_null(column.cast(pa.int64()), -1).to_numpy()


def _first_occurrence(table: pa.Table, *, with_labels: bool) -> IntArray:
    """For each row the first row that is identical to it in all that its answer (and loss) depends on."""
    names = [schema.CONTEXT, schema.QUESTION]
    if with_labels:
        names += [schema.ANSWER_TEXT, schema.ANSWER_START]
    group = np.zeros(table.num_rows, np.int64)
    for name in names:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks() if column.num_chunks else pa.array([], column.type)
        codes = column.dictionary_encode(null_encoding="encode").indices.to_numpy()
        pairs = group * (int(codes.max(initial=0)) + 1) + codes
        _, index, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        group = index[inverse]
    return group
