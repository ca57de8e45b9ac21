"""Right answers of rows that repeat: against a plain dictionary, and whatever bytes the keys hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_qa.golds import add_shared, repeated, row_keys, select_repeated, shared_golds, short_keys

TEXTS = st.sampled_from(["a", "ab", "b", "", "東京"])
ROWS = st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from(["Ann", "Bob", "the Ann", ""])), max_size=40)


def share(rows: list[tuple[str, str, str]], cut: int) -> list[list[str]]:
    """Two parts of rows (context, question, answer), through all steps."""
    parts = [rows[:cut], rows[cut:]]
    keys = [row_keys([row[0] for row in part], [row[1] for row in part]) for part in parts]
    wanted = repeated(short_keys(found) for found in keys)
    pairs = [
        (found.tobytes()[16 * i : 16 * i + 16], [part[i][2]])
        for part, found in zip(parts, keys, strict=True) for i in select_repeated(found, wanted)
    ]
    table = shared_golds(pairs)
    return [
        golds for part, found in zip(parts, keys, strict=True)
        for golds in add_shared([[row[2]] for row in part], found, table)
    ]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 40))
def test_rows_share_what_all_their_rows_have(rows: list[tuple[str, str, str]], cut: int) -> None:
    gathered: dict[tuple[str, str], dict[str, None]] = {}
    for context, question, answer in rows:
        gathered.setdefault((context, question), {})[answer] = None
    expected = []
    for context, question, answer in rows:
        answers = [text for text in dict.fromkeys([answer, *gathered[context, question]]) if text]
        expected.append(answers or [""])
    assert share(rows, cut) == expected


def test_keys_tell_where_the_context_ends() -> None:
    keys = row_keys(["ab", "a", "ab"], ["c", "bc", "c"])
    assert keys[0] == keys[2] and keys[0] != keys[1]


def test_keys_that_end_in_zeros_are_found() -> None:
    raw = [bytes([7] * 14 + [0, 0]), bytes([7] * 14 + [0, 1]), bytes(16), bytes([255] * 16)]
    table = shared_golds((key, [key.hex(), "shared"]) for key in raw)
    found = add_shared([["own"]] * 5, np.array([*raw, bytes([8] * 16)], "S16"), table)
    assert found == [*(["own", key.hex(), "shared"] for key in raw), ["own"]]


@pytest.mark.parametrize("size", [0, 1])
def test_nothing_repeats(size: int) -> None:
    keys = row_keys(["a"] * size, ["b"] * size)
    assert len(repeated([short_keys(keys)])) == 0 and len(repeated([])) == 0
    assert add_shared([["x"]] * size, keys, shared_golds([])) == [["x"]] * size
