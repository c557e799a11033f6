"""When a peer is asked, how much at once, and when it is left alone."""

from __future__ import annotations

import logging
from random import Random

import pytest

from lmcache_sglang.storage.peers.backoff import MOST_SECONDS
from lmcache_sglang.storage.peers.health import EMPTY, FIRST_WINDOW, QUARANTINE_SECONDS, Health

MOST = 64 << 20


@pytest.fixture
def health() -> Health:
    return Health("node-b", MOST, Random(1))


def serve(
    health: Health, size: int = 8 << 20, first: float = 0.001, seconds: float = 0.009
) -> None:
    health.begin()
    health.served(size, first, seconds)


def fail(health: Health, now: float) -> None:
    health.begin()
    health.failed(now)


def test_a_new_peer_is_asked_for_little_and_then_for_more(health: Health) -> None:
    windows = []
    for _ in range(7):
        windows.append(health.window)
        serve(health)
    assert windows == [FIRST_WINDOW << n for n in range(6)] + [MOST]


def test_an_answer_without_pages_warms_nothing(health: Health) -> None:
    serve(health, size=0)
    assert health.window == FIRST_WINDOW


def test_a_peer_that_failed_rests_and_is_cold_again(health: Health) -> None:
    serve(health)
    fail(health, now=100.0)
    assert not health.usable(100.0)
    assert health.usable(101.0)
    assert health.window == FIRST_WINDOW


def test_who_never_has_what_it_told_of_is_left_alone_longer_and_longer(health: Health) -> None:
    now, rests = 100.0, []
    for _ in range(EMPTY + 4):
        health.begin()
        health.had_nothing(now)
        began = now
        while not health.usable(now):
            now += 0.05
        rests.append(now - began)
    assert rests[: EMPTY - 1] == [0.0] * (EMPTY - 1)
    assert rests[EMPTY - 1] > 0
    assert rests[-1] > 4 * rests[EMPTY - 1]


def test_a_page_in_between_begins_that_count_anew_too(health: Health) -> None:
    for _ in range(3):
        for _ in range(EMPTY - 1):
            health.begin()
            health.had_nothing(100.0)
        serve(health)
    assert health.usable(100.0)


def test_after_its_rest_one_read_tries_it(health: Health) -> None:
    fail(health, now=100.0)
    health.begin()
    assert not health.usable(200.0), "a second read would wait for it as well"
    health.served(10, 0.1, 0.2)
    assert health.usable(200.0)


def test_each_failure_makes_the_rest_longer(health: Health) -> None:
    now, rests = 0.0, []
    for _ in range(10):
        fail(health, now)
        rest = next(t / 100 for t in range(100_000) if health.usable(now + t / 100))
        rests.append(rest)
        now += rest
    assert rests[0] < 1.0 < rests[3]
    assert max(rests) <= MOST_SECONDS


def test_two_peers_that_failed_together_are_not_tried_together() -> None:
    random = Random(1)
    pair = [Health(name, MOST, random) for name in "ab"]
    for health in pair:
        fail(health, now=0.0)
    at = [next(t for t in range(1000) if health.usable(t / 1000)) for health in pair]
    assert at[0] != at[1]


def test_wrong_bytes_once_are_a_failure_and_twice_a_reason_not_to_ask_again(
    health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    health.begin()
    health.lied(now=0.0)
    assert health.usable(1.0)
    with caplog.at_level(logging.ERROR):
        health.begin()
        health.lied(now=1.0)
    assert not health.usable(QUARANTINE_SECONDS)
    assert health.usable(QUARANTINE_SECONDS + 1.0)
    assert "node-b sent wrong bytes" in caplog.text


def test_right_bytes_in_between_begin_the_count_anew(health: Health) -> None:
    for now in (0.0, 100.0):
        health.begin()
        health.lied(now)
        serve(health)
    assert health.usable(200.0)


def test_what_it_delivers_is_measured(health: Health) -> None:
    for _ in range(20):
        serve(health, size=100_000_000, first=0.01, seconds=0.06)
    assert health.latency == pytest.approx(0.01)
    assert health.rate == pytest.approx(2e9, rel=0.01)


def test_a_peer_that_started_anew_is_cold_and_what_it_did_still_counts(health: Health) -> None:
    serve(health)
    health.begin()
    health.lied(now=0.0)
    health.is_cold()
    assert health.window == FIRST_WINDOW
    health.begin()
    health.lied(now=1.0)
    assert not health.usable(QUARANTINE_SECONDS)


def test_another_limit_of_the_window_holds_at_once(health: Health) -> None:
    for _ in range(8):
        serve(health)
    health.set_most(4 << 20)
    assert health.window == 4 << 20
    serve(health)
    assert health.window == 4 << 20
