"""Which peer is asked for which page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sglang.storage.peers.choosing import Estimate, choose, deal

MIB = 1 << 20
QUICK = Estimate(latency=0.001, load=0, rate=1e9)


def test_pages_that_nobody_has_are_asked_of_nobody() -> None:
    assert choose([0, 1, 0], [MIB] * 3, {0: QUICK}) == {0: [1]}
    assert choose([2], [MIB], {0: QUICK}) == {}


def test_a_page_is_asked_only_of_who_has_it() -> None:
    assert choose([1, 2, 1], [MIB] * 3, {0: QUICK, 1: QUICK}) == {0: [0, 2], 1: [1]}


def test_a_small_read_comes_from_who_answers_sooner() -> None:
    slow = Estimate(latency=0.1, load=0, rate=1e9)
    assert choose([3] * 8, [MIB] * 8, {0: slow, 1: QUICK}) == {1: list(range(8))}


def test_a_large_read_comes_from_several_at_once() -> None:
    slow = Estimate(latency=0.1, load=0, rate=1e9)
    shares = choose([3] * 400, [MIB] * 400, {0: slow, 1: QUICK})
    assert sorted(shares[0] + shares[1]) == list(range(400))
    done = {n: e.latency + len(shares[n]) * MIB / e.rate for n, e in ((0, slow), (1, QUICK))}
    assert done[0] == pytest.approx(done[1], abs=0.003)


def test_who_has_much_to_send_to_others_is_asked_for_less() -> None:
    busy = Estimate(latency=0.001, load=100 * MIB, rate=1e9)
    shares = choose([3] * 200, [MIB] * 200, {0: busy, 1: QUICK})
    assert len(shares[1]) - len(shares[0]) == pytest.approx(100, abs=2)


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 10 * MIB)), max_size=60),
    st.lists(st.floats(1e-5, 1.0), min_size=3, max_size=3),
)
def test_no_page_is_asked_for_twice_or_of_somebody_else(
    pages: list[tuple[int, int]], latencies: list[float]
) -> None:
    peers = {n: Estimate(latency, 0, 1e9) for n, latency in enumerate(latencies)}
    chosen = choose([mask for mask, _ in pages], [size for _, size in pages], peers)
    asked = sorted(page for share in chosen.values() for page in share)
    assert asked == [page for page, (mask, _) in enumerate(pages) if mask]
    for number, share in chosen.items():
        assert share == sorted(share)
        assert all(pages[page][0] >> number & 1 for page in share)


@given(
    st.lists(st.integers(1, 10 * MIB), min_size=1, max_size=50),
    st.integers(1, 8),
    st.integers(1, 20 * MIB),
)
def test_a_share_is_dealt_out_whole_and_in_order(
    sizes: list[int], streams: int, least: int
) -> None:
    dealt = deal(range(len(sizes)), sizes, streams, least)
    assert [page for share in dealt for page in share] == list(range(len(sizes)))
    assert 1 <= len(dealt) <= streams
    assert len(dealt) == 1 or sum(sizes) >= len(dealt) * least


def test_connections_get_about_equally_much() -> None:
    assert [len(share) for share in deal(range(64), [MIB] * 64, 4, MIB)] == [16] * 4


def test_a_small_read_takes_one_connection() -> None:
    assert deal([0, 1], [4096, 4096], 4, MIB) == [[0, 1]]
