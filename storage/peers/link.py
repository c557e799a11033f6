"""One peer, as this node's agent sees it: a control link that is opened, followed, lost and tried again.

Whatever goes wrong on a link ends it, and it is opened anew after a pause (backoff.py); so nothing that was said on a
link is mixed up with what is said on the next. What the directory has of a peer is believed only while the link is
`LIVE`: from the first time that it was all heard, until nothing was heard for `Times.silence`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Protocol

from .actions import Action, Close, Open, Say
from .backoff import Backoff
from .membership import Known
from .messages import Goodbye, Heard, Hello, Message, Ping, Pong, Refused, Summary, version_of
from .standing import Standing
from .summary import Follower, Following, Shelf

logger = logging.getLogger(__name__)

LONG_SECONDS = 5.0  # least pause before a peer that left or refused is tried again
SMOOTH = 0.2  # weight of a new round-trip time


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of this node's clock.

    Attributes:
        ping: between signs of life.
        silence: without a sign, or without getting on with what it tells, after which a peer is taken for gone.
            At least three times `ping`.
    """

    ping: float = 2.0
    silence: float = 6.0


class Column(Shelf, Protocol):
    """A peer's place in the directory."""

    def believe(self) -> None:
        """Lookups count what it has from now on."""

    def doubt(self) -> None:
        """Lookups do not."""

    def describe(self, link: Link) -> None:
        """Tell the node's processes how the peer stands."""


