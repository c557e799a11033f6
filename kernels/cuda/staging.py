"""Memory for the tables of launches that the GPU has not passed yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

SMALLEST = 64 << 10  # bytes: tables of about 2,000 pages on both sides, with 80 layers
MOST_KEPT = 4 << 20  # bytes that nothing uses; what is beyond goes back to torch


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
    """Areas, taken for a copy and taken again when the GPU is past it. Nothing here waits. Safe for many threads.

    An area that is never given back stays allocated: the GPU may read it at any time.

    Args:
        make: a new area of at least so many bytes.
    """

    def __init__(self, make: Callable[[int], Area]) -> None:
        self._make = make
        self._lock = Lock()
        self._free: list[Area] = []
        self._taken: dict[int, Area] = {}  # by their addresses on the host
        self._busy: list[tuple[Area, Passed]] = []

    def take(self, size: int) -> Area:
        """The smallest area that is large enough and that nothing uses, or a new one."""
        with self._lock:
            self._collect()
            fit = [area for area in self._free if area.size >= size]
            area = min(fit, key=lambda each: each.size, default=None)
            if area is not None:
                self._free.remove(area)
                self._taken[area.host] = area
                return area
        area = self._make(max(SMALLEST, 1 << (size - 1).bit_length()))
        with self._lock:
            self._taken[area.host] = area
        return area

    def give(self, area: Area, passed: Passed) -> None:
        """Back, to be taken again after this event."""
        with self._lock:
            del self._taken[area.host]
            self._busy.append((area, passed))

    def _collect(self) -> None:
        waiting = []
        for area, passed in self._busy:  # of several threads, so in no order
            if not passed.query():
                waiting.append((area, passed))
            elif sum(each.size for each in self._free) + area.size <= MOST_KEPT:
                self._free.append(area)
        self._busy = waiting
