"""Who may connect: the keys on the allow-list, asked at the handshake (ZAP, https://rfc.zeromq.org/spec/27/)."""

from __future__ import annotations

import logging

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ..seldom import Seldom
from .sockets import ZAP_DOMAIN

logger = logging.getLogger(__name__)


class Doorkeeper:
    """Answers for all CURVE sockets of a context, on a thread of its own.

    Args:
        allowed: public keys, Z85; may be replaced at any time.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.refused = 0
        self._seldom = Seldom()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key may come in; the name is pyzmq's."""
        name = key.decode("ascii", "replace")
        if name in self.allowed:
            return True
        self.refused += 1
        if self._seldom.due("key"):
            logger.warning(
                "lmcache: a connection with the key %s was refused: it is not on `allow` (%d so far)",
                name,
                self.refused,
            )
        return False

    def close(self) -> None:
        self._authenticator.stop()