class Link:
    """The control link to one peer. Messages go in, actions come out.

    Attributes:
        standing, version, node, epoch: as it said, or 0 and "".
        rtt: seconds to an answer and back, smoothed; 0: not known.
        load: bytes that wait at the peer.

    Args:
        number: its place in the directory.
        hello: makes what this node says of itself.
    """

    def __init__(
        self,
        number: int,
        known: Known,
        column: Column,
        times: Times,
        random: Random,
        hello: Callable[[], Hello],
    ) -> None:
        self.number = number
        self.known = known
        self.node = known.node
        self.standing = Standing.NOBODY
        self.version = 0
        self.epoch = 0
        self.rtt = 0.0
        self.load = 0
        self.leads_here = False  # who answers says that it is this node
        self._column = column
        self.times = times
        self._hello = hello
        self._follower = Follower(column)
        self._backoff = Backoff(random)
        self._retry_at = float("-inf")
        self._heard_at = 0.0
        self._step_at = 0.0  # when it last got on, or there was nothing to get on with
        self._live_at = 0.0
        self._pinged_at = 0.0
        self._ping = 0

    @property
    def is_open(self) -> bool:
        return self.standing in (Standing.CONNECTING, Standing.FOLLOWING, Standing.LIVE)

    def tick(self, now: float) -> Iterator[Action]:
        """What is due."""
        if not self.is_open:
            if now >= self._retry_at:
                yield from self._open(now)
        elif self._is_silent(now) or now - self._step_at > self.times.silence:
            yield from self._fall(Standing.AWAY, now)
        else:
            yield from self._keep(now)

    def _is_silent(self, now: float) -> bool:
        return now - self._heard_at > self.times.silence

    def _keep(self, now: float) -> Iterator[Action]:
        if self.standing is Standing.LIVE and now - self._live_at > self.times.silence:
            self._backoff.succeeded()
        if self.standing is not Standing.CONNECTING and now - self._pinged_at >= self.times.ping:
            self._ping += 1
            self._pinged_at = now
            yield Say(self.number, Ping(self._ping))

    def nudge(self, now: float) -> None:
        """It gave a sign of life elsewhere: no need to wait long before it is tried again."""
        if self.standing in (Standing.AWAY, Standing.LEFT):
            self._retry_at = min(self._retry_at, now + self._backoff.soon())

    def _open(self, now: float) -> Iterator[Action]:
        self._heard_at = self._pinged_at = self._step_at = now
        self._column.doubt()
        self._stand(Standing.CONNECTING)
        yield Open(self.number, self.known.address, self.known.key)
        yield Say(self.number, self._hello())

    def end(self) -> Iterator[Action]:
        """This node leaves, or wants to know of the peer no more."""
        if self.is_open:
            yield Close(self.number)
        self._column.doubt()
        self._follower.begin(0)
        self._stand(Standing.NOBODY)

    def hear(self, message: Message, now: float) -> Iterator[Action]:
        """A message from the peer."""
        if not self.is_open:  # of a socket that is closed by now
            return
        if self._is_silent(now):  # this node slept, and what it finds waiting is old
            yield from self._fall(Standing.AWAY, now)
            return
        self._heard_at = now
        match message:
            case Hello():
                yield from self._greeted(message, now)
            case Refused():
                logger.warning("lmcache: peer %s refuses: %a", self, message.why)
                yield from self._fall(Standing.REFUSED, now)
            case Goodbye():
                yield from self._fall(Standing.LEFT, now)
            case Summary() if self.standing is not Standing.CONNECTING:
                yield from self._told(message, now)
            case Pong() if self.standing is not Standing.CONNECTING:
                yield from self._answered(message, now)

    def _greeted(self, hello: Hello, now: float) -> Iterator[Action]:
        version = version_of(hello)
        self.leads_here = hello.epoch == self._hello().epoch
        if self.leads_here:
            yield from self._fall(Standing.REFUSED, now)
        elif version == 0:
            logger.warning(
                "lmcache: peer %s speaks protocol versions %d to %d, and none that this one speaks",
                self,
                hello.oldest,
                hello.newest,
            )
            yield from self._fall(Standing.REFUSED, now)
        elif self.standing is not Standing.CONNECTING and hello.epoch == self.epoch:
            yield from self._fall(Standing.AWAY, now)  # it knows this link no more
        else:  # the answer to our own; or it was cleared, or started anew
            self._column.doubt()
            self.version, self.node, self.epoch = version, hello.node, hello.epoch
            self._follower.begin(hello.epoch)
            self._step_at = now
            self._stand(Standing.FOLLOWING)
            yield Say(self.number, self._follower.subscribe())

    def _told(self, summary: Summary, now: float) -> Iterator[Action]:
        self._step_at = now
        outcome = self._follower.take(summary)
        if outcome is Following.LOST:
            yield from self._fall(Standing.AWAY, now)
            return
        if outcome is Following.IN_STEP and self.standing is not Standing.LIVE:
            self._live_at = now
            self._column.believe()
            self._stand(Standing.LIVE)
        yield Say(self.number, _heard(summary))

    def _answered(self, pong: Pong, now: float) -> Iterator[Action]:
        if pong.number == self._ping:
            took = max(0.0, now - self._pinged_at)
            self.rtt = took if self.rtt == 0 else (1 - SMOOTH) * self.rtt + SMOOTH * took
        self.load = pong.load
        if pong.epoch != self.epoch:  # its `Hello` was lost
            yield from self._fall(Standing.AWAY, now)
            return
        if self.standing is Standing.LIVE and pong.sequence <= self._follower.sequence:
            self._step_at = now
        self._column.describe(self)

    def is_twin(self, other: Link) -> bool:
        """Whether both are answered by the same node. Anybody may say another's epoch, but has not its key."""
        are_met = all(each.is_open and each.version for each in (self, other))
        return are_met and self.epoch == other.epoch and self.known.key == other.known.key

    def refuse(self, now: float) -> Iterator[Action]:
        """This node wants nothing of it for now."""
        if self.is_open:
            yield from self._fall(Standing.REFUSED, now)

    def _fall(self, standing: Standing, now: float) -> Iterator[Action]:
        self._column.doubt()
        least = LONG_SECONDS if standing in (Standing.LEFT, Standing.REFUSED) else 0.0
        self._retry_at = now + max(least, self._backoff.pause())
        if self.standing is Standing.LIVE:
            logger.warning("lmcache: peer %s is %s", self, standing.name.lower())
        self._stand(standing)
        yield Close(self.number)

    def _stand(self, standing: Standing) -> None:
        self.standing = standing
        self._column.describe(self)

    def __str__(self) -> str:
        return f"{self.node or '?'} ({self.known.address})"


def _heard(summary: Summary) -> Message:
    return Heard(summary.epoch, summary.sequence, summary.part)
