"""A peer whose every message is the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread

import xxhash
import zmq

from lmcache_sglang.storage.peers.messages import Get, Message, Page, decode, encode, split_keys

FRAME = 8192
SOON = 10.0  # seconds: far longer than anything here takes, far shorter than a hang

Parts = Sequence[bytes]


class StoppedError(Exception):
    """The test is done with this peer."""


@dataclass
class Conversation:
    """The peer's side of it, in its thread. `heard`: all that came, in order. `asked`: whether anything did."""

    router: zmq.Socket[bytes]
    stop: zmq.Socket[bytes]
    route: bytes = b""
    heard: list[Message] = field(default_factory=list)
    asked: Event = field(default_factory=Event)

    def hear(self) -> Message:
        """Raises: StoppedError."""
        poller = zmq.Poller()
        poller.register(self.router, zmq.POLLIN)
        poller.register(self.stop, zmq.POLLIN)
        if self.stop in dict(poller.poll()):
            raise StoppedError
        self.route, body = self.router.recv_multipart()
        self.heard.append(decode(body))
        self.asked.set()
        return self.heard[-1]

    def hear_get(self) -> Get:
        message = self.hear()
        assert isinstance(message, Get)
        return message

    def say(self, messages: Iterable[Parts]) -> None:
        """Raises: StoppedError: the other side is gone."""
        for parts in messages:
            self._send(parts)

    def say_until_stopped(self, parts: Parts) -> None:
        while not self.stop.poll(0):
            try:
                self._send(parts, zmq.DONTWAIT)
            except zmq.Again:
                self.stop.poll(1)

    def _send(self, parts: Parts, flags: int = 0) -> None:
        try:
            self.router.send_multipart([self.route, *parts], flags)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise StoppedError from error
            raise


@dataclass
class Peer:
    """Where it is, and what it heard until now."""

    address: str
    conversation: Conversation
    context: zmq.Context[zmq.Socket[bytes]]

    @contextmanager
    def connected(self) -> Iterator[zmq.Socket[bytes]]:
        dealer = self.context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(self.address)
        try:
            yield dealer
        finally:
            dealer.close()


@contextmanager
def peer(
    context: zmq.Context[zmq.Socket[bytes]],
    script: Callable[[Conversation], None],
    address: str = "tcp://127.0.0.1:*",
) -> Iterator[Peer]:
    """Follows its script in a thread, then only listens."""
    router, stop, stopper = context.socket(zmq.ROUTER), *_pair(context)
    router.linger = 0
    router.router_mandatory = True
    router.bind(address)
    conversation = Conversation(router, stop)
    thread = Thread(target=_follow, args=(script, conversation))
    thread.start()
    try:
        yield Peer(_endpoint(router), conversation, context)
    finally:
        stopper.send(b"")
        thread.join(SOON)
        assert not thread.is_alive()
        for socket in (router, stop, stopper):
            socket.close()


def _endpoint(socket: zmq.Socket[bytes]) -> str:
    where = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(where, bytes)
    return where.decode().rstrip("\0")


def _pair(
    context: zmq.Context[zmq.Socket[bytes]],
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    ends = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    address = f"inproc://stop-{id(ends)}"
    ends[0].bind(address)
    ends[1].connect(address)
    return ends


def _follow(script: Callable[[Conversation], None], conversation: Conversation) -> None:
    try:
        script(conversation)
        while not conversation.router.closed:
            conversation.hear()
    except StoppedError:
        pass


def checksum(key: bytes, content: bytes) -> int:
    """What messages.py says that a page's is, by the reference implementation."""
    return xxhash.xxh3_64_intdigest(content, xxhash.xxh3_64_intdigest(key))


def frames(get: Get, contents: Sequence[bytes]) -> list[Parts]:
    """The honest answer to a `Get`. Args: contents: of its pages, in its order."""
    return [
        frame(get.request, page, offset, content[offset : offset + get.frame], sum_)
        for page, (key, content) in enumerate(zip(split_keys(get.keys), contents, strict=True))
        for sum_ in [checksum(key, content)]
        for offset in range(0, len(content), get.frame)
    ]


def frame(request: int, page: int, offset: int, piece: bytes, checksum: int) -> Parts:
    return [encode(Page(request, page, offset, checksum)), piece]
