"""Records that pages land in: what stays, what gives way, and what is found damaged."""

from __future__ import annotations

import pytest

from lmcache_sglang.hicache.landing import NOWHERE, Landing, Lease

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
    assert landing.damaged(lease.slots) == []
    landing.records[lease.slots[1], byte] ^= 16
    assert landing.damaged(lease.slots) == [lease.slots[1]]
    assert here(landing, ["a", "b"]) == [True, False]


def test_a_whole_record_of_another_page_is_damage() -> None:
    landing = Landing(2, SIZE)
    lease = land(landing, ["a", "b"])
    landing.records[lease.slots[0]] = landing.records[lease.slots[1]]
    assert landing.damaged(lease.slots) == [lease.slots[0]]
