"""How the sockets of peers are made: their limits, their keys, their patience. One place for both sides."""

from __future__ import annotations

import zmq

from ..base import KEY_BYTES
from .keys import KeyPair
from .messages import MESSAGE_MOST, PAGES_MOST
from .meter import Meter

# Bytes of the largest message that is asked: a `Get`.
ASKED_MOST = PAGES_MOST * (KEY_BYTES + 8) + 4096
HANDSHAKE_MS = 3000  # longest that a connection may take to prove its key, before which it may say nothing else
ZAP_DOMAIN = "peers"  # under which the doorkeeper (auth.py) is asked
RECONNECT_MS, RECONNECT_MOST_MS = 100, 5000
QUEUE = 256  # messages of a connection in each direction; credit and `UNHEARD` keep them far below
HEARTBEAT_MS = 2000  # ZMTP's own, which finds a cut cable also where nothing is asked


def answering(
    context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair, meter: Meter
) -> zmq.Socket[bytes]:
    """The ROUTER that everybody connects to; to be bound. `meter.forget` it before it is closed."""
    socket = context.socket(zmq.ROUTER)
    _limit(socket, ASKED_MOST)
    meter.watch(socket)
    socket.router_mandatory = True  # who is gone is told of, instead of passed over
    socket.setsockopt(zmq.BACKLOG, 256)
    if keys:
        socket.curve_server = True
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.zap_domain = ZAP_DOMAIN.encode()
    return socket


def asking(
    context: zmq.Context[zmq.Socket[bytes]], address: str, key: str, keys: KeyPair, meter: Meter
) -> zmq.Socket[bytes]:
    """A DEALER, connected to a peer. `meter.forget` it before it is closed. Args: key: the peer's; empty: not encrypted.

    Raises:
        zmq.ZMQError: no socket, or no address.
    """
    socket = context.socket(zmq.DEALER)
    _limit(socket, MESSAGE_MOST)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MOST_MS)
    try:
        meter.watch(socket)
        if key:
            socket.curve_serverkey = key.encode()
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
        socket.connect(address)
    except zmq.ZMQError:
        meter.forget(socket)
        socket.close()
        raise
    return socket


def _limit(socket: zmq.Socket[bytes], largest: int) -> None:
    """Args: largest: bytes of a message that is let in; one that is larger ends its connection."""
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, largest)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
    socket.setsockopt(zmq.SNDHWM, QUEUE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
