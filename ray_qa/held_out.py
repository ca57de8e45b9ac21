"""Rows held out of a training to evaluate it on: whole contexts, chosen by a hash of their text.

A context that stands in both halves would be known to the model that is evaluated on it, so all rows of a context go
the same way. Which way depends on the text, the seed and the ratio alone: any worker can tell, from one number.

Knows nothing of files, models, or how contexts are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ray_qa.errors import InputError

Keys = npt.NDArray[np.uint64]
#: Keys run to here, so that they and the limit fit everywhere.
_KEY_BITS = 63


def context_keys(contexts: Sequence[str], seed: int) -> Keys:
    """A number for each context; equal texts have equal ones. uint64[len(contexts)]."""
    known: dict[str, int] = {}
    for context in contexts:
        if context not in known:
            known[context] = xxhash.xxh3_64_intdigest(context.encode(), seed=seed % 2**64) >> (64 - _KEY_BITS)
    return np.array([known[context] for context in contexts], np.uint64)


def limit_of(distinct_keys: Keys, ratio: float) -> int:
    """Contexts whose key lies below this number are held out: ``ratio`` of them, at least one, never all.

    Raises:
        InputError: there are fewer than two contexts.
    """
    keys = np.sort(distinct_keys)
    if len(keys) < 2:
        raise InputError(
            f"eval_ratio is {ratio:g} and the input has {len(keys)} different contexts; rows of one context must not "
            "be on both sides, so at least 2 are needed; allowed: more contexts, or rows of their own to evaluate on"
        )
    count = min(max(round(ratio * len(keys)), 1), len(keys) - 1)
    return int(keys[count])


def is_held_out(contexts: Sequence[str], seed: int, limit: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: bool[len(contexts)]."""
    found: npt.NDArray[Any] = context_keys(contexts, seed) < np.uint64(limit)
    return found
