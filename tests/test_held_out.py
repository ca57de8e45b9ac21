"""Rows held out for evaluation: whole contexts, the asked share of them, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from ray_qa.errors import InputError
from ray_qa.held_out import context_keys, is_held_out, limit_of

CONTEXTS = [f"context {i // 3}" for i in range(3000)]


@pytest.mark.parametrize(("ratio", "count"), [(0.1, 100), (0.5, 500), (0.0001, 1), (0.9999, 999)])
def test_the_asked_share_of_contexts_is_held_out_with_all_rows(ratio: float, count: int) -> None:
    limit = limit_of(np.unique(context_keys(CONTEXTS, 42)), ratio)
    away = is_held_out(CONTEXTS, 42, limit)
    assert away.sum() == 3 * count
    held_out = {context for context, gone in zip(CONTEXTS, away, strict=True) if gone}
    assert not held_out & {context for context, gone in zip(CONTEXTS, away, strict=True) if not gone}
    # One row alone, in another process, is told the same.
    assert all(is_held_out([context], 42, limit)[0] for context in sorted(held_out)[:5])


def test_the_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    def chosen(seed: int, contexts: list[str]) -> set[str]:
        limit = limit_of(np.unique(context_keys(contexts, seed)), 0.2)
        flags = is_held_out(contexts, seed, limit)
        return {context for context, away in zip(contexts, flags, strict=True) if away}

    assert chosen(1, CONTEXTS) == chosen(1, CONTEXTS[::-1]) != chosen(2, CONTEXTS)


def test_one_context_cannot_be_split() -> None:
    with pytest.raises(InputError, match="1 different contexts"):
        limit_of(np.unique(context_keys(["the same"] * 9, 0)), 0.5)
    two = ["a", "b", "b"]
    assert 0 < is_held_out(two, 0, limit_of(np.unique(context_keys(two, 0)), 0.99)).sum() < 3
