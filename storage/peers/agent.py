"""A node's agent: the one process of the node that answers peers and follows them.

    ROUTER          everybody who connects here: agents, and engines that read pages
    DEALER a peer   what the peer has -> the directory in shared memory
    told            a datagram socket: engines of this node say what they put
    workers         read pages from the tiers into buffers, from which they are sent

One thread has all the sockets. It never waits for a tier: that is the workers' (page_server.py) and the watch's
(holdings_watch.py). What is said is decided in node.py.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from random import SystemRandom

import zmq

from .actions import Action, Answer, Close, Open, Say
from .column import DirectoryColumn
from .directory import Directory
from .holdings import Holdings
from .holdings_watch import Held, HoldingsWatch
from .keys import KeyPair
from .link import Times
from .membership import Membership
from .messages import (
    NODES_MOST,
    TAG_BYTES,
    Cancel,
    Credit,
    Doubt,
    Expect,
    Get,
    Message,
    NotUnderstoodError,
    decode,
    encode,
)
from .meter import PART_BYTES, Meter
from .node import Identity, Node
from .page_server import PageServer
from .serving import Passed
from .sockets import answering, asking
from .told import Told

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
PEER_SHARE = (
    0.35  # of the directory's words that one peer may take: half of what it is ever filled to
)
BURST = 256  # messages of one socket that are handled before others have their turn
BURST_SECONDS = 0.05
WAITING_MOST = (
    256 << 20
)  # bytes from all others that may wait to be heard; what 64 peers may say at once is half
LINGER_MS = 250  # that a last word may take


@dataclass(frozen=True, slots=True)
class Parts:
    """What an agent works with. Whoever made them closes them, after the agent."""

    context: zmq.Context[zmq.Socket[bytes]]
    keys: KeyPair
    directory: Directory
    pages: PageServer
    told: Told


class Agent:
    """The loop.

    Args:
        listen: addresses to answer at.

    Raises:
        zmq.ZMQError: an address cannot be bound.
    """

    def __init__(
        self,
        parts: Parts,
        identity: Identity,
        membership: Membership,
        times: Times,
        listen: Iterable[str],
    ) -> None:
        self._parts = parts
        most = int(parts.directory.most_words * PEER_SHARE)
        columns = [DirectoryColumn(parts.directory, number, most) for number in range(NODES_MOST)]
        self.node = Node(
            identity,
            membership,
            columns.__getitem__,
            times,
            SystemRandom(),
            lambda: parts.pages.waiting,
        )
        self.passed_over = 0  # messages that nobody understood
        self._watches: list[HoldingsWatch] = []  # the last one is believed
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self.meter = Meter(WAITING_MOST)
        self._router = answering(parts.context, parts.keys, self.meter)
        try:
            for address in listen:
                self._router.bind(address)
        except zmq.ZMQError:
            self.meter.forget(self._router)
            self._router.close()
            raise
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_stopping = False
        self._poller = zmq.Poller()
        for readable in (self._router, self._wake, parts.told, *parts.pages.filenos):
            self._poller.register(readable, zmq.POLLIN)

    @property
    def address(self) -> str:
        """Where it was bound last, with the port that the system chose if it was to choose one."""
        endpoint = self._router.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes), "pyzmq gives text as bytes"
        return endpoint.rstrip(b"\0").decode()

    # From other threads.

    def soon(self, call: Callable[[], None]) -> None:
        """Have something done on the loop's thread, which waits for nothing: files and tiers are for others."""
        self._calls.put(call)
        self.wake()

    def wake(self) -> None:
        if self._wake >= 0:  # a signal may come after `close`
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the loop soon. May be called by a signal's handler."""
        self._is_stopping = True
        self.wake()

    # The loop's own thread.

    def run(self) -> None:
        """Until `stop`; says goodbye. Then comes `close`."""
        tick_at = time.monotonic()
        while not self._is_stopping:
            now = time.monotonic()
            if now >= tick_at:
                tick_at = now + TICK_SECONDS
                self._tick(now)
            wait = min(tick_at - now, self._parts.pages.wait(now))
            self._turn(dict(self._poller.poll(math.ceil(max(0.0, wait) * 1000))))
        self._do(self.node.leave())

    def _tick(self, now: float) -> None:
        if self.meter.look():
            logger.error(
                "lmcache: somebody sent more than %d MiB that nobody takes: the connection was cut. Software of a node is "
                "broken, or hostile; take its key off the list",
                WAITING_MOST >> 20,
            )
        self._parts.directory.beat()
        self._parts.pages.tick(now)
        self._do(self.node.tick(now))

    def share(self, holdings: Holdings) -> None:
        """Tell others what these say from now on; before `run`, or on its thread. What was said before holds no more."""
        number = len(self._watches)
        for watch in self._watches[-1:]:
            watch.end()
            self._do(self.node.cleared(b""))
        self._watches.append(
            HoldingsWatch(holdings, lambda held: self.soon(partial(self._hold, number, held)))
        )

    def _hold(self, number: int, held: Held) -> None:
        """This node holds other pages now. Args: number: of the watch that says so."""
        if number != len(self._watches) - 1:  # it has ended, and was at it still
            return
        added, removed = held.change.added, held.change.removed
        before = len(self.node.published.tags)
        if len(removed) > before // 2 > TAG_BYTES:  # as after a clear: nothing is to be believed
            self._do(self.node.cleared(held.tags))
        else:
            self._do(self.node.holds(held.tags, added, removed))

    def _turn(self, events: dict[object, int]) -> None:
        now = time.monotonic()
        if self._wake in events:
            os.eventfd_read(self._wake)
            self._make_calls()
        if self._parts.told.fileno() in events or self._parts.told in events:
            for keys in self._parts.told.take():
                for watch in self._watches[-1:]:
                    watch.told(keys)
        if self._router in events:
            self._serve(now)
        for number, socket in list(self._links.items()):
            if socket in events:
                self._hear(number, socket, now)
        self._pass(self._parts.pages.work(self._router, now))

    def _pass(self, passed: Iterable[Passed]) -> None:
        """Say which pages do not come."""
        for each in list(passed):
            self._answer(each.route, each.without)

    def _make_calls(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            call()

    def _burst(self, began: float) -> Iterator[None]:
        """As often as one socket is heard before others have their turn."""
        for _ in range(BURST):
            yield
            if time.monotonic() - began > BURST_SECONDS:
                return

    def _serve(self, now: float) -> None:
        """What came to the ROUTER."""
        for _ in self._burst(now):
            try:
                frames = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            came = frames[1:]  # the first one is libzmq's own: who sent them
            if came:
                size = sum(len(frame) + PART_BYTES for frame in came)
                self.meter.took(self._router, int(came[0].get(zmq.SRCFD)), size)
            if len(frames) != 2:
                self.passed_over += 1
                continue
            try:
                self._asked(frames[0].bytes, frames[1], now)
            except NotUnderstoodError:
                self.passed_over += 1

    def _asked(self, route: bytes, frame: zmq.Frame, now: float) -> None:
        """Raises: NotUnderstoodError."""
        message = decode(frame.bytes)
        key = str(frame.get("User-Id")) if self._parts.keys else ""
        match message:
            case Get() | Credit() | Cancel() | Expect() | Doubt():
                if not self.node.membership.allows(key):  # it was allowed when it connected
                    self.passed_over += 1
                    self._parts.pages.gone(route)
                    return
                self._pass(self._parts.pages.asked(route, key, message, now))
            case _:
                self._do(self.node.asked(route, key, message, now))

    def _hear(self, number: int, socket: zmq.Socket[bytes], now: float) -> None:
        """What came on a link."""
        for _ in self._burst(now):
            if self._links.get(number) is not socket:  # closed by what came before
                return
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self.meter.taken(socket).add(sum(len(frame) + PART_BYTES for frame in frames))
            try:
                message = decode(frames[0])
            except NotUnderstoodError:
                self.passed_over += 1
                continue
            self._do(self.node.hear(number, message, now))

    def _do(self, actions: Iterable[Action]) -> None:
        for action in list(actions):
            match action:
                case Open(link, address, key):
                    self._open(link, address, key)
                case Close(link):
                    self._drop(link)
                case Say(link, message):
                    self._say(link, message)
                case Answer(route, message):
                    self._answer(route, message)

    def _open(self, link: int, address: str, key: str) -> None:
        self._drop(link)
        try:
            socket = asking(self._parts.context, address, key, self._parts.keys, self.meter)
        except zmq.ZMQError as error:  # it is silent then, and tried again later
            logger.warning("lmcache: cannot connect to %a: %s", address, error)
            return
        self._links[link] = socket
        self._poller.register(socket, zmq.POLLIN)

    def _drop(self, link: int) -> None:
        socket = self._links.pop(link, None)
        if socket is not None:
            self._poller.unregister(socket)
            self.meter.forget(socket)
            socket.close(linger=LINGER_MS)

    def _say(self, link: int, message: Message) -> None:
        socket = self._links.get(link)
        if socket is None:
            return
        try:
            socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:  # it does not answer either, and will be taken for gone
            self.passed_over += 1

    def _answer(self, route: bytes, message: Message) -> None:
        try:
            self._router.send_multipart([route, encode(message)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.node.gone(route)
            self._parts.pages.gone(route)

    def close(self) -> None:
        """Let go of the sockets, after `run` and when nobody calls `soon` any more."""
        for watch in self._watches:
            watch.close()
        for link in list(self._links):
            self._drop(link)
        self.meter.forget(self._router)
        self._router.close(linger=LINGER_MS)
        wake, self._wake = self._wake, -1
        os.close(wake)
