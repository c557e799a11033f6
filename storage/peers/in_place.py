"""Pages of the CPU tier on their way to peers, from where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...errors import TierError
from ..base import Limits
from ..faults import Faults
from ..slab.tier import Shown, SlabTier
from .frames import SendBuffer

SECONDS = 0.05  # to wait for the store's mutex; a copy costs less than more of it


class InPlace:
    """Shows pages and takes them back. May be called from several threads.

    Args:
        tier: None: nothing is sent from where it lies, all is read into buffers.
    """

    def __init__(self, tier: SlabTier | None) -> None:
        self._tier = tier
        self._faults = Faults()

    def show(
        self, buffer: SendBuffer, keys: Sequence[bytes], lengths: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """Those of the pages that can be sent in place, for as long as the buffer is in use.

        Returns:
            of each: place in `keys`, address, checksum. The others are elsewhere, not here or in hand.
        """
        if self._tier is None:
            return []
        try:
            shown = self._tier.show(keys, lengths, Limits.within(SECONDS))
        except TierError as error:  # they are read as any others
            self._faults.error(error)
            return []
        pages = shown.pages
        if pages:
            buffer.keep(shown)
        return pages

    def take_back(self, seen: Iterable[Shown]) -> None:
        """Nobody sends them any more: what `SendPool.seen` says."""
        for shown in seen:
            assert self._tier is not None, "or nothing was shown"
            try:
                self._tier.unshow(shown)
            except TierError as error:  # the store's next change does it, or this process's end
                self._faults.error(error)
