"""What engines tell their agent, and that neither waits for the other."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.storage.peers.told import FILE, KEYS_MOST, Teller, Told
from lmcache_sglang.testing.tier_suite import some_keys


@pytest.fixture
def teller(tmp_path: Path) -> Iterator[Teller]:
    with closing(Teller(tmp_path)) as made:
        yield made


def test_keys_arrive_as_they_were_told(tmp_path: Path, teller: Teller) -> None:
    with closing(Told(tmp_path)) as told:
        teller.tell(some_keys(3))
        teller.tell(())
        assert told.take() == [some_keys(3), []]
        assert told.take() == []


def test_many_keys_take_several_datagrams(tmp_path: Path, teller: Teller) -> None:
    keys = some_keys(KEYS_MOST + 5)
    with closing(Told(tmp_path)) as told:
        teller.tell(keys)
        assert [len(part) for part in told.take()] == [KEYS_MOST, 5]


def test_without_an_agent_nothing_is_lost_but_the_word(tmp_path: Path, teller: Teller) -> None:
    teller.tell(some_keys(1))
    assert teller.untold == 1
    with closing(Told(tmp_path)) as told:
        teller.tell(some_keys(1))
        assert len(told.take()) == 1


def test_an_agent_that_does_not_listen_holds_nobody_up(tmp_path: Path, teller: Teller) -> None:
    with closing(Told(tmp_path)) as told:
        for _ in range(2000):
            teller.tell(some_keys(100))
        assert teller.untold > 0
        assert len(told.take()) + teller.untold == 2000


def test_another_agent_takes_the_place_of_one_that_was_killed(
    tmp_path: Path, teller: Teller
) -> None:
    first = Told(tmp_path)
    with closing(Told(tmp_path)) as second:
        teller.tell(some_keys(2))
        assert second.take() == [some_keys(2)]
        assert first.take() == []
    first.close()


def test_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    with closing(Told(folder)) as told, closing(Teller(folder)) as teller:
        teller.tell(some_keys(1))
        assert told.take() == [some_keys(1)]


def test_nobody_else_can_tell_it_anything(tmp_path: Path) -> None:
    with closing(Told(tmp_path)):
        assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
