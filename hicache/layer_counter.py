"""Which layers of a load are there: what SGLang's attention waits for before it reads one."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter


class LayerCounter(LayerWiseLoadCounter):  # type: ignore[misc]  # SGLang is not typed
    """SGLang's counter, with an event of the device for each layer.

    SGLang's own blocks the thread that enqueues the forward pass until a layer has come. With an event the copy of
    a layer need only have been enqueued: the forward's stream waits for it, and the thread goes on.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self._events: dict[tuple[int, int], Any] = {}

    def enqueued(self, index: int, layer: int, stream: Any) -> None:
        """One layer of a load is on its way. Args: stream: of its copies; None: it is there."""
        if stream is not None:
            event = torch.get_device_module(stream.device).Event()
            event.record(stream)
            self._events[index, layer] = event
        self.complete(index, layer)

    def wait_until(self, threshold: int) -> None:
        """Called within the forward pass, before the first look at a layer's pages."""
        super().wait_until(threshold)
        event = self._events.get((self.consumer_index, threshold))
        if event is not None:
            event.wait()  # on the forward's stream, not here

    def finish(self, index: int) -> bool:
        """Whether every layer was enqueued; that they came is said by the thread that enqueued them."""
        is_whole = bool(super().finish(index))
        for layer in range(self.num_layers):
            self._events.pop((index, layer), None)
        return is_whole

    def reset(self) -> None:
        super().reset()
        self._events.clear()
