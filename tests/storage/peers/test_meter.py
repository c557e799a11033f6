"""A peer that sends without end is cut, before it has filled the memory; one that sends what is taken is not."""

from __future__ import annotations

import os
import socket as tcp
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread

import pytest
import zmq

from lmcache_sglang.storage.peers import agent as agent_module
from lmcache_sglang.storage.peers import tier as tier_module
from lmcache_sglang.storage.peers.directory import Directory, PeerRecord
from lmcache_sglang.storage.peers.keys import NO_KEYS
from lmcache_sglang.storage.peers.messages import Ping, encode
from lmcache_sglang.storage.peers.meter import PART_BYTES, Meter, NoMeter, _counted, _cut, _known
from lmcache_sglang.storage.peers.sockets import answering, asking
from lmcache_sglang.storage.peers.standing import Standing
from lmcache_sglang.storage.peers.tags import tags_of
from lmcache_sglang.storage.peers.tier import HEAD, PeerLimits, PeerTier
from lmcache_sglang.testing.loopback_node import LoopbackNode
from lmcache_sglang.testing.tier_suite import read, some_keys
from lmcache_sglang.testing.waiting import wait_until

MIB = 1 << 20
MOST = 32 * MIB
PIECE = bytes(32 << 10)

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


def handshake(connection: tcp.socket, kind: bytes) -> None:
    """As ZMTP 3.0 wants it, without encryption: https://rfc.zeromq.org/spec/23/. libzmq sends no message before its end."""
    connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    body = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    connection.sendall(bytes([4, len(body)]) + body)


class Flood:
    """Parts of one message, without end, over a connection; a new one when it is cut, or takes no more."""

    def __init__(self, connect: Callable[[], tcp.socket], kind: bytes) -> None:
        self._connect, self._kind = connect, kind
        self._stop = Event()
        self._thread = Thread(target=self._send)

    def _send(self) -> None:
        piece = b"\x03" + len(PIECE).to_bytes(8, "big") + PIECE
        while not self._stop.is_set():
            with suppress(OSError), self._connect() as connection:
                handshake(connection, self._kind)
                connection.settimeout(0.1)
                while not self._stop.is_set():
                    connection.sendall(piece)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def to(address: str) -> Callable[[], tcp.socket]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return lambda: tcp.create_connection((host.strip("[]"), int(port)))


def memory() -> int:
    """Bytes of this process that are its own."""
    with Path("/proc/self/statm").open() as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGESIZE")


def until_cut(meter: Meter, look: Callable[[], object]) -> None:
    def is_cut() -> bool:
        look()
        return meter.cut > 0

    wait_until(is_cut)


def until_cut_again(meter: Meter) -> None:
    before = meter.cut
    wait_until(lambda: meter.cut > before)


def bound(context: Context, meter: Meter) -> tuple[Socket, str]:
    router = answering(context, NO_KEYS, meter)
    router.bind("tcp://127.0.0.1:0")
    endpoint = router.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return router, endpoint.rstrip(b"\0").decode()


def test_who_sends_parts_without_end_is_cut_and_others_are_not(context: Context) -> None:
    meter = Meter(MOST)
    router, address = bound(context, meter)
    honest = asking(context, address, "", NO_KEYS, NoMeter())
    honest.send(encode(Ping(1)))
    assert router.poll(10_000)
    route, _ = router.recv_multipart()
    with Flood(to(address), b"DEALER"):
        until_cut(meter, meter.look)
        assert meter.waiting < MIB
        router.send_multipart([route, b"still here"])
        assert honest.poll(10_000)
        assert honest.recv() == b"still here"
    honest.close()
    meter.forget(router)
    router.close()


def test_what_is_taken_does_not_wait(context: Context) -> None:
    meter = Meter(MOST)
    router, address = bound(context, meter)
    dealer = asking(context, address, "", NO_KEYS, meter)
    for _ in range(8):
        for _ in range(64):
            dealer.send(PIECE)
        for _ in range(64):
            assert router.poll(10_000)
            _, part = router.recv_multipart(copy=False)
            meter.took(router, int(part.get(zmq.SRCFD)), len(part) + PART_BYTES)
        assert meter.look() == 0
        assert meter.waiting < MIB
    for _ in range(64):  # and now nobody takes it
        dealer.send(PIECE)
    wait_until(lambda: meter.look() == 0 and meter.waiting >= 64 * len(PIECE))
    for each in (router, dealer):
        meter.forget(each)
        each.close()


