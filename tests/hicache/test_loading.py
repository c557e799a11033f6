"""Loads: layer by layer, and what is said of one that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.landing import NOWHERE, Landing
from lmcache_sglang.testing.waiting import returns_only_after

LAYERS = 3
SIZE = 32
SECONDS = 10.0


class Pool:
    """Notes the layers that are copied to it; may wait before one, or fail at it."""

    name = "kv"

    def __init__(self) -> None:
        self.pages = self
        self.copied: list[tuple[int, list[int], list[int]]] = []
        self.wait_before: dict[int, Event] = {}
        self.fail_at: int | None = None

    def first_rows(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[::2]

    @contextmanager
    def scattering(
        self, firsts: torch.Tensor, records: torch.Tensor, chosen: torch.Tensor
    ) -> Iterator[Callable[[int], None]]:
        yield lambda layer: self._scatter(layer, firsts, chosen)

    def _scatter(self, layer: int, firsts: torch.Tensor, chosen: torch.Tensor) -> None:
        if layer in self.wait_before:
            assert self.wait_before[layer].wait(SECONDS)
        if layer == self.fail_at:
            raise RuntimeError("told to fail")
        self.copied.append((layer, firsts.tolist(), chosen.tolist()))


class Bench:
    def __init__(self) -> None:
        from lmcache_sglang.hicache.loading import Loading

        self.pool = Pool()
        self.landing = Landing(8, SIZE)
        self.damaged: list[int] = []
        self.loading = Loading(LAYERS, self.damaged.append)
        names = [f"page {number}" for number in range(4)]
        room = self.landing.take(4)
        self.landing.records.fill_(3)
        keys = [name.encode().ljust(48) for name in names]
        self.landing.let_go(self.landing.came(room, names, keys, [True] * 4))
        self.names = names

    def start(self, parts: list[Any], ready: list[Any] | None = None) -> int:
        return self.loading.start(parts, ready or [])

    def part(self, pages: list[int]) -> Any:
        from lmcache_sglang.hicache.loading import Part

        pool: Any = self.pool
        lease = self.landing.hold([self.names[page] for page in pages], prefix=False)
        return Part(
            pool, self.landing, lease, torch.tensor([10 * p + i for p in pages for i in (0, 1)])
        )


@pytest.fixture
def test(sglang: None) -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.loading.close()


def test_the_requests_of_a_batch_are_loaded_together_layer_by_layer(test: Bench) -> None:
    first, second = test.part([0, 2]), test.part([3])
    index = test.start([first, second])
    assert test.loading.finish(index)
    records = [*first.lease.slots.tolist(), *second.lease.slots.tolist()]
    assert test.pool.copied == [(layer, [0, 20, 30], records) for layer in range(LAYERS)]
    assert test.landing.leased == 0


def test_a_layer_is_ready_while_the_next_is_still_copied(test: Bench) -> None:
    gate = test.pool.wait_before[1] = Event()
    index = test.start([test.part([0])])
    counter = test.loading.counter
    counter.set_consumer(index)
    counter.wait_until(0)
    assert [layer for layer, *_ in test.pool.copied] == [0]
    assert not counter.futures[index][1].done()
    gate.set()
    assert test.loading.finish(index)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_copy_that_fails_fails_its_load_and_no_other(layer: int, test: Bench) -> None:
    test.pool.fail_at = layer
    index = test.start([test.part([0]), test.part([1])])
    assert not test.loading.finish(index)
    assert test.landing.leased == 0
    test.pool.fail_at = None
    assert test.loading.finish(test.start([test.part([2])]))


def test_a_record_that_changed_fails_its_load_after_all_layers_were_there(test: Bench) -> None:
    part = test.part([0, 1])
    test.landing.records[part.lease.slots[1], 7] ^= 1
    assert not test.loading.finish(test.start([part]))
    assert len(test.pool.copied) == LAYERS
    assert test.damaged == [1]
    assert test.part([0, 1]).lease.slots[1] == NOWHERE  # not to be promised again


def test_a_page_that_is_not_there_any_more_fails_the_load(test: Bench) -> None:
    test.landing.empty()
    assert not test.loading.finish(test.start([test.part([0])]))
    assert test.pool.copied == []


def test_of_a_batch_that_never_was_nothing_failed(test: Bench) -> None:
    assert test.loading.finish(-1)


def test_settling_waits_for_what_is_loaded(test: Bench) -> None:
    gate = test.pool.wait_before[2] = Event()
    index = test.start([test.part([0])])
    returns_only_after(test.loading.settle, gate.set)
    assert len(test.pool.copied) == LAYERS
    assert test.loading.finish(index)  # nobody knows of it any more
    assert test.landing.leased == 0


def test_another_page_in_the_place_of_a_promised_one_fails_the_load(test: Bench) -> None:
    """The landing is emptied between two layers, and filled anew: what is there is whole, and not what was asked for."""
    gate = test.pool.wait_before[1] = Event()
    index = test.start([test.part([0, 1])])
    test.loading.counter.set_consumer(index)
    test.loading.counter.wait_until(0)
    test.landing.empty()
    room = test.landing.take(8)
    test.landing.records.fill_(5)
    names = [f"other {number}" for number in range(8)]
    test.landing.came(room, names, [name.encode().ljust(48) for name in names], [True] * 8)
    gate.set()
    assert not test.loading.finish(index)
    assert test.damaged == [2]


class Gate:
    """An event, or a stream, of a device that the test lets come true."""

    def __init__(self) -> None:
        self.device = "a gpu"
        self.asked, self.open = Event(), Event()

    def synchronize(self) -> None:
        self.asked.set()
        assert self.open.wait(SECONDS)


def test_nothing_is_copied_before_a_pass_under_way_has_written_what_it_writes(test: Bench) -> None:
    """SGLang gives out the places of a request that has ended while a forward pass still writes to them."""
    gates = [Gate(), Gate()]
    index = test.start([test.part([0])], gates)
    for gate in gates:
        assert gate.asked.wait(SECONDS)
        assert test.pool.copied == []
        gate.open.set()
    assert test.loading.finish(index)
    assert len(test.pool.copied) == LAYERS


@pytest.fixture
def device(sglang: None, monkeypatch: pytest.MonkeyPatch) -> tuple[Gate, list[Any]]:
    """A stream of a device in place of none, and the devices that were asked for one."""
    from lmcache_sglang.hicache import loading

    stream, asked = Gate(), list[Any]()

    class Own:
        @contextmanager
        def on(self, device: Any) -> Iterator[Gate]:
            asked.append(device)
            yield stream

    class Record:
        def record(self, on: Gate) -> None:
            assert on is stream

    monkeypatch.setattr(loading, "OwnStream", Own)
    monkeypatch.setattr(torch, "get_device_module", lambda _: type("Module", (), {"Event": Record}))
    return stream, asked


@pytest.mark.parametrize("fails", [False, True])
def test_a_load_ends_when_its_stream_has_come_to_its_end(
    fails: bool, device: tuple[Gate, list[Any]], test: Bench
) -> None:
    """Also one that fails: what was enqueued is still written to places that others get next."""
    stream, asked = device
    test.pool.fail_at = 1 if fails else None
    part = test.part([0, 1])
    index = test.start([part])
    assert stream.asked.wait(SECONDS)
    verdict = test.loading._verdicts[index]
    assert not verdict.done()
    assert test.landing.leased == 2
    assert asked == [part.indices.device]
    stream.open.set()
    assert test.loading.finish(index) is not fails
    assert verdict.result(SECONDS) is not fails
    assert test.landing.leased == 0
