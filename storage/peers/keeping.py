"""Which pages that came from peers are kept on this node, too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Literal

Keep = Literal["always", "second-hit", "never"]

REMEMBERED = 1 << 16  # pages that came once


class Keeping:
    """Decides. Threads may share it.

    Args:
        policy: second-hit: a page that peers delivered before, among the last `REMEMBERED`.
    """

    def __init__(self, policy: Keep) -> None:
        self.policy = policy
        self._lock = Lock()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def wanted(self, keys: Sequence[bytes]) -> list[bool]:
        """Of pages that just came."""
        if self.policy != "second-hit":
            return [self.policy == "always"] * len(keys)
        with self._lock:
            return [self._is_second(key) for key in keys]

    def _is_second(self, key: bytes) -> bool:
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return False
