"""A network of nodes that share pages, without sockets and without waiting: one thread, a seed, a clock of its own.

It does what ZeroMQ over TCP does. Messages of one connection come in order, each once, or not at all: a connection
that *breaks* loses what was under way on it and is made anew by itself, under another route, after which what was
not sent yet is. One that is *stalled* (a cable that is out) holds everything until it goes on. Queues are bounded, and
what does not fit is dropped, as a send that would block is. Nobody is told of any of this.

A machine runs one `Node` (storage/peers/node.py), ticks it, and may crash, restart, leave, freeze and go on. Its clock has
an offset and a rate of its own. Every message is encoded and decoded.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

from lmcache_sglang.storage.peers.actions import Action, Answer, Close, Open, Say
from lmcache_sglang.storage.peers.link import Link, Times
from lmcache_sglang.storage.peers.membership import Known, Membership
from lmcache_sglang.storage.peers.messages import (
    NODES_MOST,
    TAG_BYTES,
    NotUnderstoodError,
    decode,
    encode,
)
from lmcache_sglang.storage.peers.node import Identity, Node
from lmcache_sglang.storage.peers.standing import Standing

TRACE_LINES = 60


def pack(tags: Iterable[int]) -> bytes:
    """Tags as they are told."""
    return b"".join(tag.to_bytes(TAG_BYTES, "little") for tag in sorted(tags))


def unpack(tags: bytes) -> set[int]:
    cuts = range(0, len(tags), TAG_BYTES)
    return {int.from_bytes(tags[at : at + TAG_BYTES], "little") for at in cuts}


@dataclass(slots=True)
class SetColumn:
    """A peer's place in a directory that is a Python set."""

    tags: set[int] = field(default_factory=set)
    is_believed: bool = False

    def put(self, tags: bytes) -> None:
        self.tags |= unpack(tags)

    def drop(self, tags: bytes) -> None:
        self.tags -= unpack(tags)

    def forget(self) -> None:
        self.tags.clear()

    def believe(self) -> None:
        self.is_believed = True

    def doubt(self) -> None:
        self.is_believed = False

    def describe(self, link: Link) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Weather:
    """How the network is. Seconds.

    Attributes:
        latency: of a message, at least.
        jitter: up to which it takes longer.
        retry: mean pause between a socket's own attempts to connect.
        queue: messages under way on one connection in one direction.
        tick: of the machines' own clocks.
    """

    latency: float = 0.001
    jitter: float = 0.02
    retry: float = 0.5
    queue: int = 256
    tick: float = 1.0

    @property
    def slowest(self) -> float:
        return self.latency + self.jitter


CLEAR = Weather()
TIMES = Times()


