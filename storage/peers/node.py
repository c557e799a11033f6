"""The control side of one node: who it knows, what it tells them and what they tell it.

No socket and no clock: messages and times go in, actions come out (actions.py), so that one test can run
64 of them over a network of its own. agent.py gives it real ones. Every method that returns actions is a generator,
and does its work as they are taken: take them all. Nothing that is said to a node makes these raise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .actions import Action, Answer, Say
from .link import Column, Link, Times
from .membership import Known, Membership, records
from .messages import (
    NODES_MOST,
    OLDEST,
    VERSION,
    Goodbye,
    Heard,
    Hello,
    Message,
    NodeRecord,
    Nodes,
    Ping,
    Pong,
    Refused,
    Subscribe,
    version_of,
)
from .standing import Standing
from .summary import Published, Subscription

SESSIONS_MOST = 4 * NODES_MOST  # agents that are answered at once
SILENT_PINGS = 8  # of our own ping's times, after which a session is forgotten


@dataclass(frozen=True, slots=True)
class Identity:
    """This node, as others are told of it."""

    node: str
    address: str = ""
    key: str = ""


@dataclass(slots=True)
class _Session:
    """An agent that connected here.

    Attributes:
        key: that it proved to have; empty where nothing is encrypted.
        got_on_at: when it last answered a summary, or had none to answer.
        nodes: number of the list that it was told.
    """

    hello: Hello
    key: str
    heard_at: float
    got_on_at: float
    subscription: Subscription | None = None
    nodes: int = 0

    @property
    def waiting(self) -> int:
        """Summaries on their way to it."""
        return self.subscription.waiting if self.subscription is not None else 0


class Node:
    """One node.

    Args:
        column: makes a peer's place in the directory, by its number.
        random: whose chance; two nodes that begin with the same take one another for themselves.
        load: bytes that wait to be sent from here.
        most: peers, each with a number below it.
    """

    def __init__(
        self,
        identity: Identity,
        membership: Membership,
        column: Callable[[int], Column],
        times: Times,
        random: Random,
        load: Callable[[], int] = lambda: 0,
        most: int = NODES_MOST,
    ) -> None:
        self.identity = identity
        self.membership = membership
        self.namespaces: list[bytes] = []  # that it shares; none: it does not say
        self.links: dict[int, Link] = {}
        self.sessions: dict[bytes, _Session] = {}
        self.published = Published(_epoch(random))
        self.times = times
        self._column = column
        self._random = random
        self._load = load
        self._most = most
        self._nodes: list[NodeRecord] = []
        self._nodes_number = 0  # grows when the list changes
        self._nodes_at = float("-inf")  # when it was looked at
        self._is_leaving = False
        self.passed_over = 0  # messages that meant nothing here

    # What this node has.

    def holds(self, tags: bytes, added: bytes, removed: bytes) -> Iterator[Action]:
        """It shares these pages now. Args: added, removed: since the last time."""
        self.published.change(tags, added, removed)
        yield from self._tell()

    def cleared(self, tags: bytes) -> Iterator[Action]:
        """What it said before holds no more: a new epoch."""
        self.published.begin(_epoch(self._random), tags)
        for route, session in list(self.sessions.items()):
            session.subscription = None
            yield Answer(route, self.hello())

    def hello(self) -> Hello:
        return Hello(
            OLDEST,
            VERSION,
            self.identity.node,
            self.published.epoch,
            self.identity.address,
            self.namespaces,
        )

    def set_times(self, times: Times) -> None:
        """As the settings are now."""
        self.times = times
        for link in self.links.values():
            link.times = times

    # Time.

    def tick(self, now: float) -> Iterator[Action]:
        """What is due. To be called a few times in each ping's time."""
        if self._is_leaving:
            return
        self.membership.expire(now)
        yield from self._match_links()
        for link in list(self.links.values()):
            yield from link.tick(now)
            if link.standing is Standing.LIVE:
                self.membership.seen(link.known.address, now)
        for route in [r for r, each in self.sessions.items() if self._is_over(each, now)]:
            del self.sessions[route]
        if now - self._nodes_at >= self.times.ping:
            yield from self._tell_nodes(now)

    def _is_over(self, session: _Session, now: float) -> bool:
        """Whether it is silent, or takes nothing more, or may no longer be here. If it lives, it will say hello anew."""
        silent = SILENT_PINGS * max(self.times.ping, self.times.silence / 3)
        is_stuck = session.waiting > 0 and now - session.got_on_at > silent
        is_allowed = self.membership.allows(session.key)
        return is_stuck or now - session.heard_at > silent or not is_allowed

    def _match_links(self) -> Iterator[Action]:
        """A link to each node that is known, and to no other."""
        wanted = {known.address: known for known in self.membership}
        for number, link in list(self.links.items()):
            known = wanted.pop(link.known.address, None)
            if known is None or known.key != link.known.key:
                del self.links[number]
                yield from link.end()
        for known in wanted.values():
            free = next((n for n in range(self._most) if n not in self.links), None)
            if free is None:
                return
            self.links[free] = self._link(free, known)

    def _link(self, number: int, known: Known) -> Link:
        column = self._column(number)
        return Link(number, known, column, self.times, self._random, self.hello)

    def leave(self) -> Iterator[Action]:
        """Say goodbye to everybody, and nothing more after that."""
        self._is_leaving = True
        for link in self.links.values():
            if link.is_open:
                yield Say(link.number, Goodbye())
            yield from link.end()
        for route in self.sessions:
            yield Answer(route, Goodbye())
        self.links.clear()
        self.sessions.clear()

    # What others say on links of ours.

    def hear(self, number: int, message: Message, now: float) -> Iterator[Action]:
        """A message on a link."""
        link = self.links.get(number)
        if link is None or not link.is_open or self._is_leaving:
            return
        if isinstance(message, Nodes):
            for each in message.nodes:
                self.membership.told(each.node, each.address, each.key, now)
        yield from link.hear(message, now)
        if isinstance(message, Hello):
            yield from self._met(link, now)

    def _met(self, link: Link, now: float) -> Iterator[Action]:
        """It said who it is. Nobody is linked to twice, under two addresses, and this node not at all.

        Who only says so, with another key, is linked to as before.
        """
        if link.leads_here:
            if link.known.key == self.identity.key:
                self.membership.skip(link.known.address, now)
            return
        for other in list(self.links.values()):
            if other is not link and link.is_twin(other):
                is_worse = link.known.source >= other.known.source
                worse = link if is_worse else other
                self.membership.skip(worse.known.address, now)
                yield from worse.refuse(now)

    # What others ask of this node.

    def asked(self, route: bytes, key: str, message: Message, now: float) -> Iterator[Action]:
        """A message from who connected here. Args: key: that it proved to have; empty: not encrypted."""
        if self._is_leaving or not self.membership.allows(key):
            self.passed_over += 1
            return
        if isinstance(message, Hello):
            yield from self._greeted(route, key, message, now)
            return
        session = self.sessions.get(route)
        if session is None:  # it knew the one that was here before
            if isinstance(message, Ping | Subscribe):
                yield Answer(route, self.hello())
            return
        session.heard_at = now
        if not session.waiting:
            session.got_on_at = now
        yield from self._answer(route, session, message, now)

    def _answer(
        self, route: bytes, session: _Session, message: Message, now: float
    ) -> Iterator[Action]:
        match message:
            case Ping():
                yield Answer(route, self._pong(message))
            case Subscribe():
                yield from self._subscribed(route, session, message, now)
            case Heard() if session.subscription is not None:
                if session.subscription.heard(message):
                    session.got_on_at = now
                yield from self._tell_one(route, session)
            case Goodbye():
                del self.sessions[route]
                yield from self._left(session, now)
            case _:
                self.passed_over += 1

    def gone(self, route: bytes) -> None:
        """Nobody is at the other end any more."""
        self.sessions.pop(route, None)

    def _subscribed(
        self, route: bytes, session: _Session, asked: Subscribe, now: float
    ) -> Iterator[Action]:
        if session.subscription is None:
            session.subscription, session.got_on_at = Subscription(self.published, asked), now
        else:
            session.subscription.again(asked)
        yield from self._tell_one(route, session)

    def _pong(self, ping: Ping) -> Pong:
        return Pong(ping.number, self.published.epoch, self._load(), self.published.sequence)

    def _greeted(self, route: bytes, key: str, hello: Hello, now: float) -> Iterator[Action]:
        session = self.sessions.get(route)
        if version_of(hello) == 0:
            yield Answer(route, Refused(f"this node speaks versions {OLDEST} to {VERSION}"))
            return
        if session is not None:  # what is on its way to it counts further on
            session.hello, session.heard_at = hello, now
        elif len(self.sessions) < SESSIONS_MOST or self._make_room(key):
            session = self.sessions[route] = _Session(hello, key, now, now)
        else:
            yield Answer(route, Refused("it answers as many nodes as it can"))
            return
        yield Answer(route, self.hello())
        yield from self._tell_nodes_to(route, session)
        if hello.epoch != self.published.epoch:
            self._heard_of(key, hello, now)

    def _heard_of(self, key: str, hello: Hello, now: float) -> None:
        """Who connects here is worth a link, and needs not be waited for."""
        self.membership.told(hello.node, hello.address, key, now)
        for link in self.links.values():
            if link.known.address == hello.address and link.known.key == key:
                link.nudge(now)

    def _make_room(self, key: str) -> bool:
        """Forget a session of the key that has most of them, if that is fair to it."""
        counts = Counter(session.key for session in self.sessions.values())
        most = max(counts, key=counts.__getitem__)
        if counts[most] <= counts[key] + 1:
            return False
        theirs = [route for route, each in self.sessions.items() if each.key == most]
        del self.sessions[min(theirs, key=lambda route: self.sessions[route].heard_at)]
        return True

    def _left(self, session: _Session, now: float) -> Iterator[Action]:
        """Who says goodbye here need not be waited for on the link to it."""
        for link in list(self.links.values()):
            if link.epoch == session.hello.epoch and link.known.key == session.key:
                yield from link.hear(Goodbye(), now)

    def _tell(self) -> Iterator[Action]:
        for route, session in list(self.sessions.items()):
            yield from self._tell_one(route, session)

    def _tell_one(self, route: bytes, session: _Session) -> Iterator[Action]:
        if session.subscription is not None:
            for summary in session.subscription.next():
                yield Answer(route, summary)

    def _tell_nodes(self, now: float) -> Iterator[Action]:
        """Whom this node is linked to, to those who were not told yet. Not more often than a ping, as links come in flocks."""
        self._nodes_at = now
        live = [link for link in self.links.values() if link.standing is Standing.LIVE]
        live.sort(key=lambda link: link.known.address)
        known = [Known(each.known.address, each.known.key, each.node) for each in live]
        now_known = records(known, self._record())
        if now_known != self._nodes:
            self._nodes, self._nodes_number = now_known, self._nodes_number + 1
        for route, session in list(self.sessions.items()):
            yield from self._tell_nodes_to(route, session)

    def _tell_nodes_to(self, route: bytes, session: _Session) -> Iterator[Action]:
        if session.nodes != self._nodes_number:
            session.nodes = self._nodes_number
            yield Answer(route, Nodes(self._nodes))

    def _record(self) -> NodeRecord:
        return NodeRecord(self.identity.node, self.identity.address, self.identity.key)


def _epoch(random: Random) -> int:
    return random.getrandbits(63) + 1
