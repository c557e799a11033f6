"""Pages from peers into an engine's memory: one native call for a batch, without the GIL.

A *stream* is one `Get` over one connection. Several may run in one call, to several peers or over several
connections of one; each page belongs to one of them. Every frame is checked against what was asked and verified
while it is copied (csrc/frame_acceptor.hpp), so a peer can withhold pages, but not write beside them.

The memory of a page that is not a hit may hold parts of it, or wrong bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import zmq

from ...kernels.pages import PageSegments
from .. import _native
from .._native import Tally
from ..base import Limits
from .libzmq import libzmq
from .messages import FRAME_MOST, PAGE_MOST, PAGES_MOST, VERSION, Credit, Get, encode

LONG_SECONDS = 3600.0  # of a call without a deadline: the streams stall long before


class Came(IntEnum):
    """What became of one page. The values are those of the native side."""

    UNASKED = 0  # no stream asked for it
    HIT = 2  # the caller's memory holds it, verified
    ABSENT = 3  # the peer does not have it
    BUSY = 4  # the peer, or the connection to it, takes no more requests now
    FAILED = 5  # the peer has it, but could not read it
    LEAVING = 6  # the peer ends
    CORRUPT = 7  # wrong bytes came
    DISTRUSTED = 8  # its stream ended, since wrong bytes came for another page
    STALLED = 9  # nothing useful came for too long
    LATE = 10  # the deadline passed
    CANCELLED = 11
    BROKEN = 12  # the connection cannot be used


class Ended(IntEnum):
    """Why a stream ended. The values are those of the native side."""

    COMPLETE = 0  # of each page it is known what became of it
    CORRUPT = 1  # wrong bytes came
    BUSY = 2  # the connection did not take the request
    STALLED = 3
    LATE = 4
    CANCELLED = 5
    BROKEN = 6  # the connection is to be closed


@dataclass(frozen=True, slots=True)
class Stream:
    """One request to one peer.

    The maker guarantees that until the call returns nobody else uses the socket, and no other stream. After it, a
    stream that did not end COMPLETE may still be answered: send `Cancel`, and take another number next time.

    Attributes:
        socket: a DEALER, connected to the peer's agent.
        request: its number, never used before on this connection.
        pages: which of the batch, by index.
        frame: bytes of a frame.
        credit: bytes that may be on their way at once.
        stall_seconds: without anything useful, after which the stream ends.
        version: of the protocol, as the agents agreed.
        taken: counts what comes (meter.py).

    Raises:
        ValueError: more than the protocol allows.
    """

    socket: zmq.Socket[bytes]
    request: int
    pages: Sequence[int]
    frame: int
    credit: int
    stall_seconds: float
    version: int = VERSION
    taken: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if len(self.pages) > PAGES_MOST:
            raise ValueError(f"{len(self.pages)} pages, but a request takes {PAGES_MOST}")
        if not 4096 <= self.frame <= FRAME_MOST:
            raise ValueError(f"a frame has 4096 to {FRAME_MOST} bytes, not {self.frame}")
        if not 1 <= self.credit < 1 << 40:
            raise ValueError(f"credit is at least 1 and less than 2**40, not {self.credit}")

    @property
    def grant(self) -> int:
        """Bytes that each `Credit` adds: half, so that one is on its way while the other half comes."""
        return max(1, self.credit // 2)


@dataclass(frozen=True, slots=True)
class Delivered:
    """How a stream went.

    Attributes:
        bytes: of pages, whether they could be verified or not.
        ignored: messages that were of no use.
        seconds_to_first: from the request to the first frame; None: none came.
        seconds: from the request to the end of the stream.
    """

    ended: Ended
    bytes: int
    ignored: int
    seconds_to_first: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """Attributes: pages: of each page of the batch. streams: of each stream, in their order."""

    pages: list[Came]
    streams: list[Delivered]


def fetch(
    streams: Sequence[Stream],
    keys: Sequence[bytes],
    into: PageSegments,
    limits: Limits,
) -> Fetched:
    """Ask for pages, and wait until all are settled or the limits have passed.

    Args:
        streams: each with a socket of its own, and no page in two of them.
        keys, into: of all pages of the batch.

    Raises:
        ConfigError: libzmq cannot be used.
        ValueError: the counts differ, a page is named twice or is none of the batch, or has no bytes, or more than
            `PAGE_MOST`.
    """
    lengths = into.page_bytes()
    came, outcomes = _native.fetch_pages(
        libzmq(),
        [_arguments(stream, keys, lengths) for stream in streams],
        list(keys),
        into.addresses,
        into.sizes,
        into.per_page,
        limits.left(LONG_SECONDS),
        limits.cancel,
        [stream.taken for stream in streams],
    )
    return Fetched([_CAME[code] for code in came], [_delivered(*each) for each in outcomes])


def _arguments(
    stream: Stream, keys: Sequence[bytes], lengths: Sequence[int]
) -> _native.StreamArguments:
    return (
        0 if stream.socket.closed else stream.socket.underlying,
        stream.request,
        encode(_get(stream, keys, lengths)),
        encode(Credit(stream.request, stream.grant)),
        stream.credit,
        stream.grant,
        stream.frame,
        stream.stall_seconds,
        stream.pages,
    )


def _get(stream: Stream, keys: Sequence[bytes], lengths: Sequence[int]) -> Get:
    if not all(0 <= page < min(len(keys), len(lengths)) for page in stream.pages):
        raise ValueError("a stream names a page that is none of the batch")
    wanted = [lengths[page] for page in stream.pages]
    if not all(1 <= length <= PAGE_MOST for length in wanted):
        raise ValueError(f"a page has 1 to {PAGE_MOST} bytes")
    return Get(
        stream.version,
        stream.request,
        b"".join(keys[page] for page in stream.pages),
        wanted,
        stream.frame,
        stream.credit,
    )


def _delivered(
    ended: int, size: int, ignored: int, seconds_to_first: float, seconds: float
) -> Delivered:
    first = None if seconds_to_first < 0 else seconds_to_first
    return Delivered(Ended(ended), size, ignored, first, seconds)


_CAME = {came.value: came for came in Came}
