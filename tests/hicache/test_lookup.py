"""What a lookup asks the store for: no more than an answer can use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmcache_sglang.hicache.lookup import Wanted, look_up

DISK = SimpleNamespace(name="disk")
OWN, PIECES = b"own-", (b"left-", b"right-")
STATE, STATE_PIECES = b"state-", (b"state-left-", b"state-right-")


class Store:
    """A chain that has some keys, and notes which it is asked for."""

    def __init__(self, *has: bytes) -> None:
        self.tiers = [DISK]
        self._has = set(has)
        self.asked: list[list[bytes]] = []

    def holders(self, keys: list[bytes]) -> list[Any]:
        self.asked.append(keys)
        return [DISK if key in self._has else None for key in keys]


def standing(namespace: bytes, pieces: tuple[bytes, ...]) -> Any:
    """A pool whose pages another topology stored in these pieces."""
    cover = [SimpleNamespace(namespace=piece) for piece in pieces]
    return SimpleNamespace(namespace=namespace, tiling=SimpleNamespace(covers=[cover]))


def pages(count: int) -> list[bytes]:
    return [b"%02d" % number for number in range(count)]


def here(store: Store, *wanted: Wanted) -> list[list[bool]]:
    found, _ = look_up(cast("Any", store), wanted)
    return [each.here for each in found]


def keys_of(namespace: bytes, numbers: range) -> list[bytes]:
    return [namespace + b"%02d" % number for number in numbers]


def test_beside_the_kv_pieces_are_looked_for_up_to_its_end_only() -> None:
    kv, state = standing(OWN, PIECES), standing(STATE, STATE_PIECES)
    store = Store(
        *keys_of(OWN, range(2)),
        *(key for piece in PIECES for key in keys_of(piece, range(2, 3))),
        *(key for piece in STATE_PIECES for key in keys_of(piece, range(6))),
    )
    found = here(store, Wanted(kv, pages(6)), Wanted(state, pages(6)))
    assert found == [[True] * 3 + [False] * 3, [True] * 3 + [False] * 3]
    own, of_kv, of_state = store.asked
    assert own == keys_of(OWN, range(6)) + keys_of(STATE, range(6))
    assert of_kv == [key for piece in PIECES for key in keys_of(piece, range(2, 6))]
    assert of_state == [key for piece in STATE_PIECES for key in keys_of(piece, range(3))]


@pytest.mark.parametrize("stored", [True, False])
def test_pages_with_keys_of_their_own_are_looked_for_whatever_the_kv_has(stored: bool) -> None:
    kv, groups = standing(OWN, PIECES), standing(STATE, STATE_PIECES)
    pieces = [key for piece in STATE_PIECES for key in keys_of(piece, range(4))]
    store = Store(*pieces) if stored else Store()
    found = here(store, Wanted(kv, pages(2)), Wanted(groups, pages(4), beside_kv=False))
    assert found == [[False] * 2, [stored] * 4]
    assert store.asked[-1] == pieces


def test_beside_a_pool_without_pages_of_its_own_everything_is_looked_for() -> None:
    """As beside DeepSeek V4's, which gives out indices only."""
    state = standing(STATE, STATE_PIECES)
    store = Store(*(key for piece in STATE_PIECES for key in keys_of(piece, range(3))))
    assert here(store, Wanted(None, pages(3)), Wanted(state, pages(3))) == [[], [True] * 3]
