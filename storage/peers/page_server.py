"""The agent's pages: requests go in, workers read or show, frames go out.

`Serving` says whose turn it is, `Staging` what could be read ahead when it is nobody's; here are the workers, the
buffers and the rate. All is called by the thread that owns the socket, but for what a worker does.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_char
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from queue import Empty, SimpleQueue
from typing import Protocol

import zmq

from ...kernels.pages import PageSegments, checksums
from ..base import Limits
from ..slab.tier import Shown
from .bucket import Bucket
from .doubts import Doubted, Doubts
from .frames import Frames, Outgoing, SendBuffer, SendPool, Sent
from .in_place import InPlace
from .messages import (
    Cancel,
    Credit,
    Doubt,
    Expect,
    Get,
    NotUnderstoodError,
    Why,
    Without,
    split_keys,
)
from .serving import BATCH_BYTES, Batch, Passed, Serving
from .staging import STAGE_BYTES, Expected, Staging

UNIT = 2 << 20  # bytes; memory is lent in multiples of it
OWNERS = (1 << 63) - 1
READERS = 2  # threads
CLOSE_SECONDS = 1.0  # that libzmq may take to let go of what it sends
READ_SECONDS = 10.0  # that a batch may take to be read


class Pages(Protocol):
    """Where pages come from: a chain."""

    def get(
        self, keys: Sequence[bytes], into: PageSegments, *, parent: bytes = b"", limits: Limits
    ) -> list[bool]: ...


class NoPages:
    """Of a node that only reads."""

    def get(
        self, keys: Sequence[bytes], into: PageSegments, *, parent: bytes = b"", limits: Limits
    ) -> list[bool]:
        return [False] * len(keys)


@dataclass(frozen=True, slots=True)
class _Read:
    """What a worker made of a batch. Attributes: came: of each page whether it is in `frames`."""

    batch: Batch
    frames: Frames
    came: list[bool]


@dataclass(frozen=True, slots=True)
class _Aside:
    """A worker has done something that no request waits for."""


class PageServer:
    """Answers requests for pages.

    Args:
        in_place: for pages that need not be read at all.
        memory: bytes for pages on their way, be they sent from where they lie; no page larger than that is sent.
        rate: bytes a second; 0: no limit.
    """

    def __init__(
        self,
        pages: Pages,
        serving: Serving,
        staging: Staging,
        in_place: InPlace,
        memory: int,
        rate: int,
        now: float,
    ) -> None:
        self._pages = pages
        self._serving = serving
        self._staging = staging
        self._largest = max(UNIT, memory // UNIT * UNIT)  # all that can be lent at once
        self._pool = SendPool(self._largest)
        serving.batch_most = min(BATCH_BYTES, self._largest)
        serving.has_room = self._has_room
        staging.part_most = min(STAGE_BYTES, self._largest)
        self._in_place = in_place
        self._doubts = Doubts(serving.shares, self._largest)
        self._bucket = Bucket(rate, now)
        self._workers = ThreadPoolExecutor(READERS, thread_name_prefix="lmcache-serve")
        self._busy = 0
        self._done: SimpleQueue[Future[_Read | _Aside]] = SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._unsent: list[_Read] = []  # to who takes no more now; tried again at the next turn
        self.sent = 0  # bytes

    @property
    def filenos(self) -> tuple[int, ...]:
        """What to wait for: then there is work."""
        return self._bell, self._pool.fileno()

    @property
    def waiting(self) -> int:
        """Bytes that are on their way out."""
        return self._pool.bytes_lent

    def set_limits(self, rate: int, per_route: int) -> None:
        """As the settings are now."""
        self._bucket.rate = rate
        self._serving.per_route = per_route

    def wait(self, now: float) -> float:
        """Seconds until the rate allows more; for all else there is a bell."""
        wait = self._bucket.wait(now)
        return wait if wait and len(self._serving) else float("inf")

    def asked(
        self, route: bytes, key: str, message: Get | Credit | Cancel | Expect | Doubt, now: float
    ) -> Iterator[Passed]:
        """A message of an engine. Args: key: that it proved to have; empty: none. Raises: NotUnderstoodError."""
        match message:
            case Get():
                owner = hash(key or route) & OWNERS
                yield from self._serving.get(route, owner, message, self._largest, now)
            case Credit():
                self._serving.credit(route, message, now)
            case Cancel():
                self._serving.cancel(route, message)
            case Expect():
                self._staging.expect(Expected(split_keys(message.keys), message.length))
            case Doubt():
                keys = split_keys(message.keys)
                if len(keys) != len(message.lengths):
                    raise NotUnderstoodError("keys and lengths must be equally many")
                self._doubts.add(map(Doubted, keys, message.lengths))

    def gone(self, route: bytes) -> None:
        self._serving.gone(route)

    def tick(self, now: float) -> None:
        self._serving.expire(now)

    def work(self, router: zmq.Socket[bytes], now: float) -> Iterator[Passed]:
        """Send what was read, and have read what comes next; pages that do not come are to be told of."""
        self._pool.hear()
        if seen := self._pool.seen():
            self._start(partial(self._take_back, seen))
        unsent, self._unsent = self._unsent, []
        for read in (*unsent, *self._rung()):
            yield from self._send(router, read)
        while self._busy < READERS and not self._bucket.wait(now):
            turn = self._serving.turn()
            if isinstance(turn, Passed):
                yield turn
            elif not (self._begin(turn) if turn else self._begin_aside()):
                return

    def close(self) -> None:
        """Wait for the workers, each of which ends within a batch's time, and a moment for what libzmq still sends."""
        self._workers.shutdown(cancel_futures=True)
        self._unsent.clear()
        while not self._done.empty():
            self._done.get_nowait()
        os.close(self._bell)
        self._let_all_go(time.monotonic() + CLOSE_SECONDS)

    def _let_all_go(self, until: float) -> None:
        """What is sent still by then becomes others' when this process ends."""
        poll = select.poll()
        poll.register(self._pool, select.POLLIN)
        while True:
            self._take_back(self._pool.seen())
            left = until - time.monotonic()
            if not self._pool.bytes_lent or left <= 0:
                return
            poll.poll(left * 1000)
            self._pool.hear()

    def _rung(self) -> Iterator[_Read]:
        """What workers have read since the last time."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return
        while True:
            try:
                future = self._done.get_nowait()
            except Empty:
                return
            self._busy -= 1
            done = future.result()
            if isinstance(done, _Read):
                yield done

    def _has_room(self, owner: int, size: int) -> bool:
        """Half of the memory is the most that one asker holds, be it that it does not take what it asked for."""
        lent = self._pool.bytes_lent_to(owner)
        return lent == 0 or lent + size <= self._largest // 2

    def _begin(self, batch: Batch) -> bool:
        """Whether there was memory for it; if not, a buffer that comes free rings."""
        buffer = self._pool.take(batch.bytes, batch.request.owner)
        if buffer is None:
            return False
        self._serving.begun(batch)
        self._bucket.take(batch.bytes)
        self._start(partial(self._read, batch, buffer))
        return True

    def _begin_aside(self) -> bool:
        """Whether there was anything to do that nobody waits for, and memory for it."""
        return self._begin_doubted() if len(self._doubts) else self._begin_ahead()

    def _begin_doubted(self) -> bool:
        doubted = self._doubts.next()
        buffer = self._pool.take(doubted.length)
        if buffer is None:  # it is doubted again when it is asked for again
            return False
        self._start(partial(self._look_at, doubted, buffer))
        return True

    def _begin_ahead(self) -> bool:
        expected = self._staging.next()
        if not expected.keys:
            return False
        buffer = self._pool.take(expected.length * len(expected.keys))
        if buffer is None:  # all of it is busy with what is wanted now
            return False
        self._start(partial(self._read_ahead, expected, buffer))
        return True

    def _start(self, job: Callable[[], _Read | _Aside]) -> None:
        self._busy += 1
        self._workers.submit(job).add_done_callback(self._ring)

    def _ring(self, future: Future[_Read | _Aside]) -> None:
        self._done.put(future)
        os.eventfd_write(self._bell, 1)

    def _read(self, batch: Batch, buffer: SendBuffer) -> _Read:
        """On a worker's thread."""
        request = batch.request
        keys = request.keys[batch.first : batch.end]
        lengths = request.lengths[batch.first : batch.end]
        shown = self._in_place.show(buffer, keys, lengths)
        pages = {
            i: Outgoing(batch.first + i, address, lengths[i], checksum)
            for i, address, checksum in shown
        }
        rest = [i for i in range(len(keys)) if i not in pages]
        if rest:
            pages |= self._copied(batch, rest, buffer)
        going = [pages[i] for i in sorted(pages)]
        frames = Frames(request.route, request.number, buffer, going, request.frame)
        return _Read(batch, frames, [i in pages for i in range(len(keys))])

    def _copied(self, batch: Batch, places: list[int], buffer: SendBuffer) -> dict[int, Outgoing]:
        """Of some places of a batch the pages that could be read into the buffer."""
        keys = [batch.request.keys[batch.first + i] for i in places]
        lengths = [batch.request.lengths[batch.first + i] for i in places]
        addresses = [buffer.address + before for before in accumulate(lengths, initial=0)][:-1]
        into = PageSegments(addresses, lengths, 1, buffer)
        came = self._pages.get(keys, into, limits=Limits.within(READ_SECONDS))
        here = [i for i, is_here in enumerate(came) if is_here]
        records = [(c_char * lengths[i]).from_address(addresses[i]) for i in here]
        sums = checksums([keys[i] for i in here], records)
        return {
            places[i]: Outgoing(batch.first + places[i], addresses[i], lengths[i], checksum)
            for i, checksum in zip(here, sums, strict=True)
        }

    def _read_ahead(self, expected: Expected, buffer: SendBuffer) -> _Aside:
        """On a worker's thread."""
        self._staging.stage(expected, buffer.address)
        return _Aside()

    def _look_at(self, doubted: Doubted, buffer: SendBuffer) -> _Aside:
        """On a worker's thread: reading verifies, and the chain removes what is not whole."""
        into = PageSegments([buffer.address], [doubted.length], 1, buffer)
        self._pages.get([doubted.key], into, limits=Limits.within(READ_SECONDS))
        return _Aside()

    def _take_back(self, seen: list[Shown]) -> _Aside:
        """On a worker's thread."""
        self._in_place.take_back(seen)
        return _Aside()

    def _send(self, router: zmq.Socket[bytes], read: _Read) -> Iterator[Passed]:
        request = read.batch.request
        if not request.is_over:
            sent = read.frames.send(router)
            if sent is Sent.FULL:
                self._unsent.append(read)
                return
            if sent is not Sent.ALL:
                self._serving.gone(request.route)
            else:
                self.sent += read.batch.bytes
                yield from _without(read)
        self._serving.done(read.batch)


def _without(read: _Read) -> Iterator[Passed]:
    """The pages of a batch that are not here, run by run."""
    page = read.batch.first
    for is_here, run in groupby(read.came):
        count = len(list(run))
        if not is_here:
            without = Without(read.batch.request.number, page, count, Why.ABSENT)
            yield Passed(read.batch.request.route, without)
        page += count
