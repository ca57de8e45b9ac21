"""Rows become overlapping token windows.

A model reads a few hundred tokens at a time. A *window* is one such reading: special tokens, the whole
question, and a stretch of the context; neighbouring windows of one row share ``doc_stride`` context
tokens, so that an answer cut by one window is whole in the next:

    question_first   [CLS] question [SEP] context tokens 0..k   [SEP]
                     [CLS] question [SEP] context tokens k-s..m [SEP]

Every distinct context and question is tokenized once per call, alone and without special tokens; the
windows are then assembled with NumPy from the token ids. What the tokenizer puts around and between
two texts is learned once from a probe pair (`PairTemplate`). Afterwards segments, token types and masks
follow from three lengths per window, without a tokenizer.

Knows nothing of files, batches, models or answers; the tokenizer is passed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_qa.errors import ModelError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IntArray = npt.NDArray[np.integer[Any]]

#: One window; ``input_ids`` without padding, the other columns count tokens. Labels are null when absent.
WINDOWS = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("input_ids", pa.large_list(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("question_length", pa.int32(), nullable=False),
        pa.field("context_length", pa.int32(), nullable=False),
        pa.field("context_offset", pa.int32(), nullable=False),
        pa.field("start_position", pa.int32()),
        pa.field("end_position", pa.int32()),
    ]
)

_ERRORS_KEY = b"ray_qa.window_errors"
# Encodings take some hundred bytes per token: only so many characters are held encoded at a time.
_CHARACTERS_PER_CALL = 2_000_000
_PROBES = (("Who is it?", "It is me, of course."), ("When and where was it?", "It was long ago."))


@dataclass(frozen=True)
class PairTemplate:
    """What a tokenizer puts around a question and a context: ``prefix first middle second suffix``.

    ``first`` is the question when ``question_first``, else the context. ``*_types`` are the token types
    of the special tokens, ``first_type`` and ``second_type`` those of the two texts.
    """

    question_first: bool
    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    prefix_types: tuple[int, ...]
    middle_types: tuple[int, ...]
    suffix_types: tuple[int, ...]
    first_type: int
    second_type: int
    cls_position: int | None
    """Where the CLS token stands; negative counts from the end of the window; None: there is no CLS."""
    bos_position: int
    """Where windows without an answer point when there is no CLS: the BOS token, else 0."""
    token_type_ids: bool
    """Whether the tokenizer emits token types for its model."""
    pad_token_id: int

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def context_start(self, question_length: IntArray) -> IntArray:
        """Position of the first context token in each window."""
        if self.question_first:
            return len(self.prefix) + question_length + len(self.middle)
        return np.full_like(question_length, len(self.prefix))

    def question_start(self, context_length: IntArray) -> IntArray:
        """Position of the first question token in each window."""
        if self.question_first:
            return np.full_like(context_length, len(self.prefix))
        return len(self.prefix) + context_length + len(self.middle)

    def null_position(self, lengths: IntArray) -> IntArray:
        """Position in each window (of ``lengths`` tokens) that stands for "no answer here"."""
        position = self.bos_position if self.cls_position is None else self.cls_position
        return np.full_like(lengths, position) if position >= 0 else lengths + position

    @classmethod
    def probe(cls, tokenizer: PreTrainedTokenizerFast, *, question_first: bool) -> PairTemplate:
        """Learn the template from one pair and check it on another.

        Raises:
            ModelError: the tokenizer is not a fast one, or joins two texts in a way that is not
                ``prefix first middle second suffix`` with fixed special tokens.
        """
        name = type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"tokenizer {name} is not a fast one (no tokenizer.json can be made of it); windows need a fast "
                "tokenizer: convert it, or choose a model that has one"
            )
        templates = {_probed(tokenizer, *pair, question_first=question_first) for pair in _PROBES}
        if len(templates) > 1:
            raise ModelError(
                f"tokenizer {name} puts different special tokens around different pairs of texts; "
                "ray_qa needs the same ones around every question and context"
            )
        return templates.pop()


@dataclass(frozen=True)
class Windows:
    """Windows of many rows in columns: in row order, and by position within a row.

    All arrays but ``input_ids`` have one entry per window. ``input_ids`` holds all windows end to end;
    window i is ``input_ids[splits[i]:splits[i + 1]]``. ``context_offset`` is the index of the window's first
    context token among all tokens of its context. ``errors`` says for a row without windows why.
    """

    row: IntArray
    input_ids: IntArray
    splits: IntArray
    question_length: IntArray
    context_length: IntArray
    context_offset: IntArray
    start_position: IntArray | None = None
    end_position: IntArray | None = None
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def num_windows(self) -> int:
        return len(self.row)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each window, int32."""
        return np.diff(self.splits).astype(np.int32)

    def select(self, indices: IntArray) -> Windows:
        """The windows at ``indices``, in that order; ``errors`` are kept."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.splits[indices + 1] - self.splits[indices]
        labelled = self.start_position is not None and self.end_position is not None
        return Windows(
            row=self.row[indices],
            input_ids=self.input_ids[_ranges(self.splits[indices], lengths)],
            splits=_splits(lengths),
            question_length=self.question_length[indices],
            context_length=self.context_length[indices],
            context_offset=self.context_offset[indices],
            start_position=self.start_position[indices] if labelled else None,  # type: ignore[index]
            end_position=self.end_position[indices] if labelled else None,  # type: ignore[index]
            errors=self.errors,
        )

    def to_table(self) -> pa.Table:
        """As a table of schema `WINDOWS`; errors travel in the schema's metadata."""
        columns: list[pa.Array] = []
        for name in WINDOWS.names:
            if name == "input_ids":
                offsets = pa.array(self.splits.astype(np.int64, copy=False))
                ids = pa.array(self.input_ids.astype(np.int32, copy=False))
                columns.append(pa.LargeListArray.from_arrays(offsets, ids).cast(WINDOWS.field(name).type))
            elif (values := getattr(self, name)) is None:
                columns.append(pa.nulls(self.num_windows, pa.int32()))
            else:
                columns.append(pa.array(values.astype(np.int32, copy=False)))
        metadata = {_ERRORS_KEY: json.dumps(list(self.errors.items()))} if self.errors else None
        return pa.Table.from_arrays(columns, schema=WINDOWS.with_metadata(metadata))

    @classmethod
    def from_table(cls, table: pa.Table) -> Windows:
        """The windows of a table of schema `WINDOWS`; views its memory where it is in one piece."""
        column = table.column("input_ids")
        # combine_chunks would copy even a single chunk.
        ids = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(
            column.chunks or [pa.array([], column.type)]
        )
        splits = ids.offsets.to_numpy(zero_copy_only=False)
        # The offsets of a sliced array do not begin at 0, and its values hold the other rows too.
        first = int(splits[0]) if len(splits) else 0
        flat = ids.values.to_numpy(zero_copy_only=True)[first : int(splits[-1]) if len(splits) else 0]

        def numbers(name: str) -> IntArray | None:
            return None if table.column(name).null_count else required(name)

        def required(name: str) -> IntArray:
            return table.column(name).to_numpy()

        metadata = table.schema.metadata or {}
        start, end = numbers("start_position"), numbers("end_position")
        return cls(
            row=required("row"),
            input_ids=flat,
            splits=splits - first if len(splits) else np.zeros(1, np.int64),
            question_length=required("question_length"),
            context_length=required("context_length"),
            context_offset=required("context_offset"),
            start_position=start,
            end_position=end,
            errors=dict(json.loads(metadata[_ERRORS_KEY])) if _ERRORS_KEY in metadata else {},
        )

    def for_rows(self, rows: IntArray) -> Windows:
        """The same windows when entry i of the lists they were made from is really row ``rows[i]``."""
        rows = np.asarray(rows)
        return replace(
            self,
            row=rows[self.row].astype(np.int32),
            errors={int(rows[row]): why for row, why in self.errors.items()},
        )