class Wire:
    """A DEALER of one machine that is connected to an address, now and again.

    Attributes:
        route: of the connection that there is, as the other side sees it; empty: there is none.
    """

    def __init__(
        self, network: Network, client: Machine, number: int, address: str, key: str
    ) -> None:
        self.network = network
        self.client = client
        self.number = number
        self.address = address
        self.key = key
        self.route = b""
        self.is_closed = False
        self._unsent: deque[bytes] = deque()
        self._held: list[tuple[Callable[..., None], bytes, bytes]] = []
        self._under_way = [0, 0]  # up: to the server; down
        self._free_at = [0.0, 0.0]  # no message comes before the one sent before it
        self.connect()

    @property
    def waiting(self) -> int:
        """Messages in its queues, the longer one."""
        return max(len(self._unsent), *self._under_way)

    @property
    def server(self) -> Machine | None:
        return self.network.machines.get(self.address)

    def connect(self) -> None:
        if not self.is_closed and not self.route:
            self.network.after(4 * self.network.weather.latency, self._shake_hands)

    def _shake_hands(self) -> None:
        if self.is_closed or self.route:
            return
        server = self.server
        if server is None or not server.admits(self) or self.network.is_cut(self.client, server):
            pause = self.network.random.uniform(0.5, 1.5) * self.network.weather.retry
            self.network.after(pause, self._shake_hands)
            return
        self.route = self.network.new_route()
        server.routes[self.route] = self
        while self._unsent:
            self._send(0, self._arrive_up, self._unsent.popleft())

    def say(self, body: bytes) -> None:
        if self.route:
            self._send(0, self._arrive_up, body)
        elif len(self._unsent) < self.network.weather.queue:
            self._unsent.append(body)

    def answer(self, body: bytes) -> None:
        self._send(1, self._arrive_down, body)

    def _send(self, way: int, arrive: Callable[[bytes, bytes], None], body: bytes) -> None:
        network = self.network
        if self._under_way[way] >= network.weather.queue:
            network.dropped += 1
            return
        self._under_way[way] += 1
        server = self.server
        if server is not None and network.is_cut(self.client, server):
            self._held.append((arrive, self.route, body))
            return
        at = max(self._free_at[way], network.now + network.latency())
        self._free_at[way] = at
        network.at(at, arrive, self.route, body)

    def go_on(self) -> None:
        """The cable is in again."""
        held, self._held = self._held, []
        for arrive, route, body in held:
            self.network.after(self.network.weather.slowest, arrive, route, body)

    def _arrive_up(self, route: bytes, body: bytes) -> None:
        server = self.server
        if route == self.route and server is not None:
            server.take(self._read_up, server, route, body)

    def _arrive_down(self, route: bytes, body: bytes) -> None:
        if route == self.route and not self.is_closed:
            self.client.take(self._read_down, route, body)

    def _read_up(self, server: Machine, route: bytes, body: bytes) -> None:
        self._leaves_queue(0, route)
        server.asked(route, self.key, body)

    def _read_down(self, route: bytes, body: bytes) -> None:
        self._leaves_queue(1, route)
        self.client.heard(self, body)

    def _leaves_queue(self, way: int, route: bytes) -> None:
        if route == self.route:
            self._under_way[way] -= 1

    def breaks(self) -> None:
        """Whatever is under way is lost."""
        server = self.server
        if server is not None:
            server.routes.pop(self.route, None)
        self.route = b""
        self._under_way, self._free_at, self._held = [0, 0], [0.0, 0.0], []
        self.connect()

    def close(self, at_once: bool) -> None:
        """Args: at_once: the process ended; else what was said last is still sent."""
        self.is_closed = True
        if at_once:
            self.breaks()
        else:
            self.network.after(2 * self.network.weather.slowest, self.breaks)


