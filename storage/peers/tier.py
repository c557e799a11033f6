"""Other nodes' pages, as the last tier of this node: what is read comes from peers, and nothing is written to them.

A lookup asks the directory in shared memory, which this node's agent keeps (directory.py), and nobody else: a miss
costs no round trip. A read asks the peers that it chooses (choosing.py), straight from this process, and writes what
comes into the caller's memory, verified on the way. What one peer does not deliver is asked of another one, while
there is time; a peer that failed rests (health.py).
"""

from __future__ import annotations

import contextlib
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Lock

import zmq

from ...errors import ConfigError, TierError
from ...kernels.pages import PageSegments
from ..base import (
    NAMESPACE_BYTES,
    NO_LIMITS,
    CheckReport,
    Limits,
    Lookup,
    OuterTier,
    Stored,
    TierStats,
    require_equally_many,
)
from ..gate import Gate
from .connections import Connections, Peer
from .directory import NO_RECORD, PEERS_MOST, DirectoryView, PeerRecord
from .health import Health
from .keeping import Keep, Keeping
from .keys import KeyPair
from .messages import PAGES_MOST, Expect, encode
from .meter import Meter, NoMeter
from .reading import Holders, Reader, Reading
from .standing import Standing

logger = logging.getLogger(__name__)

HEAD = "directory"  # the file, in the folder
MASK_SECONDS = (
    0.01  # that it holds who may be asked; less, when a read ends: it may have failed somebody
)
LOOK_SECONDS = 0.1  # between looks at whether the agent, or a peer, is another one
AGENT_SECONDS = 15.0  # without a sign of life of the agent, after which nobody is believed
NAMESPACES_MOST = 1024  # of which the length of a page is remembered
HEALTHS_MOST = 4 * PEERS_MOST
UNASKED_MOST = 256 << 20  # bytes that may wait beyond those that were asked for
WRONG_MOST = 4096  # pages remembered that came wrong
EXPECTED_LEAST = 2  # pages of a chain that make a word to the peer worth it


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """Attributes: deadline: seconds that one read may take. window: bytes on their way on one connection.
    streams: connections to a peer for one read."""

    deadline: float = 5.0
    window: int = 16 << 20
    streams: int = 2
    keep: Keep = "always"


