"""Records that pages land in: what stays, what gives way, and what is found damaged."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from lmcache_sglang.hicache.landing import NOWHERE, Landing, Lease
from lmcache_sglang.kernels.pages import checksums

SIZE = 64


def key(page: str) -> bytes:
    return page.encode().ljust(48, b".")


def land(landing: Landing, pages: list[str], *, lost: str = "") -> Lease:
    """Bring pages, each full of its name's first letter, but for the `lost` one."""
    room = landing.take(len(pages))
    pages = pages[: len(room.slots)]
    for slot, page in zip(room.slots, pages, strict=True):
        landing.records[slot] = ord(page[0])
    return landing.came(room, pages, [key(page) for page in pages], [p != lost for p in pages])


def here(landing: Landing, pages: list[str], *, prefix: bool = False) -> list[bool]:
    lease = landing.hold(pages, prefix=prefix)
    landing.let_go(lease)
    return [bool(slot != NOWHERE) for slot in lease.slots]


def test_what_landed_is_found_and_what_was_lost_is_not() -> None:
    landing = Landing(4, SIZE)
    landing.let_go(land(landing, ["a", "b", "c"], lost="b"))
    assert here(landing, ["a", "b", "c", "d"]) == [True, False, True, False]
    assert here(landing, ["a", "b", "c"], prefix=True) == [True, False, False]
    assert landing.leased == 0


def test_what_nobody_asked_for_the_longest_gives_way() -> None:
    landing = Landing(3, SIZE)
    landing.let_go(land(landing, ["a", "b", "c"]))
    here(landing, ["a"])
    landing.let_go(land(landing, ["d"]))
    landing.let_go(land(landing, ["e"]))
    assert here(landing, ["a", "b", "c", "d", "e"]) == [True, False, False, True, True]


def test_of_a_prompt_the_end_gives_way_before_the_beginning() -> None:
    landing = Landing(4, SIZE)
    landing.let_go(land(landing, ["a", "b", "c", "d"]))
    landing.let_go(landing.hold(["a", "b", "c"], prefix=True))
    landing.take(2)
    assert here(landing, ["a", "b", "c", "d"]) == [True, True, False, False]


def test_records_whose_page_did_not_come_are_taken_before_others() -> None:
    landing = Landing(4, SIZE)
    landing.let_go(land(landing, ["a", "b"]))
    landing.let_go(land(landing, ["c", "d"], lost="c"))
    landing.let_go(land(landing, ["e"]))
    assert here(landing, ["a", "b", "d", "e"]) == [True, True, True, True]


def test_there_is_room_while_any_record_has_no_lease() -> None:
    landing = Landing(2, SIZE)
    lease = land(landing, ["a"])
    assert landing.room
    other = landing.take(1)
    assert not landing.room
    landing.let_go(other)
    assert landing.room
    landing.let_go(lease)


def test_the_room_is_counted_as_leases_come_and_go() -> None:
    rng, landing = random.Random(3), Landing(12, SIZE)
    held: list[Lease] = []
    for turn in range(400):
        pages = [f"{rng.randrange(9)}{number}" for number in range(rng.randrange(1, 5))]
        what = rng.random()
        if what < 0.3:
            missing = [page for page in pages if not here(landing, [page])[0]]
            held.append(land(landing, missing, lost=rng.choice(pages)))
        elif what < 0.6:
            held.append(landing.hold(pages, prefix=rng.random() < 0.5))
        elif what < 0.98 and held:
            landing.let_go(held.pop(rng.randrange(len(held))))
        elif what >= 0.98:
            landing.empty()
        assert landing.leased == np.count_nonzero(landing._leases), turn
        assert landing.room == 12 - landing.leased


def test_room_that_pages_could_not_be_checked_in_can_be_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    landing = Landing(2, SIZE)
    room = landing.take(2)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lmcache_sglang.hicache.landing.checksums", fail)
    with pytest.raises(MemoryError):
        landing.came(room, ["a", "b"], [key("a"), key("b")], [True, True])
    assert len(landing) == 0
    landing.let_go(room)
    assert landing.leased == 0