class Machine:
    """A node, its agent's sockets, and what it really has.

    Attributes:
        pages: tags that it has.
        gone: when each that it has no more went.
        began_at: when its epoch did.
        thawed_at: when it last went on after a freeze, in this life.
    """

    def __init__(self, network: Network, address: str, seeds: tuple[str, ...], skew: Skew) -> None:
        self.network = network
        self.address = address
        self.seeds = seeds
        self.skew = skew
        self.pages: set[int] = set()
        self.gone: dict[int, float] = {}
        self.is_up = False
        self.is_frozen = False
        self.began_at = 0.0
        self.thawed_at = float("-inf")
        self.wires: dict[int, Wire] = {}
        self.routes: dict[bytes, Wire] = {}
        self.columns: dict[int, SetColumn] = {}
        self.sent: Counter[int] = Counter()  # messages, by virtual second
        self._inbox: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._life = 0  # grows with every start
        self.node = self._node()

    @property
    def name(self) -> str:
        return self.address.removeprefix("tcp://").partition(":")[0]

    @property
    def now(self) -> float:
        """What its own clock says."""
        return self.skew.offset + self.skew.rate * self.network.now

    def _node(self) -> Node:
        network = self.network
        membership = Membership([self.address], "", frozenset(), network.most)
        configured = [Known(each) for each in self.seeds if each != self.address]
        membership.configure(configured, frozenset(), network.most)
        random = Random(network.random.getrandbits(64))
        identity = Identity(self.name, self.address)
        return Node(identity, membership, self._column, network.times, random, most=network.most)

    def _column(self, number: int) -> SetColumn:
        self.columns[number] = SetColumn()
        return self.columns[number]

    def start(self, pages: Iterable[int] = ()) -> None:
        """Args: pages: that it finds in its store."""
        self.network.trace(f"{self.name} starts")
        self._life += 1
        self.is_up, self.is_frozen = True, False
        self.began_at = self.network.now
        self.thawed_at = float("-inf")
        self.pages = set(pages)
        self.node = self._node()
        self._perform(self.node.holds(pack(self.pages), pack(self.pages), b""))
        self._tick(self._life)

    def crash(self) -> None:
        """Nothing is said to anybody."""
        self.network.trace(f"{self.name} crashes")
        self._stop()

    def leave(self) -> None:
        self.network.trace(f"{self.name} leaves")
        self._perform(self.node.leave())
        self.is_up = False
        self.network.after(3 * self.network.weather.slowest, self._end, self._life)

    def _end(self, life: int) -> None:
        if life == self._life:
            self._stop()

    def _stop(self) -> None:
        self._life += 1
        self.is_up = False
        self._remove(set(self.pages))
        for wire in [*self.wires.values(), *self.routes.values()]:
            if wire.client is self:
                wire.close(at_once=True)
            else:
                wire.breaks()
        self.wires.clear()
        self.columns.clear()
        self._inbox.clear()

    def freeze(self, seconds: float) -> None:
        self.network.trace(f"{self.name} freezes for {seconds:.1f} s")
        self.is_frozen = True
        self.network.after(seconds, self._thaw, self._life)

    def _thaw(self, life: int) -> None:
        if life != self._life:
            return
        self.network.trace(f"{self.name} goes on")
        self.is_frozen, self.thawed_at = False, self.network.now
        if self.network.random.random() < 0.5:
            self._perform(self.node.tick(self.now))
        while self._inbox:
            what, args = self._inbox.popleft()
            what(*args)

    # What it has.

    def change(self, added: set[int], removed: set[int]) -> None:
        added, removed = added - self.pages, removed & self.pages
        self._remove(removed)
        self.pages |= added
        self._perform(self.node.holds(pack(self.pages), pack(added), pack(removed)))

    def clear(self) -> None:
        self.network.trace(f"{self.name} is cleared")
        self.began_at = self.network.now
        self._remove(set(self.pages))
        self._perform(self.node.cleared(b""))

    def _remove(self, tags: set[int]) -> None:
        self.pages -= tags
        self.gone |= dict.fromkeys(tags, self.network.now)

    def believed(self) -> Iterator[tuple[Link, set[int]]]:
        """What its directory says, peer by peer."""
        for number, link in self.node.links.items():
            if self.columns[number].is_believed:
                yield link, self.columns[number].tags

    # Its sockets.

    def admits(self, wire: Wire) -> bool:
        """Whether the handshake succeeds; of a frozen process the kernel accepts, but that ends in nothing."""
        return self.is_up and not self.is_frozen

    def take(self, what: Callable[..., None], *args: object) -> None:
        """Something came."""
        if self.is_frozen:
            self._inbox.append((what, args))
        elif self.is_up:
            what(*args)

    def heard(self, wire: Wire, body: bytes) -> None:
        if self.wires.get(wire.number) is wire:
            try:
                self._perform(self.node.hear(wire.number, decode(body), self.now))
            except NotUnderstoodError:
                self.node.passed_over += 1

    def asked(self, route: bytes, key: str, body: bytes) -> None:
        try:
            self._perform(self.node.asked(route, key, decode(body), self.now))
        except NotUnderstoodError:
            self.node.passed_over += 1

    def _tick(self, life: int) -> None:
        if life != self._life or not self.is_up:
            return
        if not self.is_frozen:
            self._perform(self.node.tick(self.now))
        self.network.after(self.network.weather.tick / self.skew.rate, self._tick, life)

    def _perform(self, actions: Iterator[Action]) -> None:
        for action in actions:
            match action:
                case Say():
                    self._count()
                    self.wires[action.link].say(encode(action.message))
                case Answer():
                    self._count()
                    wire = self.routes.get(action.route)
                    if wire is not None:
                        wire.answer(encode(action.message))
                case Open():
                    self.network.opened(self, action.address)
                    self._close(action.link)
                    wire = Wire(self.network, self, action.link, action.address, "")
                    self.wires[action.link] = wire
                case Close():
                    self._close(action.link)

    def _close(self, number: int) -> None:
        wire = self.wires.pop(number, None)
        if wire is not None:
            wire.close(at_once=False)

    def _count(self) -> None:
        self.network.messages += 1
        self.sent[int(self.network.now)] += 1


@dataclass(frozen=True, slots=True)
class Skew:
    """A machine's clock: `offset` + `rate` * the time that there really is."""

    offset: float = 0.0
    rate: float = 1.0


TRUE = Skew()


