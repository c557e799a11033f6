"""Pages that a peer will ask for soon, brought from the disk into memory meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import TierError
from ...kernels.pages import PageSegments
from ..base import NAMESPACE_BYTES, Below, Limits, Lookup, Tier, UpperTier
from ..faults import Faults

WAITING_MOST = 64  # words of peers; older ones give way, as who asked may be served by now
STAGE_BYTES = 8 << 20  # moved at once
SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Expected:
    """One run of a chain. Attributes: length: bytes of each page."""

    keys: Sequence[bytes]
    length: int


class Staging:
    """What is expected, and the moving of it.

    Args:
        shares: whether pages of a namespace may be given away.
    """

    def __init__(
        self, upper: UpperTier | None, lower: Tier | None, shares: Callable[[bytes], bool]
    ) -> None:
        self._upper = upper
        self._lower = lower
        self._shares = shares
        self._faults = Faults()
        self._waiting: deque[Expected] = deque(maxlen=WAITING_MOST)
        self.part_most = STAGE_BYTES
        self.staged = 0  # pages

    def expect(self, expected: Expected) -> None:
        """Remember it, if there is anything to be done for it at all."""
        if self._upper is None or self._lower is None:
            return
        if expected.length > self.part_most or not self._upper.fits(expected.length):
            return
        shared = [key for key in expected.keys if self._shares(key[:NAMESPACE_BYTES])]
        if shared:
            self._waiting.append(Expected(shared, expected.length))

    def next(self) -> Expected:
        """What to do next, a part that fits into memory; the rest waits for another turn. No keys: nothing."""
        if not self._waiting:
            return Expected((), 0)
        expected = self._waiting.popleft()
        most = max(1, self.part_most // expected.length)
        if len(expected.keys) > most:
            self._waiting.appendleft(Expected(expected.keys[most:], expected.length))
        return Expected(expected.keys[:most], expected.length)

    def stage(self, expected: Expected, address: int) -> None:
        """Move what is only on the disk. On a worker's thread. Args: address: of memory for all of it."""
        upper, lower = self._upper, self._lower
        assert upper is not None and lower is not None, "or nothing is expected"
        try:
            here = upper.exists(expected.keys)
            wanted = [i for i, is_here in enumerate(here) if not is_here]
            keys = [expected.keys[i] for i in wanted]
            sizes = [expected.length] * len(keys)
            places = [address + i * expected.length for i in range(len(keys))]
            limits = Limits.within(SECONDS)
            came = lower.get(keys, PageSegments(places, sizes, 1), limits)
            hits = [i for i, lookup in enumerate(came) if lookup is Lookup.HIT]
            parents = [expected.keys[wanted[i] - 1] if wanted[i] else b"" for i in hits]
            chosen = PageSegments([places[i] for i in hits], [sizes[i] for i in hits], 1)
            hit_keys = [keys[i] for i in hits]
            upper.put(hit_keys, chosen, None, parents, limits, Below.NEVER)
            self.staged += len(hits)
        except TierError as error:  # the read that comes will find out by itself
            self._faults.error(error)