def test_what_is_leased_stays() -> None:
    landing = Landing(3, SIZE)
    landing.let_go(land(landing, ["a", "b", "c"]))
    held = landing.hold(["a", "c"], prefix=False)
    assert len(landing.take(3).slots) == 1
    assert len(landing.take(1).slots) == 0
    landing.let_go(held)
    assert len(landing.take(3).slots) == 2


def test_a_page_that_two_fetches_brought_is_there_once_and_goes_once() -> None:
    landing = Landing(4, SIZE)
    for _ in range(2):
        landing.let_go(land(landing, ["a"]))
    assert len(landing) == 1
    landing.let_go(landing.take(4))
    assert len(landing) == 0


def test_a_lease_from_before_it_was_emptied_means_nothing_after() -> None:
    landing = Landing(2, SIZE)
    old = land(landing, ["a"])
    room = landing.take(1)
    landing.empty()
    assert here(landing, ["a"]) == [False]
    landing.let_go(land(landing, ["b"]))
    now = landing.hold(["b"], prefix=True)
    landing.let_go(old)
    landing.let_go(landing.came(room, ["c"], [key("c")], [True]))
    assert here(landing, ["c"]) == [False]
    assert landing.leased == 1
    landing.let_go(now)


@pytest.mark.parametrize("byte", [0, SIZE - 1])
def test_a_changed_bit_is_found_and_its_page_is_forgotten(byte: int) -> None:
    landing = Landing(2, SIZE)
    lease = land(landing, ["a", "b"])
    assert landing.damaged(lease) == []
    landing.records[lease.slots[1], byte] ^= 16
    assert landing.damaged(lease) == [lease.slots[1]]
    assert here(landing, ["a", "b"]) == [True, False]


def test_a_whole_record_of_another_page_is_damage() -> None:
    landing = Landing(2, SIZE)
    lease = land(landing, ["a", "b"])
    landing.records[lease.slots[0]] = landing.records[lease.slots[1]]
    assert landing.damaged(lease) == [lease.slots[0]]


def test_a_whole_page_in_the_record_of_another_is_damage() -> None:
    """A landing that was emptied gives the record away, and what lands there fits its own checksum."""
    landing = Landing(1, SIZE)
    old = land(landing, ["a"])
    landing.empty()
    new = land(landing, ["b"])
    assert landing.damaged(old) == [0]
    assert landing.damaged(new) == []
    assert here(landing, ["b"]) == [True]


def test_nothing_of_a_lease_is_whole_after_the_landing_was_emptied() -> None:
    """Whoever emptied it did not mean these pages to be used, though nothing lies over them yet."""
    landing = Landing(2, SIZE)
    lease = land(landing, ["a", "b"])
    landing.empty()
    assert sorted(landing.damaged(lease)) == [0, 1]


def test_a_record_that_is_given_away_without_its_lease_is_damage() -> None:
    landing = Landing(1, SIZE)
    old = land(landing, ["a"])
    landing.let_go(old)
    new = land(landing, ["b"])
    assert landing.damaged(old) == [0]
    assert landing.damaged(new) == []


@pytest.mark.parametrize("emptied", [True, False])
def test_a_record_that_is_given_away_while_it_is_looked_at_is_damage(
    emptied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    landing = Landing(1, SIZE)
    lease = land(landing, ["a"])

    def give_away(keys: list[bytes], records: list[Any]) -> list[int]:
        sums = checksums(keys, records)
        monkeypatch.undo()
        if emptied:
            landing.empty()
        else:
            landing.let_go(lease)
        land(landing, ["b"])
        return sums

    monkeypatch.setattr("lmcache_sglang.hicache.landing.checksums", give_away)
    assert landing.damaged(lease) == [0]
    assert here(landing, ["b"]) == [True]