class Network:
    """Machines, and what is between them.

    Attributes:
        now: virtual seconds.
        opens: of each link that was opened: when, by whom, to which address.
        messages: that were said.
        dropped: that did not fit into a queue.
    """

    def __init__(
        self,
        seed: int,
        *,
        weather: Weather = CLEAR,
        times: Times = TIMES,
        most: int = NODES_MOST,
    ) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.weather = weather
        self.times = times
        self.most = most
        self.now = 0.0
        self.machines: dict[str, Machine] = {}
        self.opens: list[tuple[float, str, str]] = []
        self.messages = 0
        self.dropped = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._number = 0
        self._cut: set[frozenset[str]] = set()
        self._trace: deque[str] = deque(maxlen=TRACE_LINES)

    # Time.

    def at(self, time: float, what: Callable[..., None], *args: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, what, args))

    def after(self, seconds: float, what: Callable[..., None], *args: object) -> None:
        self.at(self.now + seconds, what, *args)

    def run(self, seconds: float) -> None:
        """Everything that happens in that time."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, what, args = heapq.heappop(self._events)
            what(*args)
        self.now = end

    # Machines.

    def add(self, name: str, *seeds: str, skew: Skew = TRUE) -> Machine:
        """One that is not started. Args: seeds: names of others."""
        address = address_of(name)
        machine = Machine(self, address, tuple(address_of(each) for each in seeds), skew)
        self.machines[address] = machine
        return machine

    def up(self) -> list[Machine]:
        return [each for each in self.machines.values() if each.is_up]

    # Cables.

    def latency(self) -> float:
        return self.weather.latency + self.random.random() * self.weather.jitter

    def new_route(self) -> bytes:
        self._number += 1
        return self._number.to_bytes(5, "big")

    def is_cut(self, one: Machine, other: Machine) -> bool:
        return bool(self._cut) and frozenset((one.address, other.address)) in self._cut

    def cut(self, some: Iterable[Machine], others: Iterable[Machine]) -> None:
        """Nothing gets through between them; connections that there are wait."""
        some, others = list(some), list(others)
        self.trace(f"{[m.name for m in some]} cut off from {[m.name for m in others]}")
        self._cut |= {frozenset((a.address, b.address)) for a in some for b in others if a is not b}

    def mend(self, breaks: bool) -> None:
        """All cables are in. Args: breaks: connections that were held did not survive it."""
        self.trace("all cables are in")
        pairs, self._cut = self._cut, set()
        for wire in self.wires():
            if frozenset((wire.client.address, wire.address)) in pairs:
                if breaks:
                    wire.breaks()
                else:
                    wire.go_on()

    def wires(self) -> list[Wire]:
        return [wire for machine in self.machines.values() for wire in machine.wires.values()]

    def opened(self, machine: Machine, address: str) -> None:
        self.opens.append((self.now, machine.address, address))

    # What is looked at.

    def trace(self, line: str) -> None:
        self._trace.append(f"{self.now:9.3f} {line}")

    def report(self) -> str:
        """For a test that fails: the seed, and what happened last."""
        return "\n".join([f"seed {self.seed}, at {self.now:.3f} s:", *self._trace])

    def differences(self) -> list[str]:
        """What those that are up do not know of one another yet, or no more; and do believe wrongly."""
        return [line for machine in self.up() for line in self._differences(machine)]

    def _differences(self, machine: Machine) -> Iterator[str]:
        live = {
            link.known.address: machine.columns[link.number].tags
            for link in machine.node.links.values()
            if link.standing is Standing.LIVE
        }
        for other in self.up():
            if other is machine:
                continue
            tags = live.pop(other.address, None)
            if tags is None:
                yield f"{machine.name} does not follow {other.name}"
            elif tags != other.pages:
                yield f"{machine.name} believes {len(tags ^ other.pages)} tags of {other.name} wrongly"
        for address in live:
            yield f"{machine.name} follows {address}, which is not up"

    def false_hits(self, stale: float) -> list[str]:
        """What is believed of a peer though it is not so, and was not for so many seconds."""
        awake = [each for each in self.up() if not each.is_frozen]
        return [line for machine in awake for line in self._false_hits(machine, stale)]

    def _false_hits(self, machine: Machine, stale: float) -> Iterator[str]:
        since = self.now - stale
        if self.now - machine.thawed_at < self.weather.tick / machine.skew.rate:
            return  # it wakes up: its first tick is due
        if self.now - machine.thawed_at < stale:
            since -= self.times.silence  # what it found waiting was up to so old
        for link, tags in machine.believed():
            peer = self.machines[link.known.address]
            if link.epoch != peer.node.published.epoch and peer.began_at < since:
                yield f"{machine.name} believes what {peer.name} had in another epoch"
            for tag in tags - peer.pages:
                if peer.gone.get(tag, float("-inf")) < since:
                    yield f"{machine.name} believes {tag} of {peer.name}"


def address_of(name: str) -> str:
    return f"tcp://{name}:7700"
