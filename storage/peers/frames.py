"""Pages out to peers: from a server's memory to its ROUTER, without a copy.

    pool.take(bytes) -> buffer         read pages into it, or have it keep pages that are shown where they lie
    frames.send(socket)                by the thread that has the socket, as often as it takes

libzmq refers to the buffer until the last of its frames has left, and keeps it alive that long; it comes back to
its pool when the server let go of it, too. What was shown with it is in `pool.seen()` then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import zmq

from .. import _native
from .._native import SendBuffer as SendBuffer  # noqa: PLC0414  # callers take them from here
from .._native import SendPool as SendPool  # noqa: PLC0414
from .libzmq import libzmq


class Sent(IntEnum):
    """How far a call came. The values are those of the native side.

    When a route that is full takes more is not told: a ROUTER is writable as soon as any route of it is. One whose
    ZMQ_SNDHWM is 0 is never full; credit and the pool then bound what waits.
    """

    ALL = 0  # libzmq has every frame
    FULL = 1  # it takes no more for this route now; try again after a while
    GONE = 2  # nobody is there any more: forget the request
    BROKEN = 3  # the socket cannot be used


class Outgoing(NamedTuple):
    """A page that lies in one piece. Attributes: place: in the `Get`. checksum: of the whole page, under its key."""

    place: int
    address: int
    bytes: int
    checksum: int


@dataclass(slots=True)
class Frames:
    """Pages of one `Get` on their way out. The bytes must not change while `buffer.in_use`.

    Attributes:
        route: whom they go to, as the ROUTER names it.
        request: its number.
        pages: in the buffer, or shown with it.
        sent: frames that libzmq has.
    """

    route: bytes
    request: int
    buffer: SendBuffer
    pages: Sequence[Outgoing]
    frame: int
    sent: int = field(default=0, init=False)

    def send(self, socket: zmq.Socket[bytes]) -> Sent:
        """Hand libzmq as much as it takes now.

        Args:
            socket: a ROUTER with ZMQ_ROUTER_MANDATORY: without it, frames that do not fit are dropped.

        Raises:
            ConfigError: libzmq cannot be used.
            ValueError: the buffer does not have a page, or the socket is closed.
        """
        outcome, self.sent = _native.send_frames(
            libzmq(),
            0 if socket.closed else socket.underlying,
            self.route,
            self.request,
            self.buffer,
            self.pages,
            self.frame,
            self.sent,
        )
        return Sent(outcome)
