"""A tier whose pages lie on another node, for the conformance suite: what is put goes to that node's own tier, and
what is read or looked up comes from there through a real socket and real agents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from ..kernels.pages import PageSegments
from ..storage.base import NO_LIMITS, CheckReport, Limits, Lookup, Stored, Tier, TierStats
from ..storage.peers.keys import NO_KEYS, KeyPair
from ..storage.peers.membership import Known
from ..storage.peers.told import Teller
from ..storage.slab.opening import Place
from ..storage.slab.settings import SlabSettings
from ..storage.slab.tier import SlabTier
from .loopback_node import LoopbackNode
from .waiting import wait_until


class SocketTier(Tier):
    """Two nodes on loopback: one that holds, one that reads.

    Args:
        folder: in shared memory; both nodes lie under it.
        encrypted: with CURVE.
    """

    name = "peers"

    def __init__(self, folder: Path, capacity: int, *, encrypted: bool = False) -> None:
        theirs, ours = (KeyPair.new(), KeyPair.new()) if encrypted else (NO_KEYS, NO_KEYS)
        allowed = frozenset({theirs.public, ours.public} if encrypted else set[str]())
        for each in ("there", "here"):
            (folder / each).mkdir(parents=True, exist_ok=True)
        place = Place(folder / "there" / "cpu", True)
        self._there = SlabTier(place, capacity, SlabSettings(), name=self.name)
        self.capacity = self._there.capacity
        self._holder = LoopbackNode(
            folder / "there", self._there, name="there", keys=theirs, allowed=allowed
        )
        peers = [Known(self._holder.known.address, self._holder.known.key, "there")]
        self._node = LoopbackNode(
            folder / "here", None, name="here", keys=ours, allowed=allowed, peers=peers
        )
        self._reader = self._node.reader()
        self._teller = Teller(folder / "there")
        self._changing = Lock()
        self._seen: dict[bytes, None] = {}
        self._synchronise(())

    def fits(self, page_bytes: int) -> bool:
        return self._there.fits(page_bytes)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self._reader.exists(keys)

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        return self._reader.get(keys, into, limits)

    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
    ) -> list[Stored]:
        with self._changing:
            outcome = self._there.put(keys, pages, checksums, parents, limits)
            self._seen |= dict.fromkeys(keys)
            self._synchronise(keys)
        return outcome

    def remove(self, keys: Sequence[bytes]) -> int:
        with self._changing:
            count = self._there.remove(keys)
            self._synchronise(())
        return count

    def clear(self, namespace: bytes) -> int:
        with self._changing:
            count = self._there.clear(namespace)
            self._synchronise(())
        return count

    def stats(self) -> TierStats:
        return self._there.stats()

    def check(self, *, repair: bool = False) -> CheckReport:
        return self._there.check(repair=repair)

    def close(self) -> None:
        self._there.close()
        self._reader.close()
        self._teller.close()
        for node in (self._node, self._holder):
            node.stop()

    def _synchronise(self, told: Sequence[bytes]) -> None:
        """Wait until the node that reads knows what the other one holds now."""
        if told:
            self._teller.tell(told)
        self._teller.tell(())
        seen = list(self._seen)
        wait_until(lambda: self._node.directory.believed != 0 and self._agrees(seen))

    def _agrees(self, seen: Sequence[bytes]) -> bool:
        return self._reader.exists(seen) == self._there.exists(seen)
