"""A gate that operations pass through, and that closing waits behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

from ..errors import Reason, TierError


class Gate:
    """Counts the operations inside, so that a resource is not pulled from under one of them."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._changed = Condition()
        self._inside = 0
        self._shut: str | None = None  # why, once it is

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Raises `TierError` (CLOSED) once the gate is shut."""
        with self._changed:
            if self._shut is not None:
                raise TierError(self._tier, Reason.CLOSED, self._shut)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def shut(self, why: str) -> bool:
        """Let nothing in from now on; whether this call is the one that shut it."""
        with self._changed:
            first = self._shut is None
            self._shut = self._shut or why
            return first

    def wait_empty(self, timeout: float) -> bool:
        """Wait until nothing is inside; False when the time (seconds) ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, timeout)
