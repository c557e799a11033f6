"""What this node holds, as its peers are told: a set of tags, and what has changed since the last look."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..base import NAMESPACE_BYTES
from ..slab.tier import SlabTier
from . import tags as sets


@dataclass(frozen=True, slots=True)
class Change:
    """Sets of tags (tags.py)."""

    added: bytes = b""
    removed: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


NOTHING = Change()


@dataclass(slots=True)
class _Seen:
    """What a tier held when it was last walked."""

    changed: int = -1  # the number of its last change before; -1: it was not walked yet
    tags: bytes = b""


class Holdings:
    """The pages of some tiers, together. For one thread.

    Args:
        tiers: whose native stores can be walked.
        namespaces: of the pages that are told; None: of all.
        minimum: pages of the shortest chain that is told, from where it begins here to the last of its
            descendants that is here.

    Attributes:
        tags: the set, as it is known.
        seconds: what the last walk took, for a caller that paces itself. 0.2 s for a million pages
            are usual (0.5 s with a minimum), and no lock is held meanwhile.
    """

    def __init__(
        self,
        tiers: Sequence[SlabTier],
        namespaces: Sequence[bytes] | None = None,
        minimum: int = 0,
    ) -> None:
        self._tiers = list(tiers)
        self._namespaces = None if namespaces is None else sorted(set(namespaces))
        self._minimum = minimum
        self._seen = [_Seen() for _ in self._tiers]
        self.tags = b""
        self.seconds = 0.0

    def look(self) -> Change:
        """What came and went since the last look. Where nothing did, that takes microseconds.

        Raises:
            TierError: a tier could not be walked; what is known stays as it was, and the next look finds
                what this one did not.
        """
        if not self._walk():
            return NOTHING
        now = b""
        for seen in self._seen:
            now = sets.merge(now, seen.tags) if now else seen.tags
        change = Change(sets.without(now, self.tags), sets.without(self.tags, now))
        self.tags = now
        return change

    def _walk(self) -> bool:
        """Walk the tiers that have changed; whether any had."""
        started = time.perf_counter()
        walked = False
        for tier, seen in zip(self._tiers, self._seen, strict=True):
            with tier.native() as store:
                changed = store.changed()
                if changed == seen.changed:
                    continue
                # What changes while it is walked is found by the next look.
                seen.tags = store.tags(self._namespaces, self._minimum)
                seen.changed, walked = changed, True
        if walked:
            self.seconds = time.perf_counter() - started
        return walked

    def told(self, keys: Sequence[bytes], position: int = 0) -> bytes:
        """Add pages that a writer of this node says it has put, without a walk; the tags that are new.

        Only those that a lookup finds are added, so a writer that is wrong costs no more than that.

        Args:
            keys: one run of a chain.
            position: of the first of them in the chain, as far as the writer knows.

        Raises:
            TierError: a tier could not be asked.
        """
        if position + len(keys) < self._minimum:
            return b""
        chosen = [key for key in keys if self._is_told(key)]
        here = [False] * len(chosen)
        for tier in self._tiers:
            found = tier.exists(chosen)
            here = [one or other for one, other in zip(here, found, strict=True)]
        come = sets.sort(
            sets.tags_of(key for key, is_here in zip(chosen, here, strict=True) if is_here)
        )
        fresh = sets.without(come, self.tags)
        self.tags = sets.merge(self.tags, fresh)
        return fresh

    def _is_told(self, key: bytes) -> bool:
        return self._namespaces is None or key[:NAMESPACE_BYTES] in self._namespaces
