"""Promises to requests and the fetches behind them, over SGLang-less pools and a tier in memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache import fetching, promises
from lmcache_sglang.hicache.fetching import Fetch, Fetching
from lmcache_sglang.hicache.landing import Landing
from lmcache_sglang.hicache.lookup import look_up
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
NAMES = {"kv": b"k" * 16, "swa": b"s" * 16, "c4": b"c" * 16}


class Bench:
    """Promises, fetching and a tier, with a clock that stands still."""

    def __init__(
        self,
        *,
        room: int = 16,
        windowed: bool = False,
        patience: Patience | None = None,
        alone: bool = True,
        names: list[str] | None = None,
        recompute: Any = None,
    ) -> None:
        self.tier = FaultyTier(MemoryTier(1 << 20))
        self.chain = Chain(self.tier)
        self.now = 0.0
        self.hangs = False
        self.look_around: Callable[[], None] = lambda: None
        self.tidy: Callable[[], None] = lambda: None
        self.names = names or (["kv", "swa"] if windowed else ["kv"])
        windows = [name for name in self.names if name == "swa"]
        self.landings = {name: Landing(room, SIZE) for name in self.names}
        self.pools = {name: self._pool(name) for name in self.names}
        self.fetched: list[Fetch] = []
        self.fetching = Fetching(
            self.chain,
            {name: (self.pools[name], self.landings[name]) for name in self.names},
            frozenset(windows),
            recompute,
            lambda: self.look_around(),
            lambda: self.tidy(),
            alone=alone,
        )
        self.promises = Promises(
            self.landings,
            windows,
            self._fetch,
            patience or Patience("wait_complete"),
            alone=alone,
            hangs=lambda: self.hangs or self.fetching.hangs(),
            clock=lambda: self.now,
        )

    def _pool(self, name: str) -> Any:
        standing = SimpleNamespace(namespace=NAMES[name], tiling=NOTHING)
        identity = SimpleNamespace(page_size=16)
        return SimpleNamespace(
            name=name,
            standing=standing,
            namespace=NAMES[name],
            page_bytes=SIZE,
            identity=identity,
        )

    def _fetch(self, fetch: Fetch) -> None:
        self.fetched.append(fetch)
        self.fetching.submit(fetch)

    def store(self, pages: range, pool: str = "kv", names: Sequence[str] = PAGES) -> None:
        keys = [NAMES[pool] + bytes.fromhex(names[page]) for page in pages]
        memory = [bytes([page]) * SIZE for page in pages]
        assert all(self.chain.put(keys, PageSegments.of_buffers(memory)))

    def ask(
        self, rid: str = "r", pages: int = len(PAGES), window: int = 2, *, first: int = 0
    ) -> list[int]:
        """Look up the pages from the `first` on, which the device lacks."""
        return self.promises.look_up(rid, PAGES[first:pages], {"swa": window})

    def turn(self, rid: str) -> bool:
        """Whether a request goes on when its turn comes, with no other rank to agree with."""
        is_ready = self.promises.is_ready(rid)
        if is_ready:
            self.promises.goes_on(rid)
        else:
            self.promises.held_up(rid)
        return is_ready

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
    assert test.turn("r")
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


def test_of_many_prefixes_ranks_are_told_few(made: list[Bench]) -> None:
    """SGLang sets an element of a tensor for each."""
    test = bench(made, room=250, alone=False)
    pages = [hashlib.sha256(f"one of many: {page}".encode()).hexdigest() for page in range(250)]
    test.store(range(250), names=pages)
    test.promises.look_up("r", pages, {})
    test.settle()
    told = test.promises.look_up("r", pages, {})
    assert told == sorted(told)
    assert told[-16:] == list(range(235, 251))
    assert len(told) < 50


def test_of_windows_far_from_the_end_nothing_is_leased(made: list[Bench]) -> None:
    """One rank needs only the last."""
    test = bench(made, windowed=True)
    test.store(range(12))
    for pages in (4, 12):
        test.store(range(pages - 2, pages), "swa")
        test.ask(str(pages), pages=pages)
        test.settle()
    test.promises.end_all()
    test.promises._fetch = test.fetched.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmcache_sglang.hicache.promises.BACK", 2)
        assert test.ask() == [12]
    assert test.landings["swa"].leased == 2
    assert len(test.landings["swa"]) == 4


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


def test_a_fetch_that_another_replaces_leaves_no_lease(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(12))
    test.ask(first=8)  # the device had the first pages
    test.settle()
    test.ask()  # and lost them
    test.settle()
    assert len(test.fetched) == 2
    assert test.ask() == [12]
    test.promises.end("r")
    assert test.leased == 0


def test_what_the_replaced_fetch_brought_stays_until_the_next_has_come(made: list[Bench]) -> None:
    test = bench(made, room=8)
    test.store(range(8))
    test.ask(pages=8, first=4)
    test.settle()
    test.promises._fetch = test.fetched.append
    test.ask(pages=8)
    assert len(test.landings["kv"].take(8).slots) == 4


def test_what_a_request_holds_that_nobody_asks_for_any_more_is_let_go(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(12))
    for rid, first in (("old", 0), ("new", 9)):
        test.ask(rid, first=first)
        test.settle()
        test.ask(rid, first=first)
    test.now = FORGET_SECONDS + 1
    test.ask("new", first=9)
    assert test.leased == 12
    test.promises.expire()
    assert test.leased == 3
    test.now += FORGET_SECONDS + 1
    test.promises.expire()
    assert test.leased == 0


def test_the_oldest_of_too_many_requests_is_given_up(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their number, which is the same on all ranks."""
    monkeypatch.setattr(promises, "MOST_REQUESTS", 2)
    test = bench(made)
    test.store(range(12))
    for rid, first in (("old", 0), ("second", 6), ("third", 9)):
        test.ask(rid, first=first)
        test.settle()
    assert len(test.promises) == 2
    assert test.leased == 6