class PeerTier(OuterTier):
    """Reads from other nodes.

    Args:
        directory: folder of the agent's directory; it need not be there yet.
        keys: this node's; empty: nothing is encrypted.
        limits: may be replaced at any time (`limits` attribute).
        tell: the node's agent what was put here.
        refreshed: somebody calls `refresh` and `meter` again and again, so that no lookup has to.
    """

    def __init__(
        self,
        directory: Path,
        keys: KeyPair,
        limits: PeerLimits,
        tell: Callable[[Sequence[bytes]], None] = lambda _: None,
        *,
        refreshed: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        name: str = "peers",
    ) -> None:
        self.name = name
        self.capacity = 0
        self._tell = tell
        self._is_refreshed = refreshed
        self._gate = Gate(name)
        self._owns_context = context is None
        self._context = context or zmq.Context(limits.streams)
        _require_sockets(self._context)
        self._meter = Meter(UNASKED_MOST) if refreshed else NoMeter()
        self._connections = Connections(self._context, keys, self._meter)
        self._view = DirectoryView(directory / HEAD, AGENT_SECONDS)
        self._limits = limits
        self._keeping = Keeping(limits.keep)
        self._random = Random()
        self._lock = Lock()
        self._readers: dict[int, Reader] = {}  # replaced as a whole
        self._healths: dict[Peer, Health] = {}  # also of those that are away
        self._expected = b""  # first page of the chain that a peer was told of last
        self._changes = (0, -1)  # whose directory, and which state of its records
        self._looked = float("-inf")
        self._mask, self._mask_until = 0, float("-inf")
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._lengths: dict[bytes, int] = {}  # of a namespace's pages, as they were last asked for

    # What is read.

    def fits(self, page_bytes: int) -> bool:
        return True  # nothing is put here, so nothing is too large

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with self._gate.passing():
            here = self._view.exists(keys, self._usable())
            if self._wrong:
                here = [h and key not in self._wrong for h, key in zip(here, keys, strict=True)]
            self._expect(keys, here)
            return here

    def get(
        self, keys: Sequence[bytes], into: PageSegments, limits: Limits = NO_LIMITS
    ) -> list[Lookup]:
        require_equally_many(keys, into)
        with self._gate.passing():
            self._remember_lengths(keys, into)
            own = self._limits
            until = time.monotonic() + limits.left(own.deadline)
            reading = Reading(
                self, self._connections, own.streams, keys, into, until, limits.cancel
            )
            try:
                return reading.run()
            finally:
                self._mask_until = float("-inf")

    def _remember_lengths(self, keys: Sequence[bytes], into: PageSegments) -> None:
        if keys:
            self._lengths[keys[0][:NAMESPACE_BYTES]] = sum(into.sizes[: into.per_page])
            while len(self._lengths) > NAMESPACES_MOST:
                self._lengths.pop(next(iter(self._lengths)))

    def wanted(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the pages that just came are to be kept on this node."""
        return self._keeping.wanted(keys)

    def announce(self, keys: Sequence[bytes]) -> None:
        self._tell(keys)

    @property
    def limits(self) -> PeerLimits:
        return self._limits

    @limits.setter
    def limits(self, limits: PeerLimits) -> None:
        with self._lock:
            if limits.keep != self._limits.keep:
                self._keeping = Keeping(limits.keep)
            self._limits = limits
            self._changes = (0, -1)  # the readers take it over at the next look

    # What is not written.

    def put(
        self,
        keys: Sequence[bytes],
        pages: PageSegments,
        checksums: Sequence[int] | None = None,
        parents: Sequence[bytes] | None = None,
        limits: Limits = NO_LIMITS,
    ) -> list[Stored]:
        """Nothing: each node keeps what it computed or read itself."""
        require_equally_many(keys, pages, checksums, parents)
        with self._gate.passing():
            return [Stored.REFUSED] * len(keys)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remember that these came wrong, so that they are not promised again for a while; how many are new."""
        with self._gate.passing(), self._lock:
            new = [key for key in keys if key not in self._wrong]
            for key in new:
                self._wrong[key] = None
            while len(self._wrong) > WRONG_MOST:
                self._wrong.popitem(last=False)
            return len(new)

    def clear(self, namespace: bytes) -> int:
        """Nothing: other nodes' pages are theirs."""
        with self._gate.passing():
            return 0

    def stats(self) -> TierStats:
        with self._gate.passing():
            return TierStats(self.name, 0, 0, 0)

    def check(self, *, repair: bool = False) -> CheckReport:
        with self._gate.passing():
            return CheckReport(0)

    def close(self) -> None:
        if not self._gate.shut("it was closed"):
            return
        if not self._gate.wait_empty(2 * self._limits.deadline):
            logger.warning("lmcache: a read from peers does not end; its sockets are left open")
            return
        self._connections.close()
        self._view.close()
        if self._owns_context:
            self._context.term()

    # Who there is.

    def refresh(self) -> None:
        """Look whether the agent, or its table, is another one, and map that: milliseconds after it grew."""
        self._view.refresh()

    def meter(self) -> None:
        """Look whether a peer sends what nobody asked for. By whoever calls `refresh`."""
        self._meter.most = UNASKED_MOST + self._connections.open * self._limits.window
        if self._meter.look():
            logger.error(
                "lmcache: a peer sent %d MiB that nobody asked for: its connection was cut. Its software is broken, or "
                "hostile; take its key off the list",
                UNASKED_MOST >> 20,
            )

    def holders(self, keys: Sequence[bytes]) -> Holders:
        """Who has the pages and may be asked now."""
        usable, readers = self._usable(), self._readers
        packed = self._view.holders(keys, usable)
        everybody = sum(1 << number for number in readers)  # another thread may have looked since
        masks = [mask & everybody for (mask,) in struct.iter_unpack("<Q", packed)]
        return Holders(masks, readers)

    def _usable(self) -> int:
        """The mask of the peers that may be asked now. Asked by each lookup, so it is reckoned seldom."""
        now = time.monotonic()
        if now < self._mask_until:
            return self._mask
        if now - self._looked > LOOK_SECONDS:
            with self._lock:  # whoever comes first must not find nobody while another one looks
                if now - self._looked > LOOK_SECONDS:
                    self._look()
                    self._looked = now
        mask = 0
        for number, reader in self._readers.items():
            if reader.health.usable(now):
                mask |= 1 << number
        self._mask, self._mask_until = mask, now + MASK_SECONDS
        return mask

    def _look(self) -> None:
        """Under the lock."""
        if not self._is_refreshed:
            self._view.refresh()
        self._connections.tidy()
        changes = (self._view.agent, self._view.changes)
        if changes != self._changes:
            self._changes = changes
            self._readers = self._read_records()
        else:
            self._read_pulses()

    def _read_records(self) -> dict[int, Reader]:
        """Of the peers that are live, each with what is known of it here."""
        readers = {}
        for number in range(PEERS_MOST):
            record = self._view.record(number)
            if record == NO_RECORD or record.state != Standing.LIVE:
                continue
            peer = Peer(record.address, record.public_key.decode("ascii", "replace"))
            known = self._readers.get(number)
            if known is None or known.peer != peer or known.epoch != record.epoch:
                known = Reader(peer, record.version, record.epoch, self._health_of(peer, record))
            known.health.set_most(self._limits.window)
            known.rtt, known.load = record.rtt_us / 1e6, record.load
            readers[number] = known
        return readers

    def _health_of(self, peer: Peer, record: PeerRecord) -> Health:
        """Who lied before it was away, or started anew, is not asked any sooner for that."""
        health = self._healths.get(peer)
        if health is None:
            health = Health(record.name, self._limits.window, self._random)
            self._healths[peer] = health
            while len(self._healths) > HEALTHS_MOST:
                self._healths.pop(next(iter(self._healths)))
        health.is_cold()
        return health

    def _read_pulses(self) -> None:
        for number, reader in self._readers.items():
            record = self._view.record(number)
            reader.rtt, reader.load = record.rtt_us / 1e6, record.load

    # What will be read.

    def _expect(self, keys: Sequence[bytes], here: Sequence[bool]) -> None:
        """Tell who has the first pages of a chain that all of it will be asked for, so that it reads its disk meanwhile
        and the connection stands."""
        if True not in here or keys[here.index(True)] == self._expected:
            return
        run = [key for key, is_here in zip(keys, here, strict=True) if is_here][:PAGES_MOST]
        if len(run) < EXPECTED_LEAST:
            return
        length = self._lengths.get(run[0][:NAMESPACE_BYTES])
        if length is None:
            return
        found = self.holders(run[:1])
        if not found.masks[0]:
            return
        self._expected = run[0]
        holders = [
            reader for number, reader in found.readers.items() if found.masks[0] >> number & 1
        ]
        reader = min(holders, key=lambda each: each.estimate().start)
        try:
            (connection,) = self._connections.borrow(reader.peer, 1)
        except TierError:  # the read that follows will say so
            return
        word = Expect(reader.version, b"".join(run), length)
        with contextlib.suppress(zmq.Again):  # not connected, or much to say: it can do without
            connection.socket.send(encode(word), zmq.DONTWAIT)
        self._connections.give_back(connection)


def _require_sockets(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """libzmq ends the process where the first socket of a context finds no descriptors; so that is at the start.

    Raises:
        ConfigError: there are no sockets to be had.
    """
    try:
        context.socket(zmq.DEALER).close()
    except zmq.ZMQError as error:
        problem = f"no socket can be made: {error}; allow more open files (ulimit -n)"
        raise ConfigError("peers", problem) from error
