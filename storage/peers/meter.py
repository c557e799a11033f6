"""What lies in libzmq's queues: how much more the kernel brought than was taken out of them.

libzmq bounds how many messages wait (ZMQ_RCVHWM) and how large each part of one is (ZMQ_MAXMSGSIZE), but it delivers
a message whole, so of one with parts without end it keeps all that came. The kernel counts what came over a connection
(`tcpi_bytes_received`, tcp(7)), libzmq tells which connections there are (zmq_socket_monitor(3)), and whoever takes
messages counts them, for each connection. Where the difference grows beyond a bound, the connection with most of it is
cut; libzmq gives back what it kept of it. Connections of one machine (`ipc`) are not counted.
"""

from __future__ import annotations

import os
import socket as tcp
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

import zmq
from zmq.utils.monitor import recv_monitor_message

from .._native import Tally

PART_BYTES = 64  # that a part takes beside its own bytes, on the wire and here: rather too much than too little
HEARTBEAT_BYTES = 64  # a second, that libzmq's own pings bring over a connection and nobody takes: rather too many
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_SO_COOKIE = 57  # asm-generic/socket.h: a number that no other socket of the machine gets
_INFO_BYTES, _RECEIVED_AT = 136, 128  # linux/tcp.h, struct tcp_info


@dataclass(eq=False, slots=True)
class _Connection:
    """One of libzmq's. Attributes: fd: whose number may be another's by now, which `cookie` tells."""

    fd: int
    cookie: bytes
    received: int = 0  # bytes, when last looked at
    waiting: int = 0  # of these, by then

    def account(self, came: int, taken: int) -> int:
        """Returns: what is taken beyond what waits: it came over another connection of the socket, or was counted
        too much."""
        left = self.waiting + came - taken
        self.waiting = max(0, left)
        return max(0, -left)


@dataclass(slots=True)
class _Watched:
    """A socket.

    Attributes:
        events: where libzmq tells of its connections.
        taken: bytes, whichever connection they came over.
        counted: of those.
        by: bytes taken since the last look, by the connection's descriptor.
    """

    events: zmq.Socket[bytes]
    connections: dict[int, _Connection] = field(default_factory=dict)
    taken: Tally = field(default_factory=Tally)
    counted: int = 0
    by: Counter[int] = field(default_factory=Counter)


class Meter:
    """All of one process, or of some of its sockets. Threads may share it; one of them calls `look`, again and again.

    Args:
        most: bytes that may wait.

    Attributes:
        most: may be changed; honest peers send less, as they are asked for less.
        cut: connections, until now.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.cut = 0
        self._waiting = 0
        self._looked = time.monotonic()
        self._lock = Lock()
        self._watched: dict[zmq.Socket[bytes], _Watched] = {}

    @property
    def waiting(self) -> int:
        """Bytes, as of the last look."""
        return self._waiting

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """From now on; before it is bound or connected. Raises: zmq.ZMQError: there are no more sockets."""
        events = socket.get_monitor_socket(_EVENTS)
        events.linger = 0
        with self._lock:
            self._watched[socket] = _Watched(events)

    def taken(self, socket: zmq.Socket[bytes]) -> Tally:
        """Whoever receives messages from a socket with one peer adds their bytes to it, and `PART_BYTES` for each part."""
        with self._lock:
            return self._watched[socket].taken

    def took(self, socket: zmq.Socket[bytes], fd: int, size: int) -> None:
        """The same of a socket with many peers. Args: fd: of the connection (ZMQ_SRCFD)."""
        with self._lock:
            self._watched[socket].by[fd] += size

    def forget(self, socket: zmq.Socket[bytes]) -> None:
        """No more; before it is closed. What waits there goes with it."""
        with self._lock:
            watched = self._watched.pop(socket, None)
        if watched is not None:
            socket.disable_monitor()
            watched.events.close()

    def look(self) -> int:
        """See what waits, and cut connections if it is too much. Returns: bytes that were too much; mostly 0."""
        now = time.monotonic()
        pings, self._looked = int((now - self._looked) * HEARTBEAT_BYTES) + 1, now
        with self._lock:
            connections = [
                each for watched in self._watched.values() for each in _accounted(watched, pings)
            ]
        self._waiting = sum(each.waiting for each in connections)
        too_much = max(0, self._waiting - self.most)
        while self._waiting > self.most:
            worst = max(connections, key=lambda each: each.waiting)
            _cut(worst)
            self._waiting -= worst.waiting
            worst.waiting = 0
            self.cut += 1
        return too_much


class NoMeter(Meter):
    """Of a process in which nobody looks: sockets that are not watched tell nobody of their connections."""

    def __init__(self) -> None:
        super().__init__(0)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        pass

    def taken(self, socket: zmq.Socket[bytes]) -> Tally:
        return Tally()

    def took(self, socket: zmq.Socket[bytes], fd: int, size: int) -> None:
        pass

    def look(self) -> int:
        return 0


def _accounted(watched: _Watched, pings: int) -> list[_Connection]:
    """A socket's connections, with what waits of each now. Args: pings: bytes of each, since the last look."""
    # What was taken first: all of that has come by the time when what came is looked at.
    by, watched.by = watched.by, Counter()
    total = watched.taken.total
    taken, watched.counted = total - watched.counted, total
    connections = list(_known(watched))
    for each in connections:
        came = max(0, _counted(each) - pings)
        each.account(came, by[each.fd])  # counted too much, it helps no other connection
        taken = each.account(0, taken)
    return connections


def _known(watched: _Watched) -> Iterator[_Connection]:
    """A socket's connections, once what libzmq told has been heard."""
    with suppress(zmq.Again):
        while True:
            told = recv_monitor_message(watched.events, zmq.DONTWAIT)
            fd = int(told["value"])
            if told["event"] in (zmq.EVENT_ACCEPTED, zmq.EVENT_CONNECTED):
                with suppress(OSError):  # it ended meanwhile
                    watched.connections[fd] = _Connection(fd, _cookie(fd))
            else:
                watched.connections.pop(fd, None)
    yield from watched.connections.values()


def _cookie(fd: int) -> bytes:
    with _same(fd) as same:
        return same.getsockopt(tcp.SOL_SOCKET, _SO_COOKIE, 8)


def _same(fd: int) -> tcp.socket:
    """Another descriptor of libzmq's. Raises: OSError: it is none of a socket by now."""
    copy = os.dup(fd)
    try:
        return tcp.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _counted(connection: _Connection) -> int:
    """Bytes that came since the last time."""
    with suppress(OSError), _same(connection.fd) as same:
        if same.getsockopt(tcp.SOL_SOCKET, _SO_COOKIE, 8) != connection.cookie:
            return 0
        info = same.getsockopt(tcp.IPPROTO_TCP, tcp.TCP_INFO, _INFO_BYTES)
        (received,) = struct.unpack_from("<Q", info, _RECEIVED_AT)
        came: int = received - connection.received
        connection.received = received
        return came
    return 0


def _cut(connection: _Connection) -> None:
    with suppress(OSError), _same(connection.fd) as same:
        if same.getsockopt(tcp.SOL_SOCKET, _SO_COOKIE, 8) == connection.cookie:
            same.shutdown(tcp.SHUT_RDWR)
