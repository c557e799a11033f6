"""Connections that reads borrow."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import zmq

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.peers import connections as module
from lmcache_sglang.storage.peers.connections import IDLE_SECONDS, Connections, Peer
from lmcache_sglang.storage.peers.keys import NO_KEYS
from lmcache_sglang.storage.peers.meter import NoMeter
from lmcache_sglang.storage.peers.sockets import asking
from tests.storage.clock import Clock

PEER = Peer("tcp://127.0.0.1:1", "")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connections(clock: Clock) -> Iterator[Connections]:
    with zmq.Context() as context:
        made = Connections(context, NO_KEYS, NoMeter(), clock)
        yield made
        made.close()


def test_what_is_given_back_is_lent_again_and_to_one_reader_only(connections: Connections) -> None:
    first, second = connections.borrow(PEER, 2)
    assert first.socket is not second.socket
    connections.give_back(first)
    (again, new) = connections.borrow(PEER, 2)
    assert again is first
    assert new is not second
    for each in (again, new, second):
        connections.give_back(each)


def test_who_idles_is_closed(connections: Connections, clock: Clock) -> None:
    (connection,) = connections.borrow(PEER, 1)
    connections.give_back(connection)
    clock.now += IDLE_SECONDS - 1
    connections.tidy()
    assert not connection.socket.closed
    clock.now += 2
    connections.tidy()
    assert connection.socket.closed


def test_numbers_are_never_the_same(connections: Connections) -> None:
    assert len({connections.number() for _ in range(1000)}) == 1000


def test_what_is_given_back_after_the_end_is_closed(connections: Connections) -> None:
    (connection,) = connections.borrow(PEER, 1)
    connections.close()
    connections.give_back(connection)
    assert connection.socket.closed


def test_without_sockets_a_read_fails_as_a_tiers_does(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[zmq.Socket[bytes]] = []

    def scarce(*given: object) -> zmq.Socket[bytes]:
        if len(made) == 2:
            raise zmq.ZMQError(errno.EMFILE)
        made.append(asking(*given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(module, "asking", scarce)
    with pytest.raises(TierError) as caught:
        connections.borrow(PEER, 5)
    assert caught.value.reason is Reason.IO
    lent = connections.borrow(PEER, 2)
    assert [each.socket for each in lent] == made[::-1], "those that were made are lost"
    for each in lent:
        connections.give_back(each)


def test_no_address_is_a_failure_and_leaves_nothing_open(connections: Connections) -> None:
    with pytest.raises(TierError):
        connections.borrow(Peer("nonsense", ""), 1)
