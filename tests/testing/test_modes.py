"""The combinations of modes that engine tests run, and the table of two backends."""

from __future__ import annotations

from collections import Counter

import pytest

from lmcache_sglang.testing.compare_backends import row
from lmcache_sglang.testing.engine import Answer
from lmcache_sglang.testing.modes import MODES, Run

VALUES = {
    "memory": {"cache", "buffer_only"},
    "write": {"write_through", "write_through_selective", "write_back"},
    "prefetch": {"best_effort", "wait_complete", "timeout"},
    "layout": {"page_first", "page_first_direct", "page_head"},
    "overlap": {True, False},
    "page_size": {1, 16, 64},
    "ranks": {1, 2},
}


@pytest.mark.parametrize("flag", VALUES)
def test_each_value_is_in_two_combinations_at_least(flag: str) -> None:
    times = Counter(getattr(mode, flag) for mode in MODES)
    assert set(times) == VALUES[flag]
    assert min(times.values()) >= 2


def test_each_combination_has_a_name_of_its_own() -> None:
    assert len({str(mode) for mode in MODES}) == len(MODES)


def answer(tokens: list[int], storage: int) -> Answer:
    return Answer(tokens, 0, 0, storage, None)


def test_a_row_says_what_came_back_and_whether_the_tokens_are_the_same() -> None:
    cold = {"first": answer([1], 0), "once": answer([2], 0)}
    right = Run(cold, {"first": answer([1], 384), "once": answer([2], 384)}, {}, "")
    wrong = Run(cold, {"first": answer([1], 384), "once": answer([3], 0)}, {}, "")
    assert row(MODES[1], right, right).endswith("| 768 | 768 | 768 | yes |")
    assert row(MODES[1], wrong, right).endswith("| 768 | 384 | 768 | **no** |")
