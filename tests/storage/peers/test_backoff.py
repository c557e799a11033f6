"""When a peer is tried again."""

from __future__ import annotations

from random import Random

from lmcache_sglang.storage.peers.backoff import FIRST_SECONDS, MOST_SECONDS, Backoff


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(Random(0))
    longest = FIRST_SECONDS
    for _ in range(12):
        assert longest / 2 <= backoff.pause() <= longest
        longest = min(MOST_SECONDS, 2 * longest)


def test_a_success_begins_with_the_first_pause_again() -> None:
    backoff = Backoff(Random(0))
    for _ in range(5):
        backoff.pause()
    backoff.succeeded()
    assert backoff.pause() <= FIRST_SECONDS


def test_a_try_for_a_reason_is_soon_and_not_counted() -> None:
    backoff = Backoff(Random(0))
    assert all(0 <= backoff.soon() <= FIRST_SECONDS for _ in range(20))
    assert backoff.pause() <= FIRST_SECONDS


def test_no_two_wait_equally_long() -> None:
    """Sixty-three that lost the same peer at once."""
    pauses = sorted(Backoff(Random(seed)).pause() for seed in range(63))
    assert pauses[-1] - pauses[0] > FIRST_SECONDS / 4
    assert len(set(pauses)) == 63
