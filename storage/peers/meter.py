"""What lies in libzmq's queues: how much more the kernel brought than was taken out of them.

libzmq bounds how many messages wait (ZMQ_RCVHWM) and how large each part of one is (ZMQ_MAXMSGSIZE), but it delivers
a message whole, so of one with parts without end it keeps all that came. The kernel counts what came over a connection
(`tcpi_bytes_received`, tcp(7)), libzmq tells which connections there are (zmq_socket_monitor(3)), and whoever takes
messages counts them. Where the difference grows beyond a bound, the connection that brought most of late is cut; libzmq
gives back what it kept of it. Connections of one machine (`ipc`) are not counted.
"""

from __future__ import annotations

import os
import socket as tcp
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

import zmq
from zmq.utils.monitor import recv_monitor_message

from .._native import Tally

PART_BYTES = 64  # that a part takes beside its own bytes, on the wire and here: rather too much than too little
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_SO_COOKIE = 57  # asm-generic/socket.h: a number that no other socket of the machine gets
_INFO_BYTES, _RECEIVED_AT = 136, 128  # linux/tcp.h, struct tcp_info


@dataclass(eq=False, slots=True)
class _Connection:
    """One of libzmq's. Attributes: fd: whose number may be another's by now, which `cookie` tells."""

    fd: int
    cookie: bytes
    received: int = 0  # bytes, when last looked at
    lately: int = 0  # of these since the time before


@dataclass(slots=True)
class _Watched:
    """A socket. Attributes: events: where libzmq tells of its connections."""

    events: zmq.Socket[bytes]
    connections: dict[int, _Connection] = field(default_factory=dict)


class Meter:
    """All of one process, or of some of its sockets. Threads may share it; one of them calls `look`, again and again.

    Args:
        most: bytes that may wait.

    Attributes:
        most: may be changed; honest peers send less, as they are asked for less.
        taken: whoever receives messages adds their bytes to it, and `PART_BYTES` for each part.
        cut: connections, until now.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = Tally()
        self.cut = 0
        self._counted = 0  # of what was taken
        self._waiting = 0
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

    def forget(self, socket: zmq.Socket[bytes]) -> None:
        """No more; before it is closed."""
        with self._lock:
            watched = self._watched.pop(socket, None)
        if watched is not None:
            socket.disable_monitor()
            watched.events.close()

    def look(self) -> int:
        """See what waits, and cut a connection if it is too much. Returns: bytes that were too much; mostly 0."""
        with self._lock:
            connections = [each for watched in self._watched.values() for each in _known(watched)]
        came = sum(map(_counted, connections))
        taken = self.taken.total
        self._waiting = max(0, self._waiting + came - (taken - self._counted))
        self._counted = taken
        if self._waiting <= self.most or not connections:
            return 0
        too_much, self._waiting = self._waiting - self.most, 0
        _cut(max(connections, key=lambda each: each.lately))
        self.cut += 1
        return too_much


class NoMeter(Meter):
    """Of a process in which nobody looks: sockets that are not watched tell nobody of their connections."""

    def __init__(self) -> None:
        super().__init__(0)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        pass

    def look(self) -> int:
        return 0


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
    with tcp.socket(fileno=os.dup(fd)) as same:
        return same.getsockopt(tcp.SOL_SOCKET, _SO_COOKIE, 8)


def _counted(connection: _Connection) -> int:
    """Bytes that came since the last time."""
    connection.lately = 0
    with suppress(OSError), tcp.socket(fileno=os.dup(connection.fd)) as same:
        if same.getsockopt(tcp.SOL_SOCKET, _SO_COOKIE, 8) != connection.cookie:
            return 0
        info = same.getsockopt(tcp.IPPROTO_TCP, tcp.TCP_INFO, _INFO_BYTES)
        (received,) = struct.unpack_from("<Q", info, _RECEIVED_AT)
        connection.lately = received - connection.received
        connection.received = received
    return connection.lately


def _cut(connection: _Connection) -> None:
    with suppress(OSError), tcp.socket(fileno=os.dup(connection.fd)) as same:
        if same.getsockopt(tcp.SOL_SOCKET, _SO_COOKIE, 8) == connection.cookie:
            same.shutdown(tcp.SHUT_RDWR)
