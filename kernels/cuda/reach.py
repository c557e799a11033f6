"""Whether a GPU reaches all memory of a layout, and where that memory is.

A kernel that touches memory which its GPU does not reach ends the process's context, so each byte is looked at: not
one by one, but by the allocations that they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple
from weakref import ref

from ..layout import PageLayout


class Allocation(NamedTuple):
    """Memory that the driver knows as one piece, or has registered as one.

    Attributes:
        start: its first address.
        end: one past its last one.
        on_host: it is memory of the host.
    """

    start: int
    end: int
    on_host: bool


class Reach:
    """What was seen of layouts. An allocation costs a few calls of the driver, a layout that was seen nothing.

    Allocations are not remembered beyond a layout, which keeps its memory alive: another one may lie at the same place
    later, and need not be pinned.

    Args:
        allocation_at: of an address; ValueError where the GPU does not reach it.
    """

    def __init__(self, allocation_at: Callable[[int], Allocation]) -> None:
        self._allocation_at = allocation_at
        self._known: dict[int, tuple[ref[PageLayout], bool]] = {}

    def is_on_host(self, layout: PageLayout) -> bool:
        """Whether any of it is.

        Raises:
            ValueError: the GPU does not reach all of it.
        """
        key = id(layout)
        known = self._known.get(key)
        if known is not None and known[0]() is layout:
            return known[1]
        on_host = self._look(layout.memory)
        self._known[key] = ref(layout, lambda _: self._known.pop(key, None)), on_host
        return on_host

    def _look(self, memory: Iterable[tuple[int, int]]) -> bool:
        on_host = False
        seen = Allocation(0, 0, on_host=False)
        for start, size in sorted(memory):
            address = start
            while address < start + size:
                if not seen.start <= address < seen.end:
                    seen = self._allocation_at(address)
                on_host = on_host or seen.on_host
                address = seen.end
        return on_host
