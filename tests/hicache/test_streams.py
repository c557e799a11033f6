"""The stream of a thread of ours: on the device of what it copies, whatever device a new thread begins with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.streams import OwnStream


class Devices:
    """As torch.cuda: a stack of what is current."""

    def __init__(self) -> None:
        self.current: list[Any] = []
        self.made: list[Any] = []

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        with self._push(device):
            yield

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        with self._push(stream):
            yield

    @contextmanager
    def _push(self, what: Any) -> Iterator[None]:
        self.current.append(what)
        yield
        self.current.pop()

    def Stream(self, *, device: Any) -> Any:  # torch's name
        self.made.append(device)
        return SimpleNamespace(device=device)


def test_the_device_and_the_stream_are_those_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices()
    monkeypatch.setattr(torch, "get_device_module", lambda _: devices)
    second = torch.device("cuda", 1)
    own = OwnStream()
    for _ in range(2):
        with own.on(second) as stream:
            assert stream.device == second
            assert devices.current == [second, stream]
    assert devices.current == []
    assert devices.made == [second]  # once


def test_a_cpu_has_none() -> None:
    with OwnStream().on(torch.device("cpu")) as stream:
        assert stream is None
