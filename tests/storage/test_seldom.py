"""What is said once a minute."""

from __future__ import annotations

from lmcache_sglang.storage.seldom import EVERY_SECONDS, Seldom
from tests.storage.clock import Clock


def test_each_kind_is_due_at_once_and_then_again_when_its_time_is_over() -> None:
    clock = Clock()
    seldom = Seldom(clock)
    assert [seldom.due("one"), seldom.due("one"), seldom.due("other")] == [True, False, True]
    clock.now += EVERY_SECONDS / 2
    assert not seldom.due("one")  # which puts nothing off
    clock.now += EVERY_SECONDS / 2
    assert seldom.due("one")
    assert not seldom.due("one")
