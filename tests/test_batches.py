"""Batches keep the budget, hold every window once, and depend on nothing but their arguments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa import batches
from ray_qa.batches import TrainingSampler, collate, rank_slice, split_by_tokens
from ray_qa.errors import OptionError

LENGTHS = st.lists(st.integers(1, 400), max_size=80).map(np.array)


@given(LENGTHS, st.integers(1, 2000))
def test_batches_keep_the_budget_and_hold_every_window_once(lengths, budget):
    lengths = lengths.astype(np.int32)
    parts = split_by_tokens(lengths, budget)
    assert sorted(np.concatenate([*parts, []]).astype(int).tolist()) == list(range(len(lengths)))
    longest = [int(lengths[part].max()) for part in parts]
    assert longest == sorted(longest, reverse=True)
    for part, size in zip(parts, longest, strict=True):
        assert len(part) == 1 or len(part) * size <= budget
    for part, size, following in zip(parts, longest, parts[1:], strict=False):
        assert (len(part) + 1) * size > budget, "the next window would have fitted"
        assert lengths[following].max() <= lengths[part].min()


def test_a_budget_below_one_is_refused():
    with pytest.raises(OptionError, match="tokens_per_batch is 0"):
        split_by_tokens(np.array([3]), 0)


@dataclass
class Layout:
    question_first: bool = True
    prefix_types: tuple[int, ...] = (5,)
    middle_types: tuple[int, ...] = (6, 7)
    suffix_types: tuple[int, ...] = (8,)
    first_type: int = 1
    second_type: int = 2
    token_type_ids: bool = True


@dataclass
class Arrays:
    input_ids: np.ndarray
    splits: np.ndarray
    question_length: np.ndarray
    context_length: np.ndarray
    start_position: np.ndarray | None = None
    end_position: np.ndarray | None = None


def arrays() -> Arrays:
    question, context = np.array([2, 1, 3], np.int32), np.array([3, 4, 1], np.int32)
    splits = np.concatenate([[0], np.cumsum(question + context + 4)])
    return Arrays(np.arange(100, 100 + splits[-1], dtype=np.int32), splits, question, context,
                  np.array([1, 2, 3], np.int32), np.array([4, 5, 6], np.int32))


def test_collate_pads_on_the_right_and_fills_in_types():
    batch = collate(arrays(), np.array([2, 0]), Layout(), 9, with_labels=True)
    assert batch["input_ids"].tolist() == [
        [118, 119, 120, 121, 122, 123, 124, 125, 9], [100, 101, 102, 103, 104, 105, 106, 107, 108],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8 + [0], [1] * 9]
    assert batch["token_type_ids"].tolist() == [[5, 1, 1, 1, 6, 7, 2, 8, 0], [5, 1, 1, 6, 7, 2, 2, 2, 8]]
    assert batch["start_positions"].tolist() == [3, 1] and batch["end_positions"].tolist() == [6, 4]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_collate_with_the_context_first_and_a_multiple():
    batch = collate(arrays(), np.array([0]), Layout(question_first=False), 9, pad_to_multiple=8)
    assert batch["token_type_ids"].tolist() == [[5, 1, 1, 1, 6, 7, 2, 2, 8, *[0] * 7]]
    assert "start_positions" not in batch
    assert "token_type_ids" not in collate(arrays(), np.array([0]), Layout(token_type_ids=False), 9)


def test_collate_of_nothing_and_without_labels():
    assert collate(arrays(), np.array([], int), Layout(), 0)["input_ids"].shape == (0, 0)
    plain = arrays()
    plain.start_position = None
    with pytest.raises(ValueError, match="without labels"):
        collate(plain, np.array([0]), Layout(), 0, with_labels=True)


@settings(deadline=None)
@given(LENGTHS.filter(len), st.integers(1, 9), st.integers(0, 3), st.sampled_from([4, 20, 1000]))
def test_every_window_exactly_once_per_epoch(lengths, batch_size, seed, together):
    original = batches.SHUFFLED_TOGETHER
    batches.SHUFFLED_TOGETHER = together
    try:
        sampler = TrainingSampler(lengths, batch_size=batch_size, seed=seed)
        assert sampler.steps_per_epoch == -(-len(lengths) // batch_size)
        for epoch in range(2):
            steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
            drawn = [sampler.batch(step) for step in steps]
            assert sorted(np.concatenate(drawn).tolist()) == list(range(len(lengths)))
            assert all(len(batch) == batch_size for batch in drawn[:-1]), "only the last batch may be smaller"
    finally:
        batches.SHUFFLED_TOGETHER = original


def test_a_step_is_a_pure_function_of_seed_and_step():
    lengths = np.random.default_rng(0).integers(20, 384, 1003)
    one, other = (TrainingSampler(lengths, batch_size=8, seed=3) for _ in range(2))
    forwards = [one.batch(step) for step in range(300)]
    for step in (299, 0, 126, 125, 7):  # another object, another order of asking, over the epochs' border
        assert np.array_equal(other.batch(step), forwards[step])
    assert not np.array_equal(forwards[0], forwards[one.steps_per_epoch]), "epochs differ"
    assert not np.array_equal(forwards[0], TrainingSampler(lengths, batch_size=8, seed=4).batch(0)), "seeds differ"


def test_batches_hold_windows_of_like_length_in_mixed_order():
    lengths = np.random.default_rng(0).integers(20, 384, 8000)
    sampler = TrainingSampler(lengths, batch_size=8, seed=0)
    drawn = [sampler.batch(step) for step in range(sampler.steps_per_epoch)]
    padded = sum(len(batch) * lengths[batch].max() for batch in drawn)
    assert padded < 1.05 * lengths.sum()
    longest = np.array([lengths[batch].max() for batch in drawn])
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.1


@given(LENGTHS.filter(len), st.integers(1, 7))
def test_ranks_share_a_batch_evenly(lengths, world_size):
    batch = np.random.default_rng(1).permutation(len(lengths))[: max(len(lengths) // 2, 1)]
    slices = [rank_slice(batch, rank, world_size, lengths) for rank in range(world_size)]
    assert sorted(np.concatenate(slices).tolist()) == sorted(batch.tolist())
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1
    totals = [int(lengths[part].sum()) for part in slices]
    assert max(totals) - min(totals) <= lengths[batch].max()


@pytest.mark.parametrize("arguments", [{"lengths": np.array([], int), "batch_size": 8},
                                       {"lengths": np.array([3]), "batch_size": 0}])
def test_samplers_of_nothing_are_refused(arguments):
    with pytest.raises(OptionError):
        TrainingSampler(**arguments, seed=0)
