"""Saying a thing once a minute instead of a thousand times a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from threading import Lock

EVERY_SECONDS = 60.0


class Seldom:
    """When each kind of message was last said. Threads may share it.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._said: dict[Hashable, float] = {}

    def due(self, kind: Hashable) -> bool:
        """Whether to say it now; if so, it counts as said."""
        with self._lock:
            now = self._clock()
            if now - self._said.get(kind, float("-inf")) < EVERY_SECONDS:
                return False
            self._said[kind] = now
            return True