@pytest.mark.parametrize("had_landed", [True, False])
def test_a_request_that_comes_back_after_a_long_time_gets_what_it_asked_for(
    had_landed: bool, made: list[Bench]
) -> None:
    """Its pages gave way meanwhile. Twice, as a queue may be long."""
    test = bench(made)
    test.store(range(12))
    if had_landed:
        test.ask("before")
        test.settle()
    test.ask()
    test.settle()
    assert test.ask() == [12]
    for _ in range(2):
        test.promises.end("before")
        test.now += FORGET_SECONDS + 1
        test.promises.expire()
        test.landings["kv"].let_go(test.landings["kv"].take(16))
        assert not test.turn("r")
        test.settle()
        assert test.turn("r")
        assert test.ask() == [12]


def test_a_request_that_was_forgotten_takes_little_memory(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(12))
    for rid in ("first", "second"):  # one that was fetched, and one for which all had landed
        test.ask(rid)
        test.settle()
    test.now = FORGET_SECONDS + 1
    test.promises.expire()
    for request in test.promises._requests.values():
        assert request.fetch is not None
        assert request.fetch._hashes == ()
        assert len(request.fetch._packed) == 32 * len(PAGES)


# --- the landing was full ---


def short_of(test: Bench) -> None:
    """A request "r" that asked for 6 pages and got one, as others held the room; they have ended since."""
    test.store(range(12))
    test.ask("others", pages=7)
    test.settle()
    test.promises.look_up("r", PAGES[7:12], {})
    test.settle()
    test.promises.end("others")


def test_what_found_the_landing_full_is_fetched_once_more_when_its_turn_comes(
    made: list[Bench],
) -> None:
    test = bench(made, room=8)
    short_of(test)
    assert test.fetched[-1].was_short
    assert not test.turn("r")
    test.settle()
    assert len(test.fetched) == 3
    assert test.turn("r")
    assert test.ask(first=7) == [5]
    test.promises.end("r")
    assert test.leased == 0


