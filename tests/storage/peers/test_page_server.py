"""What an agent gives to whom, over real sockets: nobody holds up the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import zmq

from lmcache_sglang.storage.base import Lookup
from lmcache_sglang.storage.peers.messages import VERSION, Get, encode
from lmcache_sglang.storage.peers.tier import PeerTier
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.settings import SlabSettings
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.loopback_node import LoopbackNode, Ways, holding
from lmcache_sglang.testing.tier_suite import EngineMemory, bytes_of, read, some_keys
from lmcache_sglang.testing.waiting import wait_until

SIZE = 1 << 20
KEYS = some_keys(32)
IN_FLIGHT = 8 << 20


@pytest.fixture
def holder(shared_memory: Path) -> Iterator[LoopbackNode]:
    """A node with little memory for sending, and some pages."""
    folder = shared_memory / "there"
    folder.mkdir()
    with closing(SlabTier(Place(folder / "cpu", True), 96 << 20, SlabSettings())) as tier:
        memory = EngineMemory([bytes_of(key, SIZE) for key in KEYS])
        tier.put(KEYS, memory.segments)
        node = LoopbackNode(folder, tier, ways=Ways(in_flight=IN_FLIGHT))
        try:
            yield node
        finally:
            node.stop()


@pytest.fixture
def reader(shared_memory: Path, holder: LoopbackNode) -> Iterator[PeerTier]:
    folder = shared_memory / "here"
    folder.mkdir()
    node = LoopbackNode(folder, peers=[holder.known])
    try:
        with closing(node.reader()) as tier:
            wait_until(lambda: holding(tier, KEYS))
            yield tier
    finally:
        node.stop()


def ask_and_never_read(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """For all pages, with more credit than there is memory."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.RCVBUF, 64 << 10)
    socket.connect(address)
    lengths = [SIZE] * len(KEYS)
    socket.send(encode(Get(VERSION, 1, b"".join(KEYS), lengths, SIZE, (1 << 40) - 1)))
    return socket


def test_who_does_not_read_what_he_asked_for_holds_half_at_most(
    holder: LoopbackNode, reader: PeerTier
) -> None:
    with ExitStack() as undo:
        context = undo.enter_context(zmq.Context())
        undo.enter_context(ask_and_never_read(context, holder.known.address))
        wait_until(lambda: holder.pages.waiting == IN_FLIGHT // 2)
        assert read(reader, KEYS, SIZE) == [Lookup.HIT] * len(KEYS)
        assert holder.pages.waiting == IN_FLIGHT // 2
