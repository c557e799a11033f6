"""When a tier is left alone, and when it is tried again."""

from __future__ import annotations

import pytest

from lmcache_sglang.storage.breaker import FAILURES, FIRST_SECONDS, MOST_SECONDS, Breaker
from tests.storage.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        breaker.failed()


def test_a_few_failures_are_forgiven(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    assert breaker.allows()
    assert not breaker.resting


def test_a_success_in_between_begins_the_count_anew(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    breaker.succeeded()
    fail(breaker, FAILURES - 1)
    assert breaker.allows()


def test_failures_in_a_row_leave_the_tier_alone_for_a_while(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_SECONDS - 0.01
    assert breaker.resting
    assert not breaker.allows()


def test_after_the_pause_one_caller_is_let_through(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += FIRST_SECONDS
    assert not breaker.resting  # asking this lets nobody through
    assert [breaker.allows() for _ in range(3)] == [True, False, False]


def test_a_caller_that_never_answers_does_not_keep_the_others_out_for_ever(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    clock.now += FIRST_SECONDS
    assert breaker.allows()
    clock.now += MOST_SECONDS
    assert breaker.allows()


def test_each_further_failure_doubles_the_pause_up_to_a_most(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker)
    pauses = []
    for _ in range(8):
        before = clock.now
        while not breaker.allows():
            clock.now += 0.5
        pauses.append(clock.now - before)
        breaker.failed()
    assert pauses == [1, 2, 4, 8, 16, MOST_SECONDS, MOST_SECONDS, MOST_SECONDS]


def test_a_success_makes_all_good_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 10)
    clock.now += MOST_SECONDS
    assert breaker.allows()
    breaker.succeeded()
    assert [breaker.allows() for _ in range(3)] == [True] * 3
    fail(breaker)
    clock.now += FIRST_SECONDS  # the first pause is short again
    assert breaker.allows()
