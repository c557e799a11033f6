"""The counter of layers where copies are only enqueued: a stand-in of a device's streams and events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

LAYERS = 2


class Device:
    """Notes what was recorded on which stream, and who waits for it."""

    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []
        said = self.said

        class Event:
            def record(self, stream: Any) -> None:
                self.stream = stream
                said.append(("record", stream.name))

            def wait(self) -> None:
                said.append(("wait", self.stream.name))

        self.Event = Event


@pytest.fixture
def device(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    return device


def test_the_forwards_stream_waits_for_a_layer_that_was_only_enqueued(device: Device) -> None:
    from lmcache_sglang.hicache.layer_counter import LayerCounter

    counter = LayerCounter(LAYERS)
    index = counter.update_producer()
    counter.set_consumer(index)
    stream = SimpleNamespace(name="copies", device="a gpu")
    for layer in range(LAYERS):
        counter.enqueued(index, layer, stream)
    assert device.said == [("record", "copies")] * LAYERS
    counter.wait_until(1)
    assert device.said[LAYERS:] == [("wait", "copies")]
    assert counter.finish(index)
    counter.wait_until(1)  # a batch that loaded nothing comes after it
    assert len(device.said) == LAYERS + 1


def test_an_event_is_there_before_anybody_is_told_of_its_layer(device: Device) -> None:
    from lmcache_sglang.hicache.layer_counter import LayerCounter

    counter = LayerCounter(LAYERS)
    index = counter.update_producer()
    told = []
    counter.futures[index][0].add_done_callback(lambda _: told.append(len(device.said)))
    counter.enqueued(index, 0, SimpleNamespace(name="copies", device="a gpu"))
    assert told == [1]
    assert (index, 0) in counter._events


def test_without_a_stream_there_is_nothing_to_wait_for(device: Device) -> None:
    from lmcache_sglang.hicache.layer_counter import LayerCounter

    counter = LayerCounter(LAYERS)
    index = counter.update_producer()
    counter.set_consumer(index)
    counter.enqueued(index, 0, None)
    counter.wait_until(0)
    assert device.said == []
    counter.fail(index, RuntimeError("told to"))
    assert not counter.finish(index)


def test_a_reset_forgets_the_events(device: Device) -> None:
    from lmcache_sglang.hicache.layer_counter import LayerCounter

    counter = LayerCounter(LAYERS)
    first = counter.update_producer()
    counter.enqueued(first, 0, SimpleNamespace(name="old", device="a gpu"))
    counter.reset()
    index = counter.update_producer()
    assert index == first
    counter.set_consumer(index)
    counter.enqueued(index, 0, None)
    counter.wait_until(0)
    assert ("wait", "old") not in device.said
