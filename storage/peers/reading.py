"""One read from peers: who is asked for what, and what is asked of another one when somebody does not deliver."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Protocol

import zmq

from ...kernels.pages import PageSegments
from ..base import Cancel as CancelFlag
from ..base import Limits, Lookup
from .choosing import Estimate, choose, deal
from .connections import Connection, Connections, Peer
from .fetch import Came, Delivered, Ended, Stream, fetch
from .health import Health
from .messages import PAGES_MOST, Cancel, Doubt, encode

FRAME = 1 << 20  # bytes
STREAM_LEAST = 1 << 20  # bytes that make another connection worth it
STALL_SHARE = 0.4  # of the time there is, that a peer may say nothing; then another one is asked
LAST_WORD_MS = 250  # that a doubt may take to leave
LATENCY_LEAST = 50e-6  # seconds
FAIR_SECONDS = 0.5  # in which any peer that works says something

_LOOKUPS = {
    Came.UNASKED: Lookup.MISS,
    Came.HIT: Lookup.HIT,
    Came.ABSENT: Lookup.MISS,
    Came.BUSY: Lookup.LATE,
    Came.FAILED: Lookup.FAILED,
    Came.LEAVING: Lookup.FAILED,
    Came.CORRUPT: Lookup.CORRUPT,
    Came.DISTRUSTED: Lookup.FAILED,
    Came.STALLED: Lookup.LATE,
    Came.LATE: Lookup.LATE,
    Came.CANCELLED: Lookup.LATE,
    Came.BROKEN: Lookup.FAILED,
}
_USABLE = frozenset({Ended.COMPLETE, Ended.LATE, Ended.CANCELLED})  # the connection, after a stream


@dataclass(eq=False, slots=True)
class Reader:
    """A peer as this process reads from it.

    Attributes:
        version: of the protocol, as the agents agreed.
        rtt: seconds to an answer of its agent and back.
        load: bytes that wait there.
    """

    peer: Peer
    version: int
    epoch: int
    health: Health
    rtt: float = 0.0
    load: int = 0

    def estimate(self) -> Estimate:
        latency = max(LATENCY_LEAST, self.health.latency or self.rtt)
        return Estimate(latency, self.load, self.health.rate)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One stream. Attributes: number: of the peer."""

    number: int
    connection: Connection
    stream: Stream


@dataclass(frozen=True, slots=True)
class Holders:
    """Who has some pages, and may be asked, as of one moment.

    Attributes:
        masks: of each page, a bit for each number in `readers` that has it.
    """

    masks: list[int]
    readers: Mapping[int, Reader]


class Holding(Protocol):
    """Says who has what: the tier."""

    def holders(self, keys: Sequence[bytes]) -> Holders: ...


