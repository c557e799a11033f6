"""A node on this machine's loopback, in this process: its agent is a thread, its tier whatever it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import zmq

from ..storage.base import Tier
from ..storage.chain import Chain
from ..storage.peers.agent import Agent, Parts
from ..storage.peers.auth import Doorkeeper
from ..storage.peers.directory import Directory
from ..storage.peers.holdings import Holdings
from ..storage.peers.in_place import InPlace
from ..storage.peers.keys import NO_KEYS, KeyPair
from ..storage.peers.link import Times
from ..storage.peers.membership import Known, Membership
from ..storage.peers.node import Identity
from ..storage.peers.page_server import NoPages, PageServer
from ..storage.peers.serving import Serving
from ..storage.peers.staging import Staging
from ..storage.peers.tier import HEAD, PeerLimits, PeerTier
from ..storage.peers.told import Teller, Told
from ..storage.slab.tier import SlabTier

DIRECTORY_BYTES = 64 << 20
JOIN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Ways:
    """How a node answers: the limits of its settings, as far as tests want others."""

    times: Times = field(default_factory=lambda: Times(ping=0.2, silence=2.0))
    in_flight: int = 64 << 20
    bandwidth: int = 0
    requests: int = 16
    streams: int = 2
    shares: Callable[[bytes], bool] = lambda _: True
    limits: PeerLimits = field(default_factory=PeerLimits)


class LoopbackNode:
    """Answers from the moment it is made.

    Args:
        folder: that exists, in shared memory, with a short path.
        upper, lower: its tiers, which stay the caller's; neither: it only reads.
        peers: whom it knows from the start.
        keys: its own; empty: not encrypted.
        allowed: who may connect.
        listen: port 0: one that is free.
    """

    def __init__(
        self,
        folder: Path,
        upper: SlabTier | None = None,
        lower: SlabTier | None = None,
        *,
        name: str = "node",
        peers: Iterable[Known] = (),
        keys: KeyPair = NO_KEYS,
        allowed: frozenset[str] = frozenset(),
        ways: Ways = Ways(),  # frozen
        listen: str = "tcp://127.0.0.1:0",
    ) -> None:
        self.folder, self.keys, self.ways = folder, keys, ways
        self._undo = ExitStack()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(max(2, ways.streams))
        self._undo.callback(context.term)
        self.doorkeeper = Doorkeeper(context, allowed) if keys else None
        if self.doorkeeper is not None:
            self._undo.callback(self.doorkeeper.close)
        tiers = [tier for tier in (upper, lower) if tier is not None]
        self.staging = Staging(upper, lower, ways.shares)
        self.pages = PageServer(
            Chain(upper, lower, promotion="never") if tiers else NoPages(),
            Serving(ways.shares, ways.requests),
            self.staging,
            InPlace(upper),
            ways.in_flight,
            ways.bandwidth,
            time.monotonic(),
        )
        self.directory = Directory.create(folder / HEAD, DIRECTORY_BYTES)
        told = Told(folder)
        membership = Membership((), keys.public, allowed, 64)
        membership.configure(peers, allowed, 64)
        parts = Parts(context, keys, self.directory, self.pages, told)
        self.agent = Agent(parts, Identity(name), membership, ways.times, [listen])
        self.known = Known(self.agent.address, keys.public, name)
        self.agent.share(Holdings(tiers))
        for part in (self.directory, told, self.pages, self.agent):
            self._undo.callback(part.close)
        self._thread = Thread(target=self.agent.run, name=f"lmcache-agent-{name}", daemon=True)
        self._thread.start()

    def reader(self) -> PeerTier:
        """A tier as an engine of this node has it; the caller's to close."""
        teller = Teller(self.folder)
        self._undo.callback(teller.close)
        return PeerTier(self.folder, self.keys, self.ways.limits, teller.tell)

    def stop(self) -> None:
        """Say goodbye, and answer nobody any more. The tiers stay open. Idempotent."""
        if not self._thread.is_alive():
            return
        self.agent.stop()
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "the agent does not end"
        self._undo.close()


def holding(tier: Tier, keys: Sequence[bytes]) -> bool:
    """Whether lookups find all of the pages."""
    return all(tier.exists(keys))
