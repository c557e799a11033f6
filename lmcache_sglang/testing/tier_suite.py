"""The conformance suite of tiers: what storage/base.py says that every tier owes, as tests to inherit.

    class TestMyTier(TierSuite):
        @pytest.fixture
        def make(self, tmp_path: Path) -> Maker:
            return lambda capacity, store="a": MyTier(tmp_path / store, capacity)

        def corrupt(self, tier: Tier, key: bytes) -> None:
            ...  # change one byte of the page behind the tier's back

Every read of the suite goes through `read` and
every write through `write`, which check what holds for all of them: only the right bytes, nothing
touched beside them, the capacity kept, and outcomes that are true.

It needs pytest and nothing else that the package does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from threading import Barrier, Thread
from typing import Protocol

import pytest

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments, checksums
from ..storage.base import NAMESPACE_BYTES, Lookup, Stored, Tier, page_key

ROOMY = 64 << 20  # a capacity that no test fills by accident
SMALL = 2 << 20  # one that a few dozen pages fill
PAGE = 64 << 10

OTHER_NAMESPACE = b"\1" * NAMESPACE_BYTES
JOIN_SECONDS = 60.0


class Maker(Protocol):
    """Makes a tier of about `capacity` bytes. Equal names of a store mean the same one, reopened."""

    def __call__(self, capacity: int, store: str = "a") -> Tier: ...


class EngineMemory:
    """Pages as an engine holds them: segments scattered over a block, guard bytes around each one."""

    def __init__(self, contents: Sequence[bytes], per_page: int = 1) -> None:
        self._block = bytearray()
        self._spans: list[tuple[int, int]] = []  # first byte and length of each segment
        self._per_page = per_page
        for content in contents:
            for piece in _split(content, per_page):
                self._block += _GUARD * (17 + len(self._spans) % 13)
                self._spans.append((len(self._block), len(piece)))
                self._block += piece
        self._block += _GUARD * 64
        (base,) = PageSegments.of_buffers([self._block], writable=True).addresses
        self.segments = PageSegments(
            [base + start for start, _ in self._spans],
            [size for _, size in self._spans],
            per_page,
            self,
        )

    @classmethod
    def blank(cls, sizes: Sequence[int], per_page: int = 1) -> EngineMemory:
        """Memory to read into."""
        return cls([_BLANK * size for size in sizes], per_page)

    def page(self, index: int) -> bytes:
        first = index * self._per_page
        spans = self._spans[first : first + self._per_page]
        return b"".join(bytes(self._block[start : start + size]) for start, size in spans)

    def reuse(self) -> None:
        """Put other bytes everywhere, as an engine does once a put has returned."""
        self._block[:] = bytes(len(self._block))

    def is_blank(self, index: int) -> bool:
        page = self.page(index)
        return page == _BLANK * len(page)

    def guards_hold(self) -> bool:
        """Whether nothing outside the segments was written."""
        between, end = bytearray(), 0
        for start, size in self._spans:
            between += self._block[end:start]
            end = start + size
        between += self._block[end:]
        return between == _GUARD * len(between)


_GUARD = b"\xa5"
_BLANK = b"\x5a"


def _split(content: bytes, parts: int) -> Iterator[bytes]:
    """Parts of different lengths, some of them empty when there are fewer bytes than parts."""
    cuts = sorted(random.Random(len(content)).choices(range(len(content) + 1), k=parts - 1))
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        yield content[start:end]


def a_key(number: int, namespace: bytes = b"\0" * NAMESPACE_BYTES) -> bytes:
    return page_key(namespace, sha256(str(number).encode()).digest())


def some_keys(count: int, start: int = 0) -> list[bytes]:
    return [a_key(number) for number in range(start, start + count)]


def bytes_of(key: bytes, size: int = PAGE) -> bytes:
    """The one page of that size that lies under a key; random, so no part is like another."""
    return random.Random(key).randbytes(size)


def read(tier: Tier, keys: Sequence[bytes], size: int = PAGE, per_page: int = 1) -> list[Lookup]:
    """`get`, checked: a hit is the page of that key, and all other memory is as it was."""
    return read_pages(tier, [(key, bytes_of(key, size)) for key in keys], per_page)


def read_pages(tier: Tier, pages: Sequence[tuple[bytes, bytes]], per_page: int = 1) -> list[Lookup]:
    memory = EngineMemory.blank([len(content) for _, content in pages], per_page)
    outcome = tier.get([key for key, _ in pages], memory.segments)
    assert len(outcome) == len(pages)
    for i, (_, content) in enumerate(pages):
        if outcome[i] is Lookup.HIT:
            assert memory.page(i) == content, "a hit delivered other bytes than were put"
    assert memory.guards_hold(), "memory around a segment was written to"
    return outcome


def write(
    tier: Tier,
    keys: Sequence[bytes],
    size: int = PAGE,
    per_page: int = 1,
    checksums: Sequence[int] | None = None,
    parents: Sequence[bytes] | None = None,
) -> list[Stored]:
    """`put`, checked: what it says of each page is true, and the capacity holds."""
    pages = [(key, bytes_of(key, size)) for key in keys]
    return write_pages(tier, pages, per_page, checksums, parents)


def write_pages(
    tier: Tier,
    pages: Sequence[tuple[bytes, bytes]],
    per_page: int = 1,
    checksums: Sequence[int] | None = None,
    parents: Sequence[bytes] | None = None,
) -> list[Stored]:
    keys = [key for key, _ in pages]
    memory = EngineMemory([content for _, content in pages], per_page)
    outcome = tier.put(keys, memory.segments, checksums, parents)
    for i, (_, content) in enumerate(pages):
        assert memory.page(i) == content, "put changed the caller's memory"
    assert [stored.kept for stored in outcome] == tier.exists(keys)
    assert tier.stats().bytes <= tier.capacity
    return outcome


def at_once(*workers: Callable[[], None]) -> None:
    """Run each in a thread, all starting together; raises what the first of them raised."""
    start, raised = Barrier(len(workers)), list[BaseException]()

    def run(worker: Callable[[], None]) -> None:
        try:
            start.wait(JOIN_SECONDS)
            worker()
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            raised.append(error)

    threads = [Thread(target=run, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
        assert not thread.is_alive(), "a thread is stuck"
    for error in raised:
        raise error


class TierSuite:
    """What every tier owes. A subclass provides `make`, and overrides what differs."""

    evicts = True  # a full tier makes room; False: it refuses
    oldest_first = False  # and what gives way is what was used or written least recently
    survives_close = False  # what was put is there again when the store is reopened

    @pytest.fixture
    def make(self) -> Maker:
        raise NotImplementedError("a subclass says how to make its tier")

    def corrupt(self, tier: Tier, key: bytes) -> None:
        """Change one byte of a stored page, and nothing that the tier knows about it."""
        pytest.skip("this tier offers no way to damage a record")

    @pytest.fixture
    def tier(self, make: Maker) -> Iterator[Tier]:
        """A tier with room, looked over and closed after the test."""
        with closing(make(ROOMY)) as made:
            yield made
            report = made.check()
            assert report.ok, report

    # Bytes come back, and only the right ones.

    @pytest.mark.parametrize("per_page", [1, 2, 8])
    def test_pages_come_back_as_they_were_put(self, tier: Tier, per_page: int) -> None:
        sizes = [1, 2, 7, 63, 64, 241, 4095, 4096, 4097, 65_537, (2 << 20) - 1, 2 << 20]
        pages = [(a_key(size), bytes_of(a_key(size), size)) for size in sizes]
        assert write_pages(tier, pages, per_page) == [Stored.STORED] * len(pages)
        assert read_pages(tier, pages, per_page) == [Lookup.HIT] * len(pages)
        assert tier.stats().pages == len(pages)

    def test_another_number_of_segments_does_not_change_a_page(self, tier: Tier) -> None:
        write(tier, some_keys(2), per_page=3)
        assert read(tier, some_keys(2), per_page=8) == [Lookup.HIT] * 2

    def test_answers_come_in_the_order_of_the_keys(self, tier: Tier) -> None:
        a, b, c, d = some_keys(4)
        assert write(tier, [c, a]) == [Stored.STORED] * 2
        assert tier.exists([a, b, c, d]) == [True, False, True, False]
        assert read(tier, [d, c, b, a]) == [Lookup.MISS, Lookup.HIT, Lookup.MISS, Lookup.HIT]
        assert write(tier, [a, d]) == [Stored.PRESENT, Stored.STORED]

    def test_an_empty_tier_misses(self, tier: Tier) -> None:
        assert read(tier, some_keys(3)) == [Lookup.MISS] * 3
        assert tier.exists(some_keys(3)) == [False] * 3

    def test_empty_batches_are_no_error(self, tier: Tier) -> None:
        nothing = PageSegments([], [], 1)
        assert tier.exists([]) == []
        assert tier.get([], nothing) == []
        assert tier.put([], nothing) == []
        assert tier.put([], nothing, []) == []
        assert tier.remove([]) == 0

    def test_a_key_twice_in_a_batch_is_one_page(self, tier: Tier) -> None:
        a, b = some_keys(2)
        write(tier, [a, b, a, a])
        assert tier.stats().pages == 2
        assert read(tier, [a, a, b, a]) == [Lookup.HIT] * 4
        assert tier.remove([a, a]) == 1
        assert tier.exists([a, b]) == [False, True]

    def test_another_length_under_a_key_is_neither_delivered_nor_taken(self, tier: Tier) -> None:
        (key,) = some_keys(1)
        write(tier, [key])
        for size in (PAGE - 1, PAGE + 1, 1, 2 * PAGE):
            assert read(tier, [key], size) == [Lookup.MISS]
            other = EngineMemory([bytes_of(key, size)])
            assert tier.put([key], other.segments) == [Stored.REFUSED]
        assert write(tier, [key]) == [Stored.PRESENT]
        assert read(tier, [key]) == [Lookup.HIT]

    # Damage is found, told and healed.

    def test_a_corrupt_page_is_not_delivered_and_heals_once_removed(self, make: Maker) -> None:
        keys = some_keys(3)
        with closing(make(ROOMY)) as tier:
            write(tier, keys)
            self.corrupt(tier, keys[1])
            for _ in range(2):  # it stays until it is removed
                assert read(tier, keys) == [Lookup.HIT, Lookup.CORRUPT, Lookup.HIT]
            assert tier.remove([keys[1]]) == 1
            assert read(tier, keys) == [Lookup.HIT, Lookup.MISS, Lookup.HIT]
            assert write(tier, keys) == [Stored.PRESENT, Stored.STORED, Stored.PRESENT]
            assert read(tier, keys) == [Lookup.HIT] * 3

    def test_check_names_the_corrupt_page_and_repair_removes_no_other(self, make: Maker) -> None:
        keys = some_keys(5)
        with closing(make(ROOMY)) as tier:
            write(tier, keys)
            assert tier.check().ok
            self.corrupt(tier, keys[3])
            for repair in (False, True):
                report = tier.check(repair=repair)
                assert (report.ok, report.corrupt, report.pages) == (False, [keys[3]], 4)
            assert tier.check().ok
            assert tier.exists(keys) == [True, True, True, False, True]

    def test_check_counts_whole_pages(self, tier: Tier) -> None:
        write(tier, some_keys(7))
        report = tier.check(repair=True)
        assert (report.ok, report.pages) == (True, 7)
        assert tier.stats().pages == 7

    def test_pages_damaged_on_the_way_get_no_fresh_checksum(self, tier: Tier) -> None:
        keys = some_keys(3)
        sums = checksums(keys, [bytes_of(key) for key in keys])
        sums[1] ^= 1 << 40
        assert write(tier, keys, checksums=sums) == [Stored.STORED, Stored.DAMAGED, Stored.STORED]
        assert read(tier, keys) == [Lookup.HIT, Lookup.MISS, Lookup.HIT]
        assert write(tier, keys) == [Stored.PRESENT, Stored.STORED, Stored.PRESENT]

    def test_damaged_pages_take_no_room(self, tier: Tier) -> None:
        write(tier, some_keys(1))
        before = tier.stats()
        assert write(tier, some_keys(4, start=1), checksums=[0] * 4) == [Stored.DAMAGED] * 4
        assert tier.stats() == before

    def test_a_callers_mistake_changes_nothing(self, tier: Tier) -> None:
        keys = some_keys(2)
        write(tier, keys)
        before = tier.stats()
        one = EngineMemory([bytes_of(keys[0])])
        with pytest.raises(ValueError, match="equally many"):
            tier.put(some_keys(2, start=5), one.segments)
        with pytest.raises(ValueError, match="equally many"):
            tier.put(some_keys(1, start=5), one.segments, [1, 2])
        with pytest.raises(ValueError, match="equally many"):
            tier.put(some_keys(1, start=5), one.segments, None, [b"", b""])
        with pytest.raises(ValueError, match="equally many"):
            tier.get(keys, one.segments)
        with pytest.raises(TypeError):
            tier.put(["not bytes"], one.segments)  # type: ignore[list-item]
        assert tier.stats() == before

    # What is forgotten is gone, and nothing else.

    def test_removed_pages_are_gone_and_their_room_is_free(self, tier: Tier) -> None:
        keys = some_keys(4)
        write(tier, keys[:2])
        before = tier.stats().bytes
        write(tier, keys[2:])
        assert tier.remove([*keys[2:], a_key(99)]) == 2
        assert read(tier, keys) == [Lookup.HIT, Lookup.HIT, Lookup.MISS, Lookup.MISS]
        assert tier.stats().bytes == before
        assert tier.remove(keys[2:]) == 0

    def test_clearing_a_namespace_leaves_the_others(self, tier: Tier) -> None:
        before, theirs, after = (
            [a_key(number, bytes([first]) * NAMESPACE_BYTES) for number in range(3)]
            for first in (0, OTHER_NAMESPACE[0], 0xFF)
        )
        write(tier, before + theirs + after)
        assert tier.clear(OTHER_NAMESPACE) == 3
        assert read(tier, before + after) == [Lookup.HIT] * 6
        assert read(tier, theirs) == [Lookup.MISS] * 3
        assert tier.clear(OTHER_NAMESPACE) == 0
        assert tier.stats().pages == 6

    # The capacity holds, and what gives way is what is worth least.

    def test_the_capacity_is_never_exceeded(self, make: Maker) -> None:
        with closing(make(SMALL)) as tier:
            keys = some_keys(3 * SMALL // PAGE)
            outcome = [write(tier, [key])[0] for key in keys]  # write() looks at the capacity
            here = tier.exists(keys)
            assert 2 <= sum(here) < len(keys)
            assert [lookup is Lookup.HIT for lookup in read(tier, keys)] == here
            if self.evicts:
                assert outcome == [Stored.STORED] * len(keys)
                assert here[-1], "the newest page gave way"
                assert tier.stats().evicted == here.count(False)
            else:
                assert [stored is Stored.STORED for stored in outcome] == here
                assert tier.stats().evicted == 0

    def test_a_batch_larger_than_the_tier_keeps_its_head(self, make: Maker) -> None:
        with closing(make(SMALL)) as tier:
            write(tier, some_keys(4, start=1000))
            outcome = write(tier, some_keys(2 * SMALL // PAGE))
            kept = outcome.index(Stored.REFUSED)
            assert kept >= 2
            assert set(outcome[kept:]) == {Stored.REFUSED}, "a page was kept without its ancestors"

    def test_no_page_gives_way_to_its_own_descendants(self, make: Maker) -> None:
        """The head of a chain is here already, and its new tail does not fit beside it."""
        chain = some_keys(2 * SMALL // PAGE)
        with closing(make(SMALL)) as tier:
            write(tier, chain[:8])
            outcome = write(tier, chain)
            assert outcome[:8] == [Stored.PRESENT] * 8
            kept = outcome.index(Stored.REFUSED)
            assert kept > 8
            assert set(outcome[kept:]) == {Stored.REFUSED}

    def test_a_lost_head_comes_back_at_the_cost_of_its_tail(self, make: Maker) -> None:
        """Or the rest of the chain would stay, full and useless."""
        if not self.evicts:
            pytest.skip("this tier does not evict")
        chain = some_keys(2 * SMALL // PAGE)
        with closing(make(SMALL)) as tier:
            kept = write(tier, chain[2:]).index(Stored.REFUSED)
            outcome = write(tier, chain[: 2 + kept])
            assert outcome[:kept] == [Stored.STORED] * 2 + [Stored.PRESENT] * (kept - 2)
            assert outcome[kept:] == [Stored.REFUSED] * 2

    def test_a_key_twice_in_a_batch_needs_its_room_once(self, make: Maker) -> None:
        with closing(make(SMALL)) as tier:
            size = tier.capacity * 3 // 4
            if not tier.fits(size):
                pytest.skip("this tier keeps no page that fills most of it")
            assert Stored.REFUSED not in write(tier, [a_key(0)] * 2, size=size)

    def test_eviction_takes_the_tail_of_a_chain_before_its_head(self, make: Maker) -> None:
        if not self.evicts:
            pytest.skip("this tier does not evict")
        chain = some_keys(8)
        with closing(make(SMALL)) as tier:
            write(tier, chain)
            for number in range(1000, 1000 + 2 * SMALL // PAGE):
                write(tier, [a_key(number)])
                here = tier.exists(chain)
                assert here == sorted(here, reverse=True), "a page was kept without its ancestors"
            assert not any(here)

    def test_chains_that_share_a_head_keep_it_longest(self, make: Maker) -> None:
        """Across batches, too: parents are named."""
        if not self.evicts:
            pytest.skip("this tier does not evict")
        head, tails = some_keys(4), [some_keys(3, start=100 * n) for n in range(1, 4)]
        with closing(make(SMALL)) as tier:
            write(tier, head)
            for tail in tails:
                assert write(tier, tail, parents=[head[-1], *tail[:-1]]) == [Stored.STORED] * 3
            for number in range(1000, 1000 + 2 * SMALL // PAGE):
                write(tier, [a_key(number)])
                for chain in (head + tail for tail in tails):
                    here = tier.exists(chain)
                    assert here == sorted(here, reverse=True), (
                        "a page was kept without its ancestors"
                    )
            assert not any(tier.exists(head))

    @pytest.mark.parametrize("use", ["get", "put", "exists"])
    def test_a_used_page_outlives_the_unused(self, make: Maker, use: str) -> None:
        """But to look whether it is there is no use."""
        if not self.oldest_first:
            pytest.skip("this tier evicts by another rule")
        old, *others = some_keys(9)
        with closing(make(SMALL)) as tier:
            for key in (old, *others):
                write(tier, [key])
            match use:
                case "get":
                    assert read(tier, [old]) == [Lookup.HIT]
                case "put":
                    memory = EngineMemory([bytes_of(old)])
                    assert tier.put([old], memory.segments) == [Stored.PRESENT]
                case _:
                    assert tier.exists([old]) == [True]
            number = 1000
            while tier.stats().evicted == 0:
                write(tier, [a_key(number)])
                number += 1
            counts_as_use = use in ("get", "put")
            assert tier.exists([old, others[0]]) == [counts_as_use, not counts_as_use]

    def test_a_page_too_large_is_refused_at_no_other_pages_cost(self, make: Maker) -> None:
        with closing(make(SMALL)) as tier:
            keys = some_keys(5)
            write(tier, keys)
            assert tier.fits(1)
            assert not tier.fits(tier.capacity + 1)
            assert write(tier, [a_key(99)], size=tier.capacity + 1) == [Stored.REFUSED]
            assert read(tier, keys) == [Lookup.HIT] * 5

    # Threads.

    def test_threads_on_the_same_pages_never_see_wrong_bytes(self, make: Maker) -> None:
        keys = some_keys(60)  # twice what fits, so that they also evict each other's
        with closing(make(SMALL)) as tier:

            def work(seed: int) -> Callable[[], None]:
                rng = random.Random(seed)

                def run() -> None:
                    for _ in range(40):
                        some = rng.sample(keys, 6)
                        match rng.randrange(5):
                            case 0 | 1:
                                tier.put(some, EngineMemory([*map(bytes_of, some)]).segments)
                            case 2 | 3:
                                assert Lookup.CORRUPT not in read(tier, some, per_page=2)
                            case 4:
                                tier.remove(some[:2])
                        assert tier.stats().bytes <= tier.capacity

                return run

            at_once(*(work(seed) for seed in range(4)))
            report = tier.check()
            assert report.ok, report
            assert report.pages == tier.stats().pages == sum(tier.exists(keys))

    def test_threads_that_put_the_same_page_store_it_once(self, make: Maker) -> None:
        keys = some_keys(6)
        outcomes: list[list[Stored]] = []
        with closing(make(ROOMY)) as tier:

            def run() -> None:
                outcomes.append(write(tier, keys))

            at_once(*[run] * 4)
            assert tier.stats().pages == 6
            (used,) = {tier.stats().bytes}
            assert read(tier, keys) == [Lookup.HIT] * 6
            assert tier.remove(keys) == 6
            assert (tier.stats().bytes, tier.stats().pages) == (0, 0) < (used, 6)
        assert all(Stored.REFUSED not in outcome for outcome in outcomes)

    def test_closing_under_way_ends_the_others_with_closed(self, make: Maker) -> None:
        keys = some_keys(8)
        tier = make(ROOMY)
        write(tier, keys)
        busy = Barrier(4)

        def use() -> None:
            busy.wait(JOIN_SECONDS)
            with pytest.raises(TierError) as caught:
                for number in range(5_000):
                    read(tier, keys)
                    tier.put(keys, EngineMemory([*map(bytes_of, keys)]).segments)
                    tier.put([a_key(number)], EngineMemory([b"new"]).segments)
            assert caught.value.reason is Reason.CLOSED

        def close() -> None:
            busy.wait(JOIN_SECONDS)
            tier.close()

        at_once(use, use, use, close)

    # The end.

    @pytest.mark.parametrize("call", ["exists", "get", "put", "remove", "clear", "stats", "check"])
    def test_nothing_works_after_close(self, make: Maker, call: str) -> None:
        memory = EngineMemory([bytes_of(a_key(0))])
        calls: dict[str, Callable[[], object]] = {
            "exists": lambda: tier.exists([a_key(0)]),
            "get": lambda: tier.get([a_key(0)], memory.segments),
            "put": lambda: tier.put([a_key(0)], memory.segments),
            "remove": lambda: tier.remove([a_key(0)]),
            "clear": lambda: tier.clear(OTHER_NAMESPACE),
            "stats": lambda: tier.stats(),
            "check": lambda: tier.check(),
        }
        tier = make(ROOMY)
        write(tier, some_keys(1))
        tier.close()
        tier.close()
        with pytest.raises(TierError) as caught:
            calls[call]()
        assert (caught.value.tier, caught.value.reason) == (tier.name, Reason.CLOSED)

    def test_a_reopened_store_has_what_it_had(self, make: Maker) -> None:
        if not self.survives_close:
            pytest.skip("this tier does not outlive its process")
        keys = some_keys(6)
        with closing(make(ROOMY)) as tier:
            write(tier, keys)
            tier.remove(keys[:1])
            before = tier.stats()
        with closing(make(ROOMY)) as tier:
            assert tier.stats() == before
            assert read(tier, keys) == [Lookup.MISS] + [Lookup.HIT] * 5
            assert tier.check().ok

    def test_two_stores_share_nothing(self, make: Maker) -> None:
        with closing(make(ROOMY, "a")) as one, closing(make(ROOMY, "b")) as other:
            write(one, some_keys(3))
            assert other.exists(some_keys(3)) == [False] * 3
            assert other.stats().pages == 0
