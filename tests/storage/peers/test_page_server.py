"""What an agent gives to whom, over real sockets: nobody holds up the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from ctypes import memset
from pathlib import Path

import pytest
import zmq

from lmcache_sglang.storage.base import NAMESPACE_BYTES, Lookup
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
def cpu(shared_memory: Path) -> Iterator[SlabTier]:
    (shared_memory / "there").mkdir()
    place = Place(shared_memory / "there" / "cpu", True)
    with closing(SlabTier(place, 96 << 20, SlabSettings())) as tier:
        memory = EngineMemory([bytes_of(key, SIZE) for key in KEYS])
        tier.put(KEYS, memory.segments)
        yield tier


@pytest.fixture
def holder(shared_memory: Path, cpu: SlabTier) -> Iterator[LoopbackNode]:
    """A node with little memory for sending, and some pages."""
    node = LoopbackNode(shared_memory / "there", cpu, ways=Ways(in_flight=IN_FLIGHT))
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


def shown_at(tier: SlabTier, key: bytes) -> int:
    """Where a page lies."""
    shown = tier.show([key], [SIZE])
    ((_, address, _),) = shown.pages
    tier.unshow(shown)
    return address


def test_pages_go_out_from_where_they_lie(
    holder: LoopbackNode, cpu: SlabTier, reader: PeerTier
) -> None:
    """The holder holds them meanwhile, and then no more: not even one that somebody else has in hand, which is copied."""
    other = cpu.show(KEYS[:1], [SIZE])
    with ExitStack() as undo:
        context = undo.enter_context(zmq.Context())
        undo.enter_context(ask_and_never_read(context, holder.known.address))
        wait_until(lambda: holder.pages.waiting == IN_FLIGHT // 2)
        held = cpu.show(KEYS, [SIZE] * len(KEYS))
        assert {place for place, _, _ in held.pages} < set(range(1, len(KEYS)))
        cpu.unshow(held)
        assert cpu.clear(KEYS[0][:NAMESPACE_BYTES]) == len(KEYS)
        assert cpu.check().ok
    wait_until(lambda: holder.pages.waiting == 0)
    cpu.unshow(other)
    wait_until(lambda: cpu.counts()["held"] == 0)
    assert cpu.check().ok


def test_what_is_damaged_here_is_found_by_who_reads_it_and_removed(
    cpu: SlabTier, reader: PeerTier, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: the holder does not become a liar by it."""
    memset(shown_at(cpu, KEYS[3]) + SIZE // 2, 0xAA, 1)
    came = read(reader, KEYS, SIZE)
    assert came[3] is Lookup.CORRUPT
    assert came.count(Lookup.HIT) >= 3
    wait_until(lambda: not any(cpu.exists(KEYS[3:4])))
    assert all(cpu.exists(KEYS[:3] + KEYS[4:]))
    wait_until(lambda: read(reader, KEYS[4:], SIZE) == [Lookup.HIT] * len(KEYS[4:]))
    assert not [each for each in caplog.records if "wrong bytes" in each.message]
