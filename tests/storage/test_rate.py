"""What is done a second: by the work, not by the clock on the wall, and recent work before old."""

from __future__ import annotations

import pytest

from lmcache_sglang.storage.rate import HALF_LIFE_SECONDS, Rate


def test_nothing_seen_takes_no_time() -> None:
    assert Rate().seconds_of(100) == 0.0
    assert Rate().seen == 0.0


def test_amounts_add_up_over_the_time_they_took() -> None:
    rate = Rate()
    rate.add(100, 0.1)
    rate.add(300, 0.1)
    assert rate.seconds_of(2000) == pytest.approx(1.0, rel=0.01)
    assert rate.seen == 400


def test_what_is_recent_counts_more() -> None:
    rate = Rate()
    rate.add(100 * HALF_LIFE_SECONDS, HALF_LIFE_SECONDS)
    rate.add(10 * HALF_LIFE_SECONDS, HALF_LIFE_SECONDS)
    assert rate.seconds_of(100) == pytest.approx(100 * 1.5 / 60, rel=0.01)


@pytest.mark.parametrize(("amount", "seconds"), [(0, 1.0), (1, 0.0), (-1, 1.0), (1, -1.0)])
def test_what_took_no_time_or_moved_nothing_says_nothing(amount: float, seconds: float) -> None:
    rate = Rate()
    rate.add(amount, seconds)
    assert rate.seen == 0.0
