"""Windows become padded batches.

Two ways to choose which windows share a batch:

* `split_by_tokens` for prediction and evaluation: sorted by length, as many windows as fit a budget of
  padded tokens, so that little of the work is spent on padding;
* `TrainingSampler` for training: the windows of global step t, a pure function of (seed, epoch, step), so
  that a run can stop anywhere and go on with another number of workers. `rank_slice` is one worker's share.

`collate` makes the arrays of one batch. Padding is always on the right: masked tokens at the end disturb no
known model, left or right.

Knows nothing of tokenizers, models or answers: windows are arrays of token ids and lengths, and their layout
comes from a template (see `Template`).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ray_qa.errors import OptionError

IntArray = npt.NDArray[np.integer[Any]]

#: Windows that are shuffled as a whole; larger sets are shuffled in groups of this size.
SHUFFLED_TOGETHER = 2**22
_BATCHES_SORTED_TOGETHER = 50


class Template(Protocol):
    """Layout of a window: ``prefix first middle second suffix`` (see windows.PairTemplate)."""

    @property
    def question_first(self) -> bool: ...
    @property
    def prefix_types(self) -> tuple[int, ...]: ...
    @property
    def middle_types(self) -> tuple[int, ...]: ...
    @property
    def suffix_types(self) -> tuple[int, ...]: ...
    @property
    def first_type(self) -> int: ...
    @property
    def second_type(self) -> int: ...
    @property
    def token_type_ids(self) -> bool: ...


class WindowArrays(Protocol):
    """The columns of windows that a batch is made of (see windows.Windows)."""

    @property
    def input_ids(self) -> IntArray: ...
    @property
    def splits(self) -> IntArray: ...
    @property
    def question_length(self) -> IntArray: ...
    @property
    def context_length(self) -> IntArray: ...
    @property
    def start_position(self) -> IntArray | None: ...
    @property
    def end_position(self) -> IntArray | None: ...


def split_by_tokens(lengths: IntArray, tokens_per_batch: int) -> list[IntArray]:
    """Indices of windows, cut into batches whose padded size stays within the budget.

    The longest windows come first (if memory runs out, it does so at once); equal lengths keep their order.
    A window longer than ``tokens_per_batch`` is a batch of its own.
    """
    if tokens_per_batch < 1:
        raise OptionError(f"tokens_per_batch is {tokens_per_batch}; allowed: a whole number of at least 1")
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches: list[IntArray] = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = start + max(tokens_per_batch // longest, 1)
        batches.append(order[start:stop])
        start = stop
    return batches


def padded_width(longest: int, pad_to_multiple: int, at_most: int | None = None) -> int:
    """Tokens of each row of a batch whose longest window has ``longest``: the next multiple, but never more than
    ``at_most`` (what the model takes) for the sake of padding."""
    width = -(-longest // pad_to_multiple) * pad_to_multiple
    return width if at_most is None else max(longest, min(width, at_most))


def collate(
    windows: WindowArrays,
    indices: IntArray,
    template: Template,
    pad_token_id: int,
    *,
    with_labels: bool = False,
    pad_to_multiple: int = 1,
    at_most: int | None = None,
) -> dict[str, npt.NDArray[np.int64]]:
    """The arrays of one batch, int64: [windows, `padded_width`], labels [windows].

    Keys: input_ids, attention_mask; token_type_ids where the tokenizer emits them; start_positions and
    end_positions with ``with_labels``. Row i of every array is window ``indices[i]``.
    """
    indices = np.asarray(indices, dtype=np.int64)
    begin = windows.splits[indices]
    lengths = windows.splits[indices + 1] - begin
    width = padded_width(int(lengths.max(initial=0)), pad_to_multiple, at_most)
    column = np.arange(width)
    real = column < lengths[:, None]
    source = np.where(real, begin[:, None] + column, 0)
    input_ids = np.full(real.shape, pad_token_id, np.int64)
    np.copyto(input_ids, windows.input_ids[source] if len(windows.input_ids) else 0, where=real)
    batch = {"input_ids": input_ids, "attention_mask": real.astype(np.int64)}
    if template.token_type_ids:
        question, context = windows.question_length[indices], windows.context_length[indices]
        first, second = (question, context) if template.question_first else (context, question)
        batch["token_type_ids"] = _token_types(column, real, first, second, template)
    if with_labels:
        if windows.start_position is None or windows.end_position is None:
            raise ValueError("these windows were made without labels")
        batch["start_positions"] = windows.start_position[indices].astype(np.int64)
        batch["end_positions"] = windows.end_position[indices].astype(np.int64)
    return batch


def _token_types(
    column: IntArray, real: npt.NDArray[np.bool_], first: IntArray, second: IntArray, template: Template
) -> npt.NDArray[np.int64]:
    """Token types of a batch, from the lengths of the two texts of each window; padding has type 0."""
    types = np.zeros(real.shape, np.int64)
    rows = np.arange(len(real))
    prefix = len(template.prefix_types)
    middle = prefix + first
    begin_second = middle + len(template.middle_types)
    end_second = begin_second + second
    types[(column >= prefix) & (column < middle[:, None])] = template.first_type
    types[(column >= begin_second[:, None]) & (column < end_second[:, None])] = template.second_type
    for start, special in (
        (np.zeros_like(middle), template.prefix_types),
        (middle, template.middle_types),
        (end_second, template.suffix_types),
    ):
        for index, type_id in enumerate(special):
            types[rows, start + index] = type_id
    return types


class TrainingSampler:
    """Which windows make up each global step of training.

    In every epoch each window is used exactly once; the last batch of an epoch may be smaller. The windows are
    shuffled (all together up to `SHUFFLED_TOGETHER`, else group by group, the groups in random order), 50
    batches at a time are sorted by length so that batches hold windows of like length, and the order of the
    batches is shuffled again.

    ``lengths`` (tokens per window) may be memory-mapped: only one group of it is read at a time.
    """

    def __init__(self, lengths: IntArray, *, batch_size: int, seed: int) -> None:
        if len(lengths) == 0:
            raise OptionError("there is no window to train on")
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}; allowed: a whole number of at least 1")
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self.num_windows = len(lengths)
        self.steps_per_epoch = -(-self.num_windows // batch_size)
        # Groups hold whole batches; the group with the remainder comes last, so that only the last batch
        # of an epoch is partial.
        self._steps_per_group = max(SHUFFLED_TOGETHER // batch_size, 1)
        self._num_groups = -(-self.steps_per_epoch // self._steps_per_group)
        self._cached: tuple[tuple[int, int], list[IntArray]] | None = None

    def batch(self, step: int) -> IntArray:
        """Indices of the windows of global step ``step``, which counts on over the epochs from 0."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        place, step_of_group = divmod(step_of_epoch, self._steps_per_group)
        if self._cached is None or self._cached[0] != (epoch, place):
            self._cached = ((epoch, place), self._batches(epoch, place))
        return self._cached[1][step_of_group]

    def _batches(self, epoch: int, place: int) -> list[IntArray]:
        """The batches of the group that comes ``place``-th in this epoch."""
        order = np.random.default_rng((self._seed, epoch)).permutation(self._num_groups - 1)
        group = int(order[place]) if place < self._num_groups - 1 else place
        size = self._steps_per_group * self._batch_size
        start, stop = group * size, min((group + 1) * size, self.num_windows)
        random = np.random.default_rng((self._seed, epoch, 1 + group))
        lengths = np.asarray(self._lengths[start:stop])
        shuffled = random.permutation(stop - start)
        together = self._batch_size * _BATCHES_SORTED_TOGETHER
        for begin in range(0, len(shuffled), together):
            block = shuffled[begin : begin + together]
            shuffled[begin : begin + together] = block[np.argsort(-lengths[block], kind="stable")]
        batches = [
            start + shuffled[begin : begin + self._batch_size] for begin in range(0, len(shuffled), self._batch_size)
        ]
        # A partial batch stays last.
        movable = len(batches) - (len(batches[-1]) < self._batch_size)
        return [batches[index] for index in random.permutation(movable)] + batches[movable:]


def rank_slice(batch: IntArray, rank: int, world_size: int, lengths: IntArray) -> IntArray:
    """The part of a global batch that worker ``rank`` of ``world_size`` computes.

    ``lengths`` are those of all windows (indexed by ``batch``). The windows are dealt by falling length, back
    and forth over the ranks, so that counts differ by at most one and tokens are spread evenly. With fewer
    windows than ranks some ranks get none.
    """
    batch = np.asarray(batch)
    order = np.argsort(-np.asarray(lengths[batch]).astype(np.int64), kind="stable")
    lap, place = np.divmod(np.arange(len(batch)), world_size)
    owner = np.where(lap % 2 == 0, place, world_size - 1 - place)
    return batch[order[owner == rank]]
