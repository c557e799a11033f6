"""Memory for the tables of launches that the GPU has not passed yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

SMALLEST = 64 << 10  # bytes: tables of about 2,000 pages on both sides
MOST_UNDER_WAY = 64  # launches, before the next one waits for the first of them


class Passed(Protocol):
    """An event of a stream; torch's are."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Area:
    """Memory in two places.

    Attributes:
        host: address of what the CPU writes, pinned.
        device: address of as much on the GPU.
        size: bytes of each.
        owner: keeps both.
    """

    host: int
    device: int
    size: int
    owner: object = None


class Staging:
    """Areas, taken for a launch and taken again when the GPU is past it. Safe for many threads.

    Args:
        make: a new area of at least so many bytes.
    """

    def __init__(self, make: Callable[[int], Area]) -> None:
        self._make = make
        self._lock = Lock()
        self._free: list[Area] = []
        self._busy: deque[tuple[Area, Passed]] = deque()

    def take(self, size: int) -> Area:
        """An area that nothing uses. Waits for the GPU where too much is under way."""
        with self._lock:
            self._collect()
            for i, area in enumerate(self._free):
                if area.size >= size:
                    return self._free.pop(i)
        return self._make(max(SMALLEST, 1 << (size - 1).bit_length()))

    def give(self, area: Area, passed: Passed) -> None:
        """Back, to be taken again after this event."""
        with self._lock:
            self._busy.append((area, passed))

    def drain(self) -> None:
        """Waits until the GPU uses none of it."""
        with self._lock:
            for _, passed in self._busy:
                passed.synchronize()
            self._collect()

    def _collect(self) -> None:
        while len(self._busy) > MOST_UNDER_WAY:
            area, passed = self._busy.popleft()
            passed.synchronize()
            self._free.append(area)
        waiting = list(self._busy)
        self._busy.clear()
        for area, passed in waiting:  # of several streams, so in no order
            if passed.query():
                self._free.append(area)
            else:
                self._busy.append((area, passed))
