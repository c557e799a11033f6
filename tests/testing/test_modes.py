"""The combinations of modes that engine tests run."""

from __future__ import annotations

from collections import Counter

import pytest

from lmcache_sglang.testing.modes import MODES

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
