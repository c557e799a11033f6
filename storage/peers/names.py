"""Peers under a DNS name: every address of a headless Kubernetes service, say, is one."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import TypeAlias

from .addresses import TcpAddress

logger = logging.getLogger(__name__)

KEPT_SECONDS = 600.0  # that the last answer counts while there is no other
CLOSE_SECONDS = 1.0  # that a look-up under way is waited for; nothing can end it
EMPTY = (socket.EAI_NODATA, socket.EAI_ADDRFAMILY)  # there is such a name, and nobody has it now


@dataclass(frozen=True, slots=True)
class Answer:
    """What the name stands for now, which may be nothing."""

    addresses: frozenset[str]


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Nobody could say, or there is no such name."""

    reason: str


Outcome: TypeAlias = Answer | NoAnswer
Resolve: TypeAlias = Callable[[str, int], Outcome]


def resolve(name: str, port: int) -> Outcome:
    """Ask the system. May take many seconds, in which nothing can end it."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in EMPTY:
            return Answer(frozenset())
        return NoAnswer(error.strerror or str(error))
    except (OSError, UnicodeError) as error:  # UnicodeError: no name at all
        return NoAnswer(str(error))
    return Answer(frozenset(str(TcpAddress(str(where[0]), port)) for *_, where in found))


class NameWatch:
    """Looks a name up again and again, on a thread of its own.

    Args:
        every: seconds between two looks.
        told: called on that thread with the addresses when they are others than before; must not raise.
        known: what the name stood for when it was looked up before.
        resolve: asks; another one in tests.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        name: str,
        port: int,
        every: float,
        told: Callable[[frozenset[str]], None],
        known: frozenset[str] = frozenset(),
        *,
        resolve: Resolve = resolve,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._port = port
        self._every = every
        self._told = told
        self._resolve = resolve
        self._clock = clock
        self._addresses = known
        self._answered_at = clock()
        self._fails = False
        self._stop = Event()
        self._thread = Thread(target=self._run, name="lmcache-names", daemon=True)

    def is_of(self, name: str, port: int) -> bool:
        return (self.name, self._port) == (name, port)

    @property
    def addresses(self) -> frozenset[str]:
        """Those that count. Any thread may ask."""
        return self._addresses

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Look no more; a look-up that is under way is left alone. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def look(self) -> None:
        """Ask once. `start` does so again and again."""
        outcome = self._resolve(self.name, self._port)
        if not self._stop.is_set():
            self._take(outcome)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.look()
            self._stop.wait(self._every)

    def _take(self, outcome: Outcome) -> None:
        now = self._clock()
        match outcome:
            case Answer(addresses):
                self._fails = False
                self._answered_at = now
                self._become(addresses)
            case NoAnswer(reason):
                if not self._fails:
                    logger.warning("lmcache: no peers under %s: %s", self.name, reason)
                self._fails = True
                if now - self._answered_at > KEPT_SECONDS:
                    self._become(frozenset())

    def _become(self, addresses: frozenset[str]) -> None:
        if addresses != self._addresses:
            self._addresses = addresses
            self._told(addresses)
