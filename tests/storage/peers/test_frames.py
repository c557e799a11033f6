"""Pages out of a server's memory: as the protocol says, without a copy, and the memory is kept that long."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from lmcache_sglang.storage.base import Limits
from lmcache_sglang.storage.peers.fetch import Came, Stream, fetch
from lmcache_sglang.storage.peers.frames import (
    Frames,
    Outgoing,
    SendBuffer,
    SendPool,
    Sent,
)
from lmcache_sglang.storage.peers.messages import Get, encode
from lmcache_sglang.testing.tier_suite import EngineMemory, bytes_of, some_keys
from tests.storage.peers.scripted_peer import (
    FRAME,
    SOON,
    Conversation,
    Parts,
    checksum,
    frames,
    peer,
)

MIB = 1 << 20
UNIT = 2 * MIB  # a buffer's size is a multiple
SIZES = [3 * FRAME, 3 * FRAME + 1, 1, FRAME - 1, FRAME]
KEYS = some_keys(len(SIZES))
CONTENTS = [bytes_of(key, size) for key, size in zip(KEYS, SIZES, strict=True)]
GET = Get(1, 2**40, b"".join(KEYS), SIZES, FRAME, 1 << 30)
EXPECTED = frames(GET, CONTENTS)

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


def taken(pool: SendPool, size: int) -> SendBuffer:
    buffer = pool.take(size)
    assert buffer is not None
    return buffer


def outgoing(pool: SendPool, route: bytes) -> Frames:
    """The answer to `GET`, in a new buffer, with gaps between the pages."""
    buffer = taken(pool, sum(SIZES) + 100 * len(SIZES))
    pages, end = list[Outgoing](), 0
    for place, (key, content) in enumerate(zip(KEYS, CONTENTS, strict=True)):
        pages.append(Outgoing(place, buffer.address + end, len(content), checksum(key, content)))
        ctypes.memmove(buffer.address + end, content, len(content))
        end += len(content) + 100
    return Frames(route, GET.request, buffer, pages, FRAME)


class Pair:
    """A server's ROUTER, and one DEALER that it knows. No more than `most` frames wait on each side."""

    def __init__(self, context: Context, most: int = 1000) -> None:
        self.router, self.dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        self.router.router_mandatory = True
        self.router.sndhwm = self.dealer.rcvhwm = most
        self.router.linger = self.dealer.linger = 0
        self.router.bind("inproc://pair")
        self.dealer.connect("inproc://pair")
        self.dealer.send(b"")
        self.route = self.router.recv_multipart()[0]

    def receive(self) -> Parts:
        assert self.dealer.poll(int(SOON * 1e3))
        return self.dealer.recv_multipart()

    def close(self) -> None:
        self.router.close()
        self.dealer.close()


@pytest.fixture
def pair(context: Context) -> Iterator[Pair]:
    made = Pair(context)
    yield made
    made.close()


@pytest.fixture
def narrow(context: Context) -> Iterator[Pair]:
    made = Pair(context, most=1)
    yield made
    made.close()


def hear(pool: SendPool) -> None:
    """Wait for the bell."""
    poller = zmq.Poller()
    poller.register(pool.fileno(), zmq.POLLIN)
    assert poller.poll(int(SOON * 1e3))
    pool.hear()
    assert not poller.poll(0)


def test_frames_are_those_of_the_protocol(pair: Pair) -> None:
    going = outgoing(SendPool(UNIT), pair.route)
    assert going.send(pair.router) is Sent.ALL
    assert going.sent == len(EXPECTED)
    assert [pair.receive() for _ in EXPECTED] == EXPECTED


def test_what_does_not_fit_goes_later(narrow: Pair) -> None:
    """Each frame once, and whole, in however many pieces."""
    going = outgoing(SendPool(UNIT), narrow.route)
    received = list[Parts]()
    while (outcome := going.send(narrow.router)) is Sent.FULL:
        assert len(received) < going.sent < len(EXPECTED)
        received.append(narrow.receive())
        assert narrow.router.poll(int(SOON * 1e3), zmq.POLLOUT)
    assert outcome is Sent.ALL
    received += [narrow.receive() for _ in EXPECTED[len(received) :]]
    assert received == EXPECTED
    assert len(received) == going.sent


def test_a_receiver_that_is_gone_is_told(pair: Pair) -> None:
    going = outgoing(SendPool(UNIT), b"nobody")
    assert going.send(pair.router) is Sent.GONE
    assert going.sent == 0
    assert not going.buffer.in_use


def test_a_socket_that_cannot_send_is_broken(context: Context) -> None:
    with context.socket(zmq.PULL) as socket:
        assert outgoing(SendPool(UNIT), b"x").send(socket) is Sent.BROKEN


def test_memory_is_kept_until_the_last_frame_has_left(pair: Pair) -> None:
    """Although the server let go of it, and of its pool."""
    pool = SendPool(UNIT)
    going = outgoing(pool, pair.route)
    assert not going.buffer.in_use
    going.send(pair.router)
    assert going.buffer.in_use
    del going
    gc.collect()
    assert pool.bytes_lent == UNIT
    assert pool.take(1) is None
    pool = SendPool(UNIT)
    other = taken(pool, UNIT)  # would be the same memory
    ctypes.memset(other.address, 0xEE, UNIT)
    assert [pair.receive() for _ in EXPECTED] == EXPECTED


def test_the_bell_rings_when_a_buffer_came_back(pair: Pair) -> None:
    pool = SendPool(UNIT)
    going = outgoing(pool, pair.route)
    going.send(pair.router)
    del going
    for _ in EXPECTED:
        pair.receive()
    hear(pool)
    assert pool.bytes_lent == 0
    assert taken(pool, UNIT).size == UNIT


