"""Pages that peers could not verify: they are looked at here, and the chain removes what is not whole.

What is sent from where it lies was verified by nobody on this side, so damage in memory shows at the receiver.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..base import NAMESPACE_BYTES

WAITING_MOST = 256  # pages; older ones give way, and are doubted again if they are asked for again


@dataclass(frozen=True, slots=True)
class Doubted:
    key: bytes
    length: int


class Doubts:
    """What is to be looked at, when there is nothing better to do.

    Args:
        shares: whether pages of a namespace may be given away.
        largest: bytes of a page that can be looked at.
    """

    def __init__(self, shares: Callable[[bytes], bool], largest: int) -> None:
        self._shares = shares
        self._largest = largest
        self._waiting: deque[Doubted] = deque(maxlen=WAITING_MOST)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, doubted: Iterable[Doubted]) -> None:
        """A peer's word."""
        for each in doubted:
            if each.length <= self._largest and self._shares(each.key[:NAMESPACE_BYTES]):
                self._waiting.append(each)

    def next(self) -> Doubted:
        """Raises: IndexError: there is none."""
        return self._waiting.popleft()
