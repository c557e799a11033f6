"""A rate holds, over any time that is longer than a burst."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_sglang.storage.peers.bucket import BURST_SECONDS, Bucket


def test_without_a_rate_nothing_waits() -> None:
    bucket = Bucket(0, 0.0)
    bucket.take(1 << 40)
    assert bucket.wait(0.0) == 0.0


def test_what_was_taken_beyond_the_burst_is_waited_for() -> None:
    bucket = Bucket(1000, 0.0)
    assert bucket.wait(0.0) == 0.0
    bucket.take(1050)
    assert bucket.wait(0.0) == 1.0
    assert bucket.wait(0.5) == 0.5
    assert bucket.wait(1.0) == 0.0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_the_rate_holds(sizes: list[int]) -> None:
    bucket, now, taken = Bucket(1000, 0.0), 0.0, 0
    for size in sizes:
        now += bucket.wait(now)
        assert taken <= 1000 * (now + BURST_SECONDS) + 1e-3
        bucket.take(size)
        taken += size