class Reading:
    """One `get`.

    Args:
        streams: connections to one peer, at most.
        until: by `time.monotonic`.
        cancel: ends it when another thread raises it; None: nobody will.
    """

    def __init__(
        self,
        holding: Holding,
        connections: Connections,
        streams: int,
        keys: Sequence[bytes],
        into: PageSegments,
        until: float,
        cancel: CancelFlag | None,
    ) -> None:
        self._holding = holding
        self._readers: Mapping[int, Reader] = {}  # of those that are asked now
        self._connections = connections
        self._streams = streams
        self._keys = keys
        self._into = into
        self._sizes = into.page_bytes()
        self._until = until
        self._cancel = cancel
        self._outcome = [Lookup.MISS] * len(keys)
        self._asked = [0] * len(keys)  # of each page a mask of the peers that did not deliver it

    def run(self) -> list[Lookup]:
        """Ask, and ask others for what did not come, until all is here, nobody is left or time is up."""
        wanted = list(range(len(self._keys)))
        while wanted and self._left() > 0 and not (self._cancel and self._cancel.is_set()):
            chosen = self._choose(wanted)
            if not chosen:
                break
            self._fetch(chosen)
            wanted = [page for page in wanted if self._outcome[page] is not Lookup.HIT]
        return self._outcome

    def _left(self) -> float:
        return self._until - time.monotonic()

    def _choose(self, wanted: Sequence[int]) -> dict[int, list[int]]:
        """Of each peer that is to be asked the pages."""
        part = wanted[:PAGES_MOST]
        found = self._holding.holders([self._keys[page] for page in part])
        masks = [mask & ~self._asked[page] for page, mask in zip(part, found.masks, strict=True)]
        if len(part) < len(wanted) and not any(masks):
            return self._choose(wanted[PAGES_MOST:])
        everybody = 0
        for mask in masks:
            everybody |= mask
        self._readers = found.readers
        peers = {
            number: reader.estimate()
            for number, reader in found.readers.items()
            if everybody >> number & 1
        }
        chosen = choose(masks, [self._sizes[page] for page in part], peers)
        return {number: [part[i] for i in share] for number, share in chosen.items()}

    def _fetch(self, chosen: dict[int, list[int]]) -> None:
        """Ask, take what comes, and note how each peer did."""
        left = max(0.0, self._left())
        stall = max(FAIR_SECONDS, STALL_SHARE * left)
        with ExitStack() as failed:
            asked = [
                each
                for number, pages in chosen.items()
                for each in self._lend(number, pages, stall, failed)
            ]
            streams = [each.stream for each in asked]
            limits = Limits.within(left, self._cancel)
            fetched = fetch(streams, self._keys, self._into, limits)
            failed.pop_all()
        went: dict[int, list[Delivered]] = {}
        for each, delivered in zip(asked, fetched.streams, strict=True):
            went.setdefault(each.number, []).append(delivered)
            self._take(each, fetched.pages)
            self._doubt(each, fetched.pages)
            self._return(each, delivered)
        for number, streams_ in went.items():
            nothing = {fetched.pages[page] for page in chosen[number]} == {Came.ABSENT}
            _judge(self._readers[number].health, streams_, left, nothing)

    def _lend(
        self, number: int, pages: Sequence[int], stall: float, failed: ExitStack
    ) -> Iterator[_Asked]:
        """A peer's share, over as many connections as are worth it."""
        reader = self._readers[number]
        reader.health.begin()
        failed.callback(reader.health.gave_no_sign)
        shares = deal(pages, self._sizes, self._streams, STREAM_LEAST)
        lent = self._connections.borrow(reader.peer, len(shares))
        for connection, share in zip(lent, shares, strict=True):
            failed.callback(self._connections.end, connection)
            stream = Stream(
                socket=connection.socket,
                request=self._connections.number(),
                pages=share,
                frame=FRAME,
                credit=reader.health.window,
                stall_seconds=stall,
                version=reader.version,
                taken=connection.taken,
            )
            yield _Asked(number, connection, stream)

    def _take(self, asked: _Asked, came: Sequence[Came]) -> None:
        for page in asked.stream.pages:
            self._outcome[page] = _LOOKUPS[came[page]]
            if came[page] is not Came.HIT:
                self._asked[page] |= 1 << asked.number

    def _doubt(self, asked: _Asked, came: Sequence[Came]) -> None:
        """Tell a peer which of its pages are not what was put: it has not looked at them."""
        wrong = [page for page in asked.stream.pages if came[page] is Came.CORRUPT]
        if wrong:
            keys = b"".join(self._keys[page] for page in wrong)
            lengths = [self._sizes[page] for page in wrong]
            with suppress(zmq.Again):  # it takes nothing more: then it is told another time
                word = encode(Doubt(asked.stream.version, keys, lengths))
                asked.connection.socket.send(word, zmq.DONTWAIT)

    def _return(self, asked: _Asked, delivered: Delivered) -> None:
        """Give a connection back; one that is not answered any more is of no use to the next read."""
        if delivered.ended is not Ended.COMPLETE:
            with suppress(zmq.Again):  # it takes nothing more: it ends anyway
                word = encode(Cancel(asked.stream.request))
                asked.connection.socket.send(word, zmq.DONTWAIT)
        if delivered.ended in _USABLE:
            self._connections.give_back(asked.connection)
        else:
            doubted = delivered.ended is Ended.CORRUPT
            self._connections.end(asked.connection, LAST_WORD_MS if doubted else 0)


def _judge(health: Health, streams: Sequence[Delivered], given: float, nothing: bool) -> None:
    """What the streams of one peer say of it. Args: given: seconds that it had. nothing: it said it has no page of them."""
    now = time.monotonic()
    ends = {stream.ended for stream in streams}
    size = sum(stream.bytes for stream in streams)
    if Ended.CORRUPT in ends:
        health.lied(now)
    elif ends & {Ended.STALLED, Ended.BROKEN, Ended.BUSY} or (
        size == 0 and ends == {Ended.LATE} and given >= FAIR_SECONDS
    ):
        health.failed(now)
    elif size:
        firsts = [each.seconds_to_first for each in streams if each.seconds_to_first is not None]
        seconds = max(stream.seconds for stream in streams)
        health.served(size, min(firsts, default=seconds), seconds)
    elif nothing:
        health.had_nothing(now)
    else:
        health.gave_no_sign()