def test_what_waited_at_a_socket_goes_with_it(context: Context) -> None:
    """Reads that were given up leave what was on its way."""
    meter = Meter(MOST)
    router, address = bound(context, NoMeter())
    for _ in range(3):
        dealer = asking(context, address, "", NO_KEYS, meter)
        dealer.send(b"hello")
        route, _ = router.recv_multipart()
        for _ in range(64):
            router.send_multipart([route, PIECE])
        wait_until(lambda: meter.look() == 0 and meter.waiting >= 64 * len(PIECE))
        assert meter.waiting < 2 * 64 * len(PIECE)
        meter.forget(dealer)
        dealer.close()
        meter.look()
        assert meter.waiting == 0
    router.close()


def test_who_is_taken_from_is_not_cut_for_another(context: Context) -> None:
    """However much more it brings."""
    meter = Meter(MOST)
    router, address = bound(context, meter)
    busy = asking(context, address, "", NO_KEYS, NoMeter())
    with Flood(to(address), b"DEALER"):
        while meter.cut < 3:
            busy.send(PIECE)
            assert router.poll(10_000)
            _, part = router.recv_multipart(copy=False)
            meter.took(router, int(part.get(zmq.SRCFD)), len(part) + PART_BYTES)
            meter.look()
    busy.send(b"still connected")
    assert router.poll(10_000)
    assert router.recv_multipart()[1] == b"still connected"
    for each in (busy, router):
        meter.forget(each)
        each.close()


def test_a_descriptor_that_is_anothers_by_now_is_let_alone(context: Context) -> None:
    meter = Meter(0)
    router, address = bound(context, meter)
    dealer = asking(context, address, "", NO_KEYS, NoMeter())
    dealer.send(b"x" * 1000)
    assert router.poll(10_000)
    with meter._lock:  # as `look` does before it counts
        (watched,) = meter._watched.values()
        (connection,) = list(_known(watched))
    ours, theirs = tcp.socketpair()
    connection.fd = ours.fileno()
    assert _counted(connection) == 0
    _cut(connection)
    theirs.send(b"hello")
    assert ours.recv(5) == b"hello"
    ours.close()
    theirs.close()
    for each in (router, dealer):
        meter.forget(each)
        each.close()


def test_an_agent_outlives_a_hostile_node(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it comes again."""
    monkeypatch.setattr(agent_module, "WAITING_MOST", MOST)
    node = LoopbackNode(shared_memory)
    before = memory()
    try:
        with Flood(to(node.known.address), b"DEALER"):
            for _ in range(12):
                assert memory() - before < 16 * MOST
                until_cut_again(node.agent.meter)
    finally:
        node.stop()
    assert "that nobody takes" in caplog.text


def test_an_engine_outlives_a_hostile_peer(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that it reads from: it has pages, it says, and then it talks and talks."""
    monkeypatch.setattr(tier_module, "UNASKED_MOST", MOST)
    keys = some_keys(4)
    with ExitStack() as undo:
        server = undo.enter_context(tcp.create_server(("127.0.0.1", 0)))
        directory = Directory.create(shared_memory / HEAD, 2 * MIB)
        undo.callback(directory.close)
        at = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        directory.set_record(0, PeerRecord("hostile", at, b"", Standing.LIVE, 1, 1))
        directory.believe(0)
        directory.beat()
        directory.put(0, tags_of(keys))
        limits = PeerLimits(window=MIB, deadline=8.0)
        tier = PeerTier(shared_memory, NO_KEYS, limits, refreshed=True)
        undo.callback(tier.close)
        tier.refresh()
        before = memory()
        undo.enter_context(Flood(lambda: server.accept()[0], b"ROUTER"))
        undo.callback(server.shutdown, tcp.SHUT_RDWR)
        done = Event()

        def keep_reading() -> None:
            while not done.wait(0.01):
                read(tier, keys, MIB)

        reading = Thread(target=keep_reading)
        reading.start()
        try:
            until_cut(tier._meter, lambda: _look(tier, before))
        finally:
            done.set()
            reading.join()
    assert "that nobody asked for" in caplog.text


def _look(tier: PeerTier, before: int) -> None:
    tier.meter()
    assert memory() - before < 16 * MOST
