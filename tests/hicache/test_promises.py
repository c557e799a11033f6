"""Promises to requests and the fetches behind them, over SGLang-less pools and a tier in memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.fetching import Fetch, Fetching
from lmcache_sglang.hicache.landing import Landing
from lmcache_sglang.hicache.promises import FORGET_SECONDS, Patience, Promises
from lmcache_sglang.hicache.tiling import NOTHING
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import Lookup
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.testing.faulty_tier import FaultyTier

SIZE = 32
SECONDS = 10.0
PAGES = [hashlib.sha256(bytes([page])).hexdigest() for page in range(12)]
NAMES = {"kv": b"k" * 16, "swa": b"s" * 16}


class Bench:
    """Promises, fetching and a tier, with a clock that stands still."""

    def __init__(
        self,
        *,
        room: int = 16,
        windowed: bool = False,
        patience: Patience | None = None,
        alone: bool = True,
    ) -> None:
        self.tier = FaultyTier(MemoryTier(1 << 20))
        self.chain = Chain(self.tier)
        self.now = 0.0
        self.hangs = False
        self.names = ["kv", "swa"] if windowed else ["kv"]
        self.landings = {name: Landing(room, SIZE) for name in self.names}
        self.pools = {name: self._pool(name) for name in self.names}
        self.fetched: list[Fetch] = []
        self.fetching = Fetching(
            self.chain,
            {name: (self.pools[name], self.landings[name]) for name in self.names},
            frozenset(self.names[1:]),
            None,
            lambda: None,
            lambda: None,
            alone=alone,
        )
        self.promises = Promises(
            self.landings,
            self.names[1:],
            self._fetch,
            patience or Patience("wait_complete"),
            alone=alone,
            hangs=lambda: self.hangs,
            clock=lambda: self.now,
        )

    def _pool(self, name: str) -> Any:
        standing = SimpleNamespace(namespace=NAMES[name], tiling=NOTHING)
        return SimpleNamespace(name=name, standing=standing, namespace=NAMES[name], page_bytes=SIZE)

    def _fetch(self, fetch: Fetch) -> None:
        self.fetched.append(fetch)
        self.fetching.submit(fetch)

    def store(self, pages: range, pool: str = "kv") -> None:
        keys = [NAMES[pool] + bytes.fromhex(PAGES[page]) for page in pages]
        memory = [bytes([page]) * SIZE for page in pages]
        assert all(self.chain.put(keys, PageSegments.of_buffers(memory)))

    def ask(self, rid: str = "r", pages: int = len(PAGES), window: int = 2) -> list[int]:
        return self.promises.look_up(rid, PAGES[:pages], {"swa": window})

    def settle(self) -> None:
        assert all(fetch.wait(SECONDS) for fetch in self.fetched)

    @property
    def leased(self) -> int:
        return sum(landing.leased for landing in self.landings.values())


@pytest.fixture
def made() -> Iterator[list[Bench]]:
    benches: list[Bench] = []
    yield benches
    for bench in benches:
        bench.fetching.close()
        bench.chain.close()


def bench(made: list[Bench], **settings: Any) -> Bench:
    made.append(Bench(**settings))
    return made[-1]


def test_a_lookup_promises_what_the_fetch_before_it_brought(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(7))
    assert test.ask() == []
    test.settle()
    assert test.promises.is_ready("r")
    assert test.ask() == [7]
    lease = test.landings["kv"].hold(PAGES[:7], prefix=True)
    landed = test.landings["kv"].records[torch.from_numpy(lease.slots)]
    assert landed.tolist() == [[page] * SIZE for page in range(7)]


def test_ranks_that_must_agree_are_told_every_prefix(made: list[Bench]) -> None:
    test = bench(made, alone=False)
    test.store(range(3))
    test.ask()
    test.settle()
    assert test.ask() == [1, 2, 3]


def test_a_window_that_is_whole_in_places_makes_the_prefixes_sparse(made: list[Bench]) -> None:
    test = bench(made, windowed=True, alone=False)
    test.store(range(10))
    test.store(range(2, 4), "swa")
    test.store(range(7, 9), "swa")
    test.ask()
    test.settle()
    assert test.ask() == [4, 9]


def test_the_windows_of_an_end_that_no_rank_need_agree_to_are_not_read(made: list[Bench]) -> None:
    test = bench(made, windowed=True)
    test.store(range(10))
    test.store(range(10), "swa")
    test.ask()
    test.settle()
    assert test.ask() == [10]
    assert len(test.landings["swa"]) == 2


def test_the_same_pages_are_asked_of_the_tiers_once(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(7))
    for _ in range(5):
        test.ask()
        test.settle()
    test.ask(pages=9)
    assert len(test.fetched) == 1
    test.promises.look_up("r", [PAGES[11], *PAGES[:3]], {})  # what was never asked for
    test.settle()
    assert len(test.fetched) == 1  # it was among the pages of the first
    test.promises.look_up("r", ["ff" * 32], {})
    assert len(test.fetched) == 2


def test_a_prefix_longer_than_the_landing_comes_as_far_as_there_is_room(made: list[Bench]) -> None:
    test = bench(made, room=4)
    test.store(range(9))
    test.ask()
    test.settle()
    assert test.ask() == [4]


def test_what_one_request_was_promised_no_other_drives_out(made: list[Bench]) -> None:
    test = bench(made, room=8)
    test.store(range(12))
    test.ask("first", pages=6)
    test.settle()
    assert test.ask("first", pages=6) == [6]
    test.ask("second")
    test.settle()
    assert test.ask("second") == [8]
    assert test.ask("first", pages=6) == [6]


def test_when_all_requests_have_ended_nothing_is_leased(made: list[Bench]) -> None:
    test = bench(made, windowed=True)
    test.store(range(10))
    test.store(range(10), "swa")
    for rid in "abc":
        test.ask(rid)
    test.settle()
    for rid in "abc":
        test.ask(rid)
    assert test.leased > 0
    test.promises.end("a")
    test.promises.end("a")
    test.promises.end("never seen")
    assert test.leased > 0
    test.promises.end_all()
    assert test.leased == 0


def test_a_request_that_nobody_asks_for_any_more_is_forgotten(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(5))
    for rid in ("old", "new"):
        test.ask(rid)
    test.settle()
    test.now = FORGET_SECONDS + 1
    test.ask("new")
    test.promises.expire()
    assert len(test.promises) == 1
    test.promises.end("new")
    assert test.leased == 0


def test_a_tier_that_fails_is_a_miss_and_ends_the_wait(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(5))
    test.tier.refusing = {"get"}
    test.ask()
    test.settle()
    assert test.promises.is_ready("r")
    assert test.ask() == []


def test_a_page_that_a_tier_finds_damaged_ends_the_prefix(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(5))
    test.tier.reads = Lookup.CORRUPT
    test.ask()
    test.settle()
    assert test.ask() == []


def test_pages_of_weights_that_were_replaced_during_the_read_do_not_land(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(5))
    test.pools["kv"].namespace = b"n" * 16
    test.ask()
    test.settle()
    assert test.ask() == []


@pytest.mark.parametrize(
    ("policy", "waits"), [("best_effort", 0.0), ("timeout", 2.5), ("wait_complete", None)]
)
def test_a_request_waits_as_its_policy_has_it_from_when_it_is_first_held_up(
    policy: str, waits: float | None, made: list[Bench]
) -> None:
    """Of a fetch that does not end, of 5 pages."""
    test = bench(made, patience=Patience(policy, base=2.0, per_page=0.1))
    test.promises._fetch = test.fetched.append
    test.now = 100.0
    test.ask(pages=5)
    test.now = 200.0
    assert test.promises.is_ready("r") == (waits == 0.0)
    test.now += (waits or 1000.0) - 0.01
    assert test.promises.is_ready("r") == (waits == 0.0)
    test.now += 0.02
    assert test.promises.is_ready("r") == (waits is not None)
    assert test.fetched[0].cancel.is_set() == (waits is not None)


def test_a_request_with_few_pages_is_not_looked_up(made: list[Bench]) -> None:
    test = bench(made, patience=Patience(least_pages=4))
    test.store(range(5))
    test.ask(pages=3)
    assert test.fetched == []
    assert test.promises.is_ready("r")


def test_behind_a_call_that_hangs_nobody_waits(made: list[Bench]) -> None:
    test = bench(made)
    test.promises._fetch = test.fetched.append
    test.ask("before")
    assert not test.promises.is_ready("before")
    test.hangs = True
    assert test.promises.is_ready("before")
    assert test.fetched[0].cancel.is_set()
    test.ask("after")
    assert len(test.fetched) == 1
    assert test.promises.is_ready("after")


def test_requests_that_come_and_go_while_pages_land_leave_no_lease(made: list[Bench]) -> None:
    """Two threads ask and end, in less room than they want; what is promised is always what was stored."""
    test = bench(made, room=5)
    test.store(range(12))

    def serve(number: int) -> int:
        promised = 0
        for turn in range(60):
            rid, pages = f"{number} {turn}", 3 + (turn + number) % 9
            test.ask(rid, pages=pages)
            while not test.promises.is_ready(rid):
                time.sleep(0)
            for there in test.ask(rid, pages=pages):
                lease = test.landings["kv"].hold(PAGES[:there], prefix=True)
                landed = test.landings["kv"].records[torch.from_numpy(lease.slots)]
                assert landed.tolist() == [[page] * SIZE for page in range(there)]
                test.landings["kv"].let_go(lease)
                promised += there
            test.promises.end(rid)
        return promised

    with ThreadPoolExecutor(2) as threads:
        assert all(list(threads.map(serve, range(2))))
    test.settle()
    assert test.leased == 0
