"""Offloads: their order, what is left out, and how much may wait."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache import offloading
from lmcache_sglang.hicache.device_copiers import ByKernels
from lmcache_sglang.hicache.device_pages import DevicePages, Run
from lmcache_sglang.hicache.offloading import Offloading, Part
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.testing.faulty_tier import FaultyTier
from lmcache_sglang.testing.waiting import returns_only_after

SPAN, WIDTH = 4, 16
PAGE = SPAN * WIDTH
NAMESPACE = b"n" * 16
SECONDS = 10.0


class Gate:
    """An event of the device, that the test lets come true."""

    def __init__(self) -> None:
        self._open = Event()

    def open(self) -> None:
        self._open.set()

    def synchronize(self) -> None:
        assert self._open.wait(SECONDS)


class Bench:
    def __init__(self) -> None:
        self.tier = FaultyTier(MemoryTier(1 << 20))
        self.buffer = torch.randint(0, 256, (64 * SPAN, WIDTH), dtype=torch.uint8)
        pages = DevicePages([Run(self.buffer, 0, WIDTH)], SPAN, {0: [0]}, ByKernels)
        self.pool: Any = SimpleNamespace(
            pages=pages, page_bytes=PAGE, is_stored_here=True, first_rows=lambda at: at[::SPAN]
        )
        self.chain = Chain(self.tier)
        self.offloading = Offloading(self.chain, most=20 * PAGE)  # 15 of them for what is new

    def part(self, pages: range, **more: Any) -> Part:
        hashes = [hashlib.sha256(bytes([page])).hexdigest() for page in pages]
        indices = torch.arange(pages.start * SPAN, pages.stop * SPAN)
        return Part(self.pool, NAMESPACE, hashes, indices, **more)

    def keys(self, pages: range) -> list[bytes]:
        return [NAMESPACE + hashlib.sha256(bytes([page])).digest() for page in pages]

    def offer(self, pages: range, gate: Gate | None = None, **more: Any) -> bool:
        return self.offloading.offer([self.part(pages, **more)], [gate] if gate else [])

    def results(self, count: int) -> list[bool]:
        """The next ones, as they come."""
        assert self.offloading.wait(SECONDS)
        assert self.offloading.done() == count
        return [self.offloading.take() for _ in range(count)]


@pytest.fixture
def test() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.offloading.close()
    bench.chain.close()


def test_pages_are_stored_as_they_lie_on_the_device(test: Bench) -> None:
    assert test.offer(range(2, 5))
    assert test.results(1) == [True]
    for page, key in zip(range(2, 5), test.keys(range(2, 5)), strict=True):
        memory = bytearray(PAGE)
        assert test.chain.get([key], PageSegments.of_buffers([memory], writable=True))
        assert bytes(memory) == bytes(
            test.buffer[page * SPAN : (page + 1) * SPAN].flatten().tolist()
        )


def test_nothing_is_read_before_the_device_has_written_it(test: Bench) -> None:
    gate = Gate()
    test.offer(range(2), gate)
    test.buffer.fill_(7)
    gate.open()
    assert test.results(1) == [True]
    memory = bytearray(PAGE)
    keys = test.keys(range(1))
    assert test.chain.get(keys, PageSegments.of_buffers([memory], writable=True)) == [True]
    assert set(memory) == {7}


def test_results_come_in_the_order_of_the_offers(test: Bench) -> None:
    gate = Gate()
    test.offer(range(3), gate)
    assert test.offer(range(3, 6))
    assert test.offloading.done() == 0
    gate.open()
    assert test.results(2) == [True, True]
    test.tier.refusing = {"put"}
    test.offer(range(6, 8))
    test.offer(range(2))  # stored already, so nothing has to be put
    assert test.results(2) == [False, True]


def test_what_is_stored_is_not_put_again(test: Bench) -> None:
    test.offer(range(2, 4))
    test.results(1)
    test.tier.asked.clear()
    test.tier.parents.clear()
    test.offer(range(2, 4))
    assert test.results(1) == [True]
    assert test.tier.asked["put"] == 0
    test.offer(range(6), before="ab" * 32, position=9)
    assert test.results(1) == [True]
    keys = test.keys(range(6))
    before = NAMESPACE + bytes.fromhex("ab" * 32)
    assert test.tier.parents == [[before, keys[0]], [keys[3], keys[4]]]


def test_more_than_may_wait_is_refused_until_results_were_taken(test: Bench) -> None:
    gate = Gate()
    assert test.offer(range(9), gate)
    assert not test.offer(range(9, 16))
    assert test.offer(range(9, 15))
    gate.open()
    assert test.offloading.wait(SECONDS)
    assert not test.offer(range(20, 21))  # stored, but not taken: all ranks count alike
    assert [test.offloading.take(), test.offloading.take()] == [True, True]
    assert test.offer(range(20, 21))


def test_an_offer_larger_than_all_that_may_wait_is_taken_alone(test: Bench) -> None:
    assert test.offer(range(30))
    assert not test.offer(range(30, 31))
    assert test.results(1) == [True]
    assert all(test.chain.exists(test.keys(range(30))))


def test_a_batch_larger_than_the_stage_is_stored_in_parts(
    test: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "STAGE_BYTES", 3 * PAGE)
    test.offer(range(8))
    assert test.results(1) == [True]
    assert test.tier.asked["put"] == 3
    assert all(test.chain.exists(test.keys(range(8))))


def test_a_node_that_lacks_a_pool_is_stored_and_wanted_again(test: Bench) -> None:
    assert test.offloading.offer([test.part(range(3))], [], is_whole=False)
    assert test.results(1) == [False]
    assert all(test.chain.exists(test.keys(range(3))))


def test_a_mistake_of_ours_costs_the_pages_and_not_the_thread(test: Bench) -> None:
    broken = Part(test.pool, NAMESPACE, ["no hash"], torch.arange(SPAN))
    assert test.offloading.offer([broken], [])
    test.offer(range(2))
    assert test.results(2) == [False, True]


def test_what_is_offered_again_for_its_window_leaves_room_for_what_is_new(test: Bench) -> None:
    """SGLang offers a prefix that lacks a window before its children, each time one is inserted."""

    def stem(pages: range) -> bool:
        return test.offloading.offer([test.part(pages)], [], is_whole=False)

    assert stem(range(8))
    assert stem(range(8, 15))
    assert not test.offer(range(15, 16))
    test.results(2)
    gate = Gate()
    assert test.offer(range(20, 21), gate)  # so that all below waits together
    assert stem(range(8))
    assert not stem(range(8, 15))  # stored already, so nothing is lost
    assert test.offer(range(15, 29))
    gate.open()
    assert test.results(3) == [True, False, True]


def test_a_stem_that_got_its_window_is_new(test: Bench) -> None:
    assert test.offloading.offer([test.part(range(3))], [], is_whole=False)
    assert test.results(1) == [False]
    assert test.offer(range(3))
    assert test.results(1) == [True]


def hung(test: Bench) -> Gate:
    """A tier that keeps the first write it gets until the gate opens; that write has begun."""
    gate, begun = Gate(), Event()

    def write(call: str) -> None:
        if call == "put":
            begun.set()
            gate.synchronize()

    test.tier.before_call = write
    test.offer(range(3))
    assert begun.wait(SECONDS)
    return gate


def test_settling_waits_for_what_is_stored_and_forgets_the_results(test: Bench) -> None:
    gate = hung(test)
    test.offer(range(6, 10))
    assert returns_only_after(lambda: test.offloading.settle(SECONDS), gate.open)
    assert test.offloading.done() == 0
    assert all(test.chain.exists(test.keys(range(6, 10))))
    assert test.offer(range(10, 25))  # nothing waits


def test_settling_does_not_wait_for_a_tier_that_hangs_and_drops_what_is_behind_it(
    test: Bench,
) -> None:
    gate = hung(test)
    test.offer(range(6, 10))
    assert not test.offloading.settle(0.05)
    test.buffer.fill_(9)  # the places of these pages are another's now
    assert test.offer(range(10, 25))
    gate.open()
    assert test.results(1) == [True]
    assert test.chain.exists(test.keys(range(6, 10))) == [False] * 4


def test_what_is_cut_off_is_answered_with_no_and_not_stored_later(test: Bench) -> None:
    gate = hung(test)
    test.offer(range(6, 10))
    assert not test.offloading.cut_off(0.05)
    gate.open()
    first, second = test.results(2)
    assert first  # it had begun, so whoever cuts off is told that it is not over
    assert not second
    assert test.chain.exists(test.keys(range(6, 10))) == [False] * 4


def test_closing_leaves_a_tier_behind_that_hangs(test: Bench) -> None:
    gate = hung(test)
    test.offloading.close(0.05)
    gate.open()
    test.offloading._thread.join(SECONDS)
    assert not test.offloading._thread.is_alive()
