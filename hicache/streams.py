"""The device and the stream that a thread of ours copies on.

A thread's current device is its own, and in a new thread it is the first one: a rank of another GPU that forgets to
say so has its copies on one GPU and waits for a stream of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class OwnStream:
    """Of one thread and one device; made at its first use."""

    def __init__(self) -> None:
        self._stream: Any = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Any]:
        """All copies within are on one stream of this device, which is what it gives; None on a CPU, which has none."""
        if device.type == "cpu":
            yield None
            return
        module = torch.get_device_module(device)
        with module.device(device):
            self._stream = self._stream or module.Stream(device=device)
            with module.stream(self._stream):
                yield self._stream
