"""Which pages of peers are kept here."""

from __future__ import annotations

import pytest

from lmcache_sglang.storage.peers import keeping
from lmcache_sglang.storage.peers.keeping import Keeping
from lmcache_sglang.testing.tier_suite import some_keys


def test_always_and_never() -> None:
    keys = some_keys(3)
    assert Keeping("always").wanted(keys) == [True] * 3
    assert Keeping("never").wanted(keys) == [False] * 3


def test_second_hit_keeps_what_comes_again() -> None:
    a, b, c = some_keys(3)
    policy = Keeping("second-hit")
    assert policy.wanted([a, b]) == [False, False]
    assert policy.wanted([b, c]) == [True, False]
    assert policy.wanted([b]) == [False], "it is kept by now, and gone if it comes once more"


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "REMEMBERED", 4)
    keys = some_keys(5)
    policy = Keeping("second-hit")
    policy.wanted(keys)
    assert policy.wanted(keys[4:]) == [True]
    assert policy.wanted(keys[:1]) == [False], "it was the first to be forgotten"