def test_a_receiver_that_dies_gives_all_back(context: Context) -> None:
    """Over TCP, where frames wait in the I/O thread."""
    pool = SendPool(UNIT)

    def script(conversation: Conversation) -> None:
        conversation.hear()
        going = outgoing(pool, conversation.route)
        assert going.send(conversation.router) is Sent.ALL

    with peer(context, script) as one:
        with one.connected() as socket:
            socket.send(encode(GET))
            assert socket.poll(int(SOON * 1e3))
        hear(pool)
    assert pool.bytes_lent == 0


@pytest.mark.parametrize("transport", ["inproc", "tcp"])
def test_what_is_sent_is_what_is_fetched(context: Context, transport: str) -> None:
    pool = SendPool(UNIT)

    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        going = outgoing(pool, conversation.route)
        going.request = get.request
        assert going.send(conversation.router) is Sent.ALL

    memory = EngineMemory.blank(SIZES, per_page=2)
    address = {"inproc": "inproc://peer", "tcp": "tcp://127.0.0.1:*"}[transport]
    with peer(context, script, address) as one, one.connected() as socket:
        stream = Stream(socket, 5, range(len(KEYS)), FRAME, 1 << 30, SOON)
        fetched = fetch([stream], KEYS, memory.segments, Limits.within(SOON))
    assert fetched.pages == [Came.HIT] * len(KEYS)
    assert [memory.page(page) for page in range(len(KEYS))] == CONTENTS
    assert memory.guards_hold()


class TestPool:
    def test_it_knows_what_each_owner_has(self) -> None:
        pool = SendPool(4 * UNIT)
        mine = [pool.take(1, 7), pool.take(UNIT, 7)]
        theirs = pool.take(2 * UNIT, 8)
        assert [pool.bytes_lent_to(owner) for owner in (7, 8, 9)] == [2 * UNIT, 2 * UNIT, 0]
        mine.pop()
        del theirs
        assert [pool.bytes_lent_to(owner) for owner in (7, 8, 9)] == [UNIT, 0, 0]
        again = pool.take(UNIT, 9)
        assert again is not None
        assert pool.bytes_lent_to(9) == again.size

    def test_it_never_makes_more_than_its_bytes(self) -> None:
        pool = SendPool(3 * UNIT)
        buffers = [taken(pool, size) for size in (1, UNIT, UNIT - 1)]
        assert [buffer.size for buffer in buffers] == [UNIT] * 3
        assert pool.bytes_lent == 3 * UNIT
        assert pool.take(1) is None
        del buffers[1]
        assert pool.take(UNIT + 1) is None
        assert taken(pool, UNIT).size == UNIT

    def test_memory_is_used_again(self) -> None:
        pool = SendPool(3 * UNIT)
        first = taken(pool, UNIT)
        address = first.address
        assert address % 4096 == 0
        del first
        assert taken(pool, UNIT // 2 + 1).address == address

    def test_free_buffers_make_room_for_one_of_another_size(self) -> None:
        pool = SendPool(3 * UNIT)
        buffers = [taken(pool, UNIT) for _ in range(3)]
        del buffers[:]
        large = taken(pool, 3 * UNIT)
        assert (large.size, pool.bytes_lent) == (3 * UNIT, 3 * UNIT)
        ctypes.memset(large.address, 1, large.size)

    @pytest.mark.parametrize("size", [0, UNIT + 1, 2**63, 2**64 - 1])
    def test_what_can_never_be_had_is_a_mistake(self, size: int) -> None:
        with pytest.raises(ValueError, match="beyond the pool"):
            SendPool(UNIT).take(size)

    def test_a_buffer_outlives_its_pool(self) -> None:
        buffer = taken(SendPool(UNIT), UNIT)
        gc.collect()
        ctypes.memset(buffer.address, 1, buffer.size)
        assert not buffer.in_use

    def test_threads_may_take_and_let_go(self) -> None:
        """Each gets what is whole, and each gets on, though the others may hold all there is for a while."""
        pool = SendPool(4 * UNIT)

        def work(seed: int) -> list[bool]:
            sizes, kept = random.Random(seed), list[bool]()
            for _ in range(1_000_000):
                buffer = pool.take(sizes.randrange(1, 3 * UNIT))
                if buffer is None:
                    time.sleep(0)  # nobody tells when there is room; another thread's turn
                    continue
                ctypes.memset(buffer.address, seed, 64)
                kept.append(ctypes.string_at(buffer.address, 64) == bytes([seed]) * 64)
                if len(kept) == 100:
                    break
            return kept

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(work, range(1, 5))) == [[True] * 100] * 4
        assert pool.bytes_lent == 0
        assert taken(pool, 4 * UNIT).size == 4 * UNIT


class TestMistakesOfTheCaller:
    @pytest.mark.parametrize("offset", [UNIT, UNIT - SIZES[0] + 1, -1, -(2**33)])
    def test_a_page_beyond_its_buffer(self, pair: Pair, offset: int) -> None:
        going = outgoing(SendPool(UNIT), pair.route)
        going.pages = [Outgoing(0, going.buffer.address + offset, SIZES[0], 0)]
        with pytest.raises(ValueError, match="beyond its buffer"):
            going.send(pair.router)

    def test_a_closed_socket(self, pair: Pair) -> None:
        going = outgoing(SendPool(UNIT), pair.route)
        pair.close()
        with pytest.raises(ValueError, match="closed"):
            going.send(pair.router)