def test_it_is_fetched_no_third_time(made: list[Bench]) -> None:
    test = bench(made, room=8)
    short_of(test)
    held = []
    test.look_around = lambda: held.append(test.landings["kv"].take(5))  # by another, meanwhile
    assert not test.turn("r")
    test.settle()
    assert test.fetched[-1].was_short
    for lease in held:
        test.landings["kv"].let_go(lease)
    assert test.turn("r")
    assert len(test.fetched) == 3


def test_only_as_many_are_fetched_once_more_as_there_is_room_for(made: list[Bench]) -> None:
    """One of them is admitted, and gives back what it had to all that wait behind it."""
    test = bench(made, room=8)
    test.store(range(12))
    test.ask("others", pages=7)
    test.settle()
    for rid, first in (("r", 7), ("q", 6)):
        test.promises.look_up(rid, PAGES[first:12], {})
        test.settle()
        assert test.fetched[-1].was_short
    test.promises.end("others")
    assert test.landings["kv"].room == 6
    held = Event()

    def wait() -> None:
        assert held.wait(SECONDS)

    test.look_around = wait  # so that the first is under way
    assert not test.turn("r")
    assert test.turn("q")  # a page would be left for it
    held.set()
    test.settle()
    assert len(test.fetched) == 4
    assert test.turn("r")


def test_while_the_landing_is_full_nobody_waits_for_room(made: list[Bench]) -> None:
    test = bench(made, room=8)
    short_of(test)
    held = test.landings["kv"].take(7)
    assert test.turn("r")
    assert len(test.fetched) == 2
    test.landings["kv"].let_go(held)
    assert not test.turn("r")


def test_a_policy_that_does_not_wait_fetches_nothing_again(made: list[Bench]) -> None:
    test = bench(made, room=8, patience=Patience("best_effort"))
    short_of(test)
    assert test.turn("r")
    assert len(test.fetched) == 2


def test_the_second_fetch_has_a_budget_of_its_own(made: list[Bench]) -> None:
    test = bench(made, room=8, patience=Patience("timeout", base=1.0))
    short_of(test)
    test.promises._requests["r"].waits_since = 0.0
    test.now = 100.0
    test.promises._fetch = test.fetched.append
    assert not test.turn("r")
    test.now += 0.9
    assert not test.turn("r")
    test.now += 0.2
    assert test.turn("r")


# --- the turn's lookup ---


def test_a_lookup_for_pages_that_were_asked_for_begins_nothing(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(5))
    test.ask()
    test.settle()
    assert test.turn("r")
    assert test.ask() == [5]  # the turn's, and not all of it is stored
    assert test.ask(first=3) == [2]  # or the device has more by now
    assert not test.promises.lost("r")
    assert len(test.fetched) == 1


@pytest.mark.parametrize("had_landed", [True, False])
def test_a_request_whose_device_prefix_was_lost_is_held_up_once(
    had_landed: bool, made: list[Bench]
) -> None:
    test = bench(made)
    test.store(range(12))
    if had_landed:
        test.ask("before", first=8)
        test.settle()
    test.ask(first=8)
    test.settle()
    assert test.turn("r")
    assert test.ask() == []
    assert test.promises.lost("r")
    assert test.promises.lost("r")
    test.settle()
    assert test.turn("r")
    assert test.ask() == [12]
    assert not test.promises.lost("r")


def test_a_request_that_had_all_on_the_device_and_lost_it_is_held_up(made: list[Bench]) -> None:
    """SGLang did not look up when it arrived."""
    test = bench(made)
    test.store(range(12))
    assert test.turn("r")
    assert not test.promises.lost("r")
    test.ask()
    assert test.promises.lost("r")
    test.settle()
    assert test.turn("r")
    assert test.ask() == [12]
    assert not test.promises.lost("r")