class WindowMaker:
    """Cuts pairs of context and question into windows with one tokenizer and one set of lengths.

    Attributes:
        template: the tokenizer's `PairTemplate`, enough to read windows without a tokenizer.
        max_seq_length: tokens of a window at most, special tokens included.
        doc_stride: context tokens shared by neighbouring windows of a row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_seq_length: int = 384,
        doc_stride: int | None = None,
        pair_order: str = "question_first",
        model_max_length: int | None = None,
    ) -> None:
        """``model_max_length`` is what the model takes (None: what its tokenizer says).

        Tokenizers that pad on the left expect the context first (XLNet); ``pair_order`` says
        "question_first" for the order that prediction normally uses, whichever that is.

        Raises:
            OptionError: ``doc_stride`` leaves no progress from one window to the next.
            ModelError: the tokenizer cannot be used (see `PairTemplate.probe`).
        """
        limits = [max_seq_length, int(tokenizer.model_max_length)]
        if model_max_length is not None:
            limits.append(model_max_length)
        self.tokenizer = tokenizer
        self.max_seq_length = min(limits)
        self.doc_stride = min(self.max_seq_length // 2, 128) if doc_stride is None else doc_stride
        question_first = pair_order == "question_first" and tokenizer.padding_side == "right"
        self.template = PairTemplate.probe(tokenizer, question_first=question_first)
        room = self.max_seq_length - self.template.num_special
        if self.doc_stride >= room:
            raise OptionError(
                f"doc_stride is {self.doc_stride}: neighbouring windows would share everything; allowed: less than "
                f"{room} (max_seq_length {self.max_seq_length} without {self.template.num_special} special tokens)"
            )

    def make(
        self,
        contexts: Sequence[str],
        questions: Sequence[str],
        *,
        answer_starts: Sequence[int] | IntArray | None = None,
        answer_texts: Sequence[str] | None = None,
    ) -> Windows:
        """Windows of all rows; a row that cannot have any is named in ``errors`` with the reason.

        ``answer_starts`` (characters, -1 for no answer) and ``answer_texts`` add labels: the positions of the
        answer's first and last token, or of CLS twice where a window does not hold the whole answer.
        """
        num_rows = len(contexts)
        if len(questions) != num_rows:
            raise ValueError(f"{num_rows} contexts but {len(questions)} questions")
        labelled = answer_starts is not None and answer_texts is not None
        context_of, distinct_contexts = _distinct(contexts)
        question_of, distinct_questions = _distinct(questions)

        answer_first = np.full(num_rows, -1, np.int64)
        answer_last = np.full(num_rows, -1, np.int64)
        context_ids, context_lengths, bad_contexts = self._tokenized(distinct_contexts) if not labelled else (
            self._tokenized(
                distinct_contexts,
                _Answers(context_of, answer_starts, answer_texts, answer_first, answer_last),  # type: ignore[arg-type]
            )
        )
        question_ids, question_lengths, bad_questions = self._tokenized(distinct_questions)

        template = self.template
        context_length = context_lengths[context_of]
        question_length = question_lengths[question_of]
        room = self.max_seq_length - template.num_special - question_length
        errors = self._errors(room, question_length, context_length, bad_contexts[context_of],
                              bad_questions[question_of])
        fine = np.ones(num_rows, np.bool_)
        fine[list(errors)] = False

        # How many windows each row needs, and where in its context each of them begins.
        stride = np.where(room > self.doc_stride, self.doc_stride, np.maximum(room, 1) // 2)
        step = np.maximum(room - stride, 1)
        excess = np.maximum(context_length - room, 0)
        num_windows = np.where(fine, 1 + -(-excess // step), 0)
        row = np.repeat(np.arange(num_rows), num_windows)
        position = _ranges(np.zeros(num_rows, np.int64), num_windows)
        context_offset = position * step[row]
        window_context_length = np.minimum(context_length[row] - context_offset, room[row])
        window_question_length = question_length[row]

        lengths = template.num_special + window_question_length + window_context_length
        splits = _splits(lengths)
        input_ids = np.empty(int(splits[-1]), np.int32)
        base = splits[:-1]
        first_length = window_question_length if template.question_first else window_context_length
        for index, token in enumerate(template.prefix):
            input_ids[base + index] = token
        for index, token in enumerate(template.middle):
            input_ids[base + len(template.prefix) + first_length + index] = token
        for index, token in enumerate(template.suffix):
            input_ids[splits[1:] - len(template.suffix) + index] = token
        context_at = base + template.context_start(window_question_length)
        question_at = base + template.question_start(window_context_length)
        context_from = _splits(context_lengths)[context_of[row]] + context_offset
        question_from = _splits(question_lengths)[question_of[row]]
        input_ids[_ranges(context_at, window_context_length)] = context_ids[
            _ranges(context_from, window_context_length)
        ]
        input_ids[_ranges(question_at, window_question_length)] = question_ids[
            _ranges(question_from, window_question_length)
        ]

        start_position = end_position = None
        if labelled:
            first, last = answer_first[row] - context_offset, answer_last[row] - context_offset
            whole = (answer_first[row] >= 0) & (first >= 0) & (last < window_context_length)
            null = template.null_position(lengths)
            at = template.context_start(window_question_length)
            start_position = np.where(whole, at + first, null).astype(np.int32)
            end_position = np.where(whole, at + last, null).astype(np.int32)
        return Windows(
            row=row.astype(np.int32),
            input_ids=input_ids,
            splits=splits,
            question_length=window_question_length.astype(np.int32),
            context_length=window_context_length.astype(np.int32),
            context_offset=context_offset.astype(np.int32),
            start_position=start_position,
            end_position=end_position,
            errors=errors,
        )

    def encode(self, texts: Sequence[str]) -> Iterator[Any]:
        """One ``tokenizers.Encoding`` (with offsets and words) per text, without special tokens."""
        backend = self.tokenizer.backend_tokenizer
        # Tokenizer files may switch truncation and padding on by themselves; the wrapper sets both anew
        # in each of its own calls, so switching them off here changes nothing for others.
        backend.no_truncation()
        backend.no_padding()
        for start, stop in _chunks(texts):
            yield from backend.encode_batch(list(texts[start:stop]), add_special_tokens=False)

    def _tokenized(
        self, texts: Sequence[str], answers: _Answers | None = None
    ) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_]]:
        """Token ids of all texts end to end, tokens per text, and which texts are not valid Unicode."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encode_batch = backend.encode_batch if answers is not None else backend.encode_batch_fast
        invalid = np.zeros(len(texts), np.bool_)
        pieces: list[IntArray] = []
        lengths = np.zeros(len(texts), np.int64)
        for start, stop in _chunks(texts):
            batch = list(texts[start:stop])
            try:
                encodings = encode_batch(batch, add_special_tokens=False)
            except (UnicodeEncodeError, TypeError):
                for index, text in enumerate(batch):
                    if not _is_unicode(text):
                        batch[index] = ""
                        invalid[start + index] = True
                encodings = encode_batch(batch, add_special_tokens=False)
            counts = np.fromiter((len(encoding) for encoding in encodings), np.int64, count=len(encodings))
            lengths[start:stop] = counts
            ids = chain.from_iterable(encoding.ids for encoding in encodings)
            pieces.append(np.fromiter(ids, np.int32, count=int(counts.sum())))
            if answers is not None:
                for index, encoding in enumerate(encodings):
                    answers.locate(start + index, encoding)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int32), lengths, invalid

    def _errors(
        self, room: IntArray, question_length: IntArray, context_length: IntArray,
        bad_context: npt.NDArray[np.bool_], bad_question: npt.NDArray[np.bool_],
    ) -> dict[int, str]:
        errors: dict[int, str] = {}
        for row in np.flatnonzero((room < 1) | (context_length < 1) | bad_context | bad_question).tolist():
            if bad_context[row] or bad_question[row]:
                column = "context" if bad_context[row] else "question"
                errors[row] = f"{column} holds a lone surrogate, which is not valid Unicode"
            elif context_length[row] < 1:
                errors[row] = "context holds nothing that the tokenizer makes a token of"
            else:
                errors[row] = (
                    f"question has {question_length[row]} tokens; with {self.template.num_special} special tokens it "
                    f"leaves no room for context in a window of {self.max_seq_length} tokens; allowed: at most "
                    f"{self.max_seq_length - self.template.num_special - 1} tokens"
                )
        return errors


