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
from lmcache_sglang.hicache.device_pages import DevicePages, Run
from lmcache_sglang.hicache.offloading import Offloading, Part
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.memory import MemoryTier
from lmcache_sglang.testing.faulty_tier import FaultyTier

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
        pages = DevicePages([Run(self.buffer, 0, WIDTH)], SPAN, {0: [0]})
        self.pool: Any = SimpleNamespace(
            pages=pages, page_bytes=PAGE, is_stored_here=True, first_rows=lambda at: at[::SPAN]
        )
        self.chain = Chain(self.tier)
        self.offloading = Offloading(self.chain, most=10 * PAGE)

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
        self.offloading._queue.join()
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
    assert test.offer(range(6), gate)
    assert not test.offer(range(6, 11))
    assert test.offer(range(6, 10))
    gate.open()
    test.offloading._queue.join()
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


def test_after_settling_nothing_waits_and_no_result_is_left(test: Bench) -> None:
    test.offer(range(6))
    test.offer(range(6, 10))
    test.offloading.settle()
    assert test.offloading.done() == 0
    assert test.offer(range(10, 20))