def test_a_policy_that_does_not_wait_loses_nothing(made: list[Bench]) -> None:
    test = bench(made, patience=Patience("best_effort"))
    test.ask()
    assert not test.promises.lost("r")


def test_a_lookup_of_few_pages_ends_what_was_promised_before(made: list[Bench]) -> None:
    test = bench(made, patience=Patience("wait_complete", least_pages=4))
    test.store(range(12))
    test.ask()
    test.settle()
    assert test.ask() == [12]
    assert test.ask(first=9) == []  # the device has the rest now
    assert test.leased == 0


def test_a_tier_that_fails_is_a_miss_and_ends_the_wait(made: list[Bench]) -> None:
    test = bench(made)
    test.store(range(5))
    test.tier.refusing = {"get"}
    test.ask()
    test.settle()
    assert test.turn("r")
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
    assert test.turn("r") == (waits == 0.0)
    test.now += (waits or 1000.0) - 0.01
    assert test.turn("r") == (waits == 0.0)
    test.now += 0.02
    assert test.turn("r") == (waits is not None)
    assert test.fetched[0].cancel.is_set() == (waits is not None)


def test_a_request_with_few_pages_is_not_looked_up(made: list[Bench]) -> None:
    test = bench(made, patience=Patience(least_pages=4))
    test.store(range(5))
    test.ask(pages=3)
    assert test.fetched == []
    assert test.turn("r")


def test_behind_a_call_that_hangs_nobody_waits(made: list[Bench]) -> None:
    test = bench(made)
    test.promises._fetch = test.fetched.append
    test.ask("before")
    assert not test.turn("before")
    test.hangs = True
    assert test.turn("before")
    assert test.fetched[0].cancel.is_set()
    test.ask("after")
    assert len(test.fetched) == 1
    assert test.turn("after")