class _Answers:
    """Finds the tokens of the answers of all rows that ask about one context."""

    def __init__(
        self, context_of: IntArray, starts: Sequence[int] | IntArray, texts: Sequence[str], first: IntArray,
        last: IntArray,
    ) -> None:
        self.starts, self.texts, self.first, self.last = starts, texts, first, last
        self.rows = np.argsort(context_of, kind="stable")
        self.bounds = np.searchsorted(context_of[self.rows], np.arange(context_of.max(initial=-1) + 2))

    def locate(self, context: int, encoding: Any) -> None:
        for row in self.rows[self.bounds[context] : self.bounds[context + 1]].tolist():
            start, text = int(self.starts[row]), self.texts[row]
            if start < 0 or not text:
                continue
            end = start + len(text)
            # A character may belong to no token (white space, or one that the tokenizer drops).
            found = (encoding.char_to_token(at) for at in range(start, end))
            first = next((token for token in found if token is not None), None)
            found = (encoding.char_to_token(at) for at in range(end - 1, start - 1, -1))
            last = next((token for token in found if token is not None), None)
            if first is not None and last is not None:
                self.first[row], self.last[row] = first, max(first, last)


def _probed(tokenizer: Any, question: str, context: str, *, question_first: bool) -> PairTemplate:
    """The template that explains one encoded pair; ModelError when none does."""
    name = type(tokenizer).__name__
    first, second = (question, context) if question_first else (context, question)
    pair = tokenizer(first, second, return_token_type_ids=True, verbose=False)
    ids, types, owner = pair["input_ids"], pair["token_type_ids"], pair.sequence_ids(0)
    at = {text: [index for index, who in enumerate(owner) if who == text] for text in (0, 1)}
    alone = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (first, second)]
    for which in (0, 1):
        own = at[which]
        if not own or own != list(range(own[0], own[-1] + 1)) or [ids[i] for i in own] != alone[which]:
            raise ModelError(
                f"tokenizer {name} encodes a text in a pair otherwise than alone (or mixes the two); ray_qa "
                "needs `special tokens, first text, special tokens, second text, special tokens`"
            )
        if len({types[i] for i in own}) > 1:
            raise ModelError(f"tokenizer {name} gives one text of a pair several token types; ray_qa needs one")
    begin, middle_begin, middle_end, end = at[0][0], at[0][-1] + 1, at[1][0], at[1][-1] + 1
    if middle_end < middle_begin:
        raise ModelError(f"tokenizer {name} puts the second text before the first; ray_qa needs them in order")

    def special(token: int | None) -> int | None:
        """Position of a special token in the prefix, or from the end in the suffix."""
        if token is not None and token in ids[:begin]:
            return ids.index(token)
        if token is not None and token in ids[end:]:
            return ids[end:].index(token) - len(ids[end:])
        return None

    pad = tokenizer.pad_token_id
    return PairTemplate(
        question_first=question_first,
        prefix=tuple(ids[:begin]),
        middle=tuple(ids[middle_begin:middle_end]),
        suffix=tuple(ids[end:]),
        prefix_types=tuple(types[:begin]),
        middle_types=tuple(types[middle_begin:middle_end]),
        suffix_types=tuple(types[end:]),
        first_type=types[begin],
        second_type=types[middle_end],
        cls_position=special(tokenizer.cls_token_id),
        bos_position=special(tokenizer.bos_token_id) or 0,
        token_type_ids="token_type_ids" in tokenizer.model_input_names,
        # Padding is masked, so any id will do where a tokenizer has no padding token.
        pad_token_id=0 if pad is None else pad,
    )


def _distinct(texts: Sequence[str]) -> tuple[IntArray, list[str]]:
    """For each text the number of its distinct value, and these values in order of appearance."""
    codes: dict[str, int] = {}
    of = np.fromiter((codes.setdefault(text, len(codes)) for text in texts), np.int64, count=len(texts))
    return of, list(codes)


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of texts of bounded size together (one text at least)."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > _CHARACTERS_PER_CALL:
            yield start, index
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _splits(lengths: IntArray) -> IntArray:
    """[0, lengths[0], lengths[0] + lengths[1], ...], int64."""
    splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])`` without the loop."""
    splits = _splits(lengths)
    return np.repeat(starts - splits[:-1], lengths) + np.arange(splits[-1])
