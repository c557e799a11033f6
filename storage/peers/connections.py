"""The sockets through which this process reads from peers: lent to one read at a time, and kept for the next."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom
from threading import Lock

import zmq

from ...errors import Reason, TierError
from .._native import Tally
from .keys import KeyPair
from .meter import Meter
from .sockets import asking

IDLE_SECONDS = 60.0  # after which a connection is closed


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a peer answers. Attributes: key: its public one; empty: not encrypted."""

    address: str
    key: str


@dataclass(eq=False, slots=True)
class Connection:
    """A socket that one read has to itself. Pass it to no other thread while it does."""

    peer: Peer
    socket: zmq.Socket[bytes]
    used: float  # when it was last given back
    taken: Tally  # of what came through it (meter.py)


class Connections:
    """All of one process.

    Args:
        keys: this node's.
        meter: of what comes through them.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: KeyPair,
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._keys = keys
        self.meter = meter
        self._clock = clock
        self._lock = Lock()
        self._idle: dict[Peer, list[Connection]] = defaultdict(list)
        # Also numbers of a process before this one must mean nothing to a server that still sends to it.
        self._numbers = itertools.count(SystemRandom().getrandbits(40))
        self._is_closed = False
        self._lent = 0

    @property
    def open(self) -> int:
        """Connections that there are, lent or not."""
        with self._lock:
            return self._lent + sum(map(len, self._idle.values()))

    def number(self) -> int:
        """Of a new request."""
        return next(self._numbers)

    def borrow(self, peer: Peer, count: int) -> list[Connection]:
        """So many connections to a peer, for one read. Give each of them back, or end it.

        Raises:
            TierError: there are no more sockets or descriptors.
        """
        with self._lock:
            idle = self._idle[peer]
            lent = [idle.pop() for _ in range(min(count, len(idle)))]
            self._lent += len(lent)
        try:
            while len(lent) < count:
                lent.append(self._connect(peer))
        except zmq.ZMQError as error:
            for connection in lent:
                self.give_back(connection)
            raise TierError("peers", Reason.IO, f"no connection can be made: {error}") from error
        return lent

    def _connect(self, peer: Peer) -> Connection:
        socket = asking(self._context, peer.address, peer.key, self._keys, self.meter)
        with self._lock:
            self._lent += 1
        return Connection(peer, socket, self._clock(), self.meter.taken(socket))

    def give_back(self, connection: Connection) -> None:
        connection.used = self._clock()
        with self._lock:
            self._lent -= 1
            if not self._is_closed:
                self._idle[connection.peer].append(connection)
                return
        self._close(connection)

    def end(self, connection: Connection, last_word_ms: int = 0) -> None:
        """Close one that was lent. Args: last_word_ms: that what was sent last has to leave."""
        with self._lock:
            self._lent -= 1
        self._close(connection, last_word_ms)

    def _close(self, connection: Connection, last_word_ms: int = 0) -> None:
        """With whatever is still on its way."""
        self.meter.forget(connection.socket)
        connection.socket.close(linger=last_word_ms)

    def tidy(self) -> None:
        """Close those that nobody used for a while."""
        long_ago = self._clock() - IDLE_SECONDS
        with self._lock:
            old = [c for each in self._idle.values() for c in each if c.used < long_ago]
            for connection in old:
                self._idle[connection.peer].remove(connection)
        for connection in old:
            self._close(connection)

    def close(self) -> None:
        """Close all that are not lent; those are when they are given back."""
        with self._lock:
            self._is_closed = True
            idle = [connection for each in self._idle.values() for connection in each]
            self._idle.clear()
        for connection in idle:
            self._close(connection)