def test_behind_a_folder_that_hangs_nobody_waits(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_sglang.hicache.fetching.LOOK_SECONDS", 0.0)
    test = bench(made)
    entered, opened = Event(), Event()

    def hang() -> None:
        entered.set()
        assert opened.wait(SECONDS)

    test.look_around = hang
    test.ask()
    assert entered.wait(SECONDS)
    assert test.turn("r")
    opened.set()
    test.settle()
    assert not test.fetching.hangs()


def test_behind_a_thread_that_is_gone_nobody_waits(made: list[Bench]) -> None:
    test = bench(made)
    test.fetching.close()
    test.fetching.submit(Fetch(tuple(PAGES), {}))
    test.ask()
    assert test.turn("r")


def test_tidying_that_fails_does_not_end_the_thread(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_sglang.hicache.fetching.TIDY_SECONDS", 0.0)
    test = bench(made)
    failed = Event()

    def fail() -> None:
        failed.set()
        raise RuntimeError("told to fail")

    test.tidy = fail
    test.store(range(5))
    test.ask()
    assert failed.wait(SECONDS)
    test.settle()
    test.ask("another", pages=4)
    test.settle()
    assert test.ask("another", pages=4) == [4]


def test_records_are_given_back_when_pages_cannot_be_checked(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = bench(made)
    test.store(range(5))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lmcache_sglang.hicache.landing.checksums", fail)
    test.ask()
    test.settle()
    test.promises.end("r")
    assert test.leased == 0


# --- pools ---


def test_a_pool_of_windows_that_comes_first_does_not_lead(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor need there be one of the name "kv"."""
    asked: list[tuple[int, int]] = []
    leading: list[bytes] = []

    def spied(chain: Chain, wanted: Sequence[Any]) -> Any:
        leading.append(wanted[0].standing.namespace)
        return look_up(chain, wanted)

    monkeypatch.setattr("lmcache_sglang.hicache.fetching.look_up", spied)

    def pays(rates: list[Any], page_bytes: int, page_tokens: int, last: bytes) -> int:
        asked.append((len(rates), page_tokens))
        return 6

    test = bench(made, names=["swa", "c4"], recompute=SimpleNamespace(pays=pays))
    test.store(range(10), "c4")
    test.store(range(4, 10), "swa")
    test.ask()
    test.settle()
    assert asked == [(10, 16)]
    assert leading == [NAMES["c4"]]
    assert test.ask() == [6]


def test_a_window_is_found_however_far_it_lies_from_the_end(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_sglang.hicache.promises.BACK", 1)
    for end in range(1, len(PAGES) + 1):
        test = bench(made, windowed=True)
        test.store(range(12))
        test.store(range(max(0, end - 3), end), "swa")
        test.ask(window=3)
        test.settle()
        assert test.ask(window=3) == [end]
        test.promises.end("r")
        assert test.leased == 0


def test_of_a_window_that_is_there_in_part_nothing_is_promised(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_sglang.hicache.promises.BACK", 1)
    test = bench(made, windowed=True)
    test.store(range(12))
    test.store(range(3, 6), "swa")
    test.store(range(11, 12), "swa")
    for rid, window in (("another", 1), ("r", 3)):
        test.ask(rid, window=window)
        test.settle()
    assert test.ask("another", window=1) == [12]
    assert test.ask("r", window=3) == [6]


def test_ranks_find_a_common_end_though_one_lacks_many(made: list[Bench]) -> None:
    """Of pages with windows, of which each rank reads a few ends only."""
    pages = [hashlib.sha256(bytes(2) + bytes([page])).hexdigest() for page in range(100)]
    told = []
    for stored in (100, 60):
        test = bench(made, room=128, windowed=True, alone=False)
        for name in test.names:
            test.store(range(stored), name, pages)
        for _ in range(2):
            answer = test.promises.look_up("r", pages, {"swa": 2})
            test.settle()
        told.append(set(answer))
    assert max(told[0]) == 100
    assert max(told[0] & told[1]) >= 48


def test_requests_that_come_and_go_while_pages_land_leave_no_lease(made: list[Bench]) -> None:
    """Two threads ask and end, in less room than they want; what is promised is always what was stored.

    Every other request loses its device prefix, and of the last ones of a round nobody says that they ended.
    """
    test = bench(made, room=5)
    test.store(range(12))
    together = Barrier(2)  # what the first to be done leaves behind would be all the room

    def wait(rid: str) -> None:
        while not test.turn(rid):
            time.sleep(0)

    def serve(number: int) -> int:
        promised = 0
        for turn in range(20):
            together.wait(SECONDS)
            rid, pages = f"{number} {turn}", 3 + (turn + number) % 9
            for first in (2, 0) if turn % 2 else (0,):
                test.ask(rid, pages=pages, first=first)
                wait(rid)
            for there in test.ask(rid, pages=pages):
                lease = test.landings["kv"].hold(PAGES[:there], prefix=True)
                landed = test.landings["kv"].records[torch.from_numpy(lease.slots)]
                assert landed.tolist() == [[page] * SIZE for page in range(there)]
                test.landings["kv"].let_go(lease)
                promised += there
            if turn < 17:
                test.promises.end(rid)
        return promised

    with ThreadPoolExecutor(2) as threads:
        for _ in range(4):
            assert all(list(threads.map(serve, range(2))))
            test.settle()
            assert test.leased > 0
            test.now += FORGET_SECONDS + 1
            test.promises.expire()
            assert test.leased == 0
            test.promises.end_all()


def test_closing_leaves_a_read_behind_that_hangs_and_begins_no_other(
    made: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "CLOSE_SECONDS", 0.05)
    test = bench(made)
    test.store(range(12))
    begun, gate = Event(), Event()

    def read(call: str) -> None:
        if call == "get":
            begun.set()
            assert gate.wait(SECONDS)

    test.tier.before_call = read
    test.ask("r")
    assert begun.wait(SECONDS)
    test.ask("behind it")
    test.fetching.close()
    gate.set()
    test.settle()
    assert test.tier.asked["get"] == 1
