"""What nodes say to each other: the protocol, version 1.

A node's *agent* answers on one ROUTER socket. Whoever wants something of it connects a DEALER: agents of other
nodes one each (the *control link*), and engine processes of other nodes as many as they read through (*data
links*). A message is one ZeroMQ message of one frame, a struct below as a MessagePack array that begins with its
number; `Page` has a second frame, the bytes. Nothing is ever sent that a receiver did not ask for, so what it
may be sent is bounded by what it asked.

Agreeing. The first message on a control link is `Hello`, from whoever connected; the answer is a `Hello`, or
`Refused`. Each names the oldest and newest version that it speaks, and both go on in the newest that they have in
common. A kind that a node does not know, a field too many at a message's end and a message that does not decode
are passed over, so that newer nodes may say more. A `Hello` names the *epoch* of its sender, a random number that
changes with every start and every clearing of its store: nothing that was learnt in one epoch is believed in another.

What a node has. `Subscribe` asks for the summary: the tags of the pages that the node shares, as sorted 8-byte
numbers (tags.py). It comes whole, in numbered parts, or, when the epoch and sequence that the subscriber names are
still known, as what was added and removed since. The subscriber answers each `Summary` with `Heard`, and no more
than `UNHEARD` are ever on their way. A summary that does not continue where the last one ended (another epoch, a gap
in the sequence or in the parts) is not used, and asked for anew, on a new link.

Signs of life. `Ping` is answered by `Pong`, with how many bytes wait to be sent, and the epoch and sequence of the
sender; a `Hello` in answer to anything else says that the sender knows this link no more. No clock is compared with another
node's. `Nodes` tells of the nodes one knows, in answer to `Hello` and when they change; a receiver connects only to
those whose keys it allows. `Goodbye` says that the node leaves: it is taken for gone at once, and nobody waits for it.

Pages. On a data link, `Get` asks for pages by key and length. They come as `Page` frames of `Get.frame` bytes, the last one
of a page shorter, in any order, though in that of the offsets they cost the receiver least; each with the checksum of the
whole page as it was put, which is XXH3-64 of its bytes, seeded with that of the page's key. The receiver verifies pages, and
tells by `Doubt` of those that are not what was put: the server, which may not have looked at them, does so then. `Without` says of pages that they do not come, and why. The server sends no more bytes than
the receiver has given credit for, by `Get.credit` and then `Credit`; but always a page to its end. `Cancel` ends a request; frames
that are under way still come, and carry a number that nobody waits for any more. `Expect` tells which pages will
probably be asked for next, so that a disk is read meanwhile.

Sizes. Every field is bounded below, and a frame that is larger than `FRAME_MOST` closes the connection before memory
is taken for it (ZMQ_MAXMSGSIZE). https://rfc.zeromq.org/spec/23/ (ZMTP), /spec/26/ (CurveZMQ)
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, TypeAlias, Union

import msgspec
from msgspec import Meta

from ..base import KEY_BYTES
from .tags import TAG_BYTES as TAG_BYTES  # noqa: PLC0414  # callers take it from here

VERSION = 1  # the newest that this package speaks
OLDEST = 1  # that it still speaks

FRAME_MOST = 8 << 20  # bytes of a page in one message
MESSAGE_MOST = FRAME_MOST + 4096
PAGES_MOST = 1024  # of one `Get`
TAGS_MOST = 65_536  # of one `Summary`
UNHEARD = 4  # summaries on their way to one subscriber
NODES_MOST = 64
NAMESPACES_MOST = 256  # of one `Hello`
PAGE_MOST = 1 << 30  # bytes

Number = Annotated[int, Meta(ge=0)]  # MessagePack has none beyond 64 bits
Small = Annotated[int, Meta(ge=0, lt=1 << 32)]
Version = Annotated[int, Meta(ge=0, lt=1 << 16)]
Epoch = Annotated[int, Meta(ge=1)]
# `\Z`, as `$` lets a line end through, and names and addresses come into logs.
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+\Z")]
Address = Annotated[str, Meta(max_length=256, pattern=r"^[!-~]*\Z")]
PublicKey = Annotated[str, Meta(max_length=40, pattern=r"^([!-~]{40})?\Z")]  # Z85; or no encryption
Words = Annotated[str, Meta(max_length=256)]
Tags = Annotated[bytes, Meta(max_length=TAGS_MOST * TAG_BYTES)]
Keys = Annotated[bytes, Meta(max_length=PAGES_MOST * KEY_BYTES)]


class Kind(IntEnum):
    """A message's number: the first element of its array."""

    HELLO = 1
    REFUSED = 2
    SUBSCRIBE = 3
    SUMMARY = 4
    HEARD = 5
    PING = 6
    PONG = 7
    NODES = 8
    GOODBYE = 9
    GET = 16
    PAGE = 17
    WITHOUT = 18
    CREDIT = 19
    CANCEL = 20
    EXPECT = 21
    DOUBT = 22


class Why(IntEnum):
    """Why pages do not come."""

    ABSENT = 0  # not here, not shared, or of another length
    BUSY = 1  # too much is asked for already; another time
    FAILED = 2  # here, but not read
    LEAVING = 3  # the node ends


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Fields that a later version adds come last, with a default."""


class Hello(_Message, frozen=True, tag=Kind.HELLO.value):
    """Who speaks, and what it can.

    Attributes:
        oldest, newest: versions of the protocol.
        node: its name.
        epoch: of what it has; see above.
        address: where it answers, as it wants others to be told; empty: nowhere.
        namespaces: that it shares, by digest; empty: it does not say.
        can: capabilities, by name. None are defined yet.
    """

    oldest: Version
    newest: Version
    node: Name
    epoch: Epoch
    address: Address = ""
    namespaces: Annotated[
        list[Annotated[bytes, Meta(min_length=16, max_length=16)]], Meta(max_length=NAMESPACES_MOST)
    ] = []
    can: Annotated[list[Annotated[str, Meta(max_length=32)]], Meta(max_length=32)] = []


class Refused(_Message, frozen=True, tag=Kind.REFUSED.value):
    """The link is of no use, and why: no common version, or no room for more links."""

    why: Words


class Subscribe(_Message, frozen=True, tag=Kind.SUBSCRIBE.value):
    """From where on the summary is wanted. 0 and 0: all of it."""

    epoch: Number
    sequence: Number


class Summary(_Message, frozen=True, tag=Kind.SUMMARY.value):
    """A piece of what the sender has.

    Attributes:
        sequence: of the state that is reached with this piece, or with the last part of it.
        part: 0: what changed since `sequence - 1`; else the number of the part of the whole, from 1 on.
        more: whether another part of the whole follows.
        added, removed: tags, sorted. Of a whole nothing is removed.
        newest: sequence that the sender is at; until it is reached, what was removed since is not known of.
    """

    epoch: Number
    sequence: Number
    part: Small
    more: bool
    added: Tags
    removed: Tags
    newest: Number


class Heard(_Message, frozen=True, tag=Kind.HEARD.value):
    """The answer to the `Summary` of the same numbers."""

    epoch: Number
    sequence: Number
    part: Small


class Ping(_Message, frozen=True, tag=Kind.PING.value):
    number: Number


class Pong(_Message, frozen=True, tag=Kind.PONG.value):
    """Attributes: load: bytes that wait to be sent. sequence: of what it has; who stays behind it asks anew."""

    number: Number
    epoch: Number
    load: Number
    sequence: Number = 0


class NodeRecord(msgspec.Struct, frozen=True, array_like=True):
    """A node as others are told of it."""

    node: Name
    address: Address
    key: PublicKey


class Nodes(_Message, frozen=True, tag=Kind.NODES.value):
    nodes: Annotated[list[NodeRecord], Meta(max_length=NODES_MOST)]


class Goodbye(_Message, frozen=True, tag=Kind.GOODBYE.value):
    pass


class Get(_Message, frozen=True, tag=Kind.GET.value):
    """Pages, please.

    Attributes:
        version: of the protocol, as the agents agreed.
        request: the asker's number for it, never used twice on one link.
        keys: one after the other.
        lengths: bytes of each page.
        frame: bytes of a frame.
        credit: bytes that may be sent before more credit comes.
    """

    version: Version
    request: Number
    keys: Keys
    lengths: Annotated[list[Annotated[int, Meta(ge=1, le=PAGE_MOST)]], Meta(max_length=PAGES_MOST)]
    frame: Annotated[int, Meta(ge=4096, le=FRAME_MOST)]
    credit: Annotated[int, Meta(ge=1, lt=1 << 40)]


class Page(_Message, frozen=True, tag=Kind.PAGE.value):
    """A piece of a page; its bytes are the message's second frame.

    Attributes:
        page: its place in the `Get`.
        offset: of the bytes in the page; a multiple of `Get.frame`.
        checksum: of the whole page; see above.
    """

    request: Number
    page: Small
    offset: Number
    checksum: Number


class Without(_Message, frozen=True, tag=Kind.WITHOUT.value):
    """Some pages of a request do not come.

    Attributes:
        page: place of the first of them in the `Get`.
        count: how many.
    """

    request: Number
    page: Small
    count: Small
    why: Annotated[int, Meta(ge=0, le=255)]


class Credit(_Message, frozen=True, tag=Kind.CREDIT.value):
    """So many more bytes may be sent."""

    request: Number
    bytes: Annotated[int, Meta(ge=1, lt=1 << 40)]


class Cancel(_Message, frozen=True, tag=Kind.CANCEL.value):
    request: Number


class Expect(_Message, frozen=True, tag=Kind.EXPECT.value):
    """Pages that will probably be asked for: a run of a chain. Attributes: length: bytes of each page."""

    version: Version
    keys: Keys
    length: Annotated[int, Meta(ge=1, le=PAGE_MOST)]


class Doubt(_Message, frozen=True, tag=Kind.DOUBT.value):
    """Pages that came, and whose bytes their checksums do not fit. Attributes: as those of `Get`."""

    version: Version
    keys: Keys
    lengths: Annotated[list[Annotated[int, Meta(ge=1, le=PAGE_MOST)]], Meta(max_length=PAGES_MOST)]


Message: TypeAlias = Union[  # noqa: UP007  # msgspec reads it at run time
    Hello,
    Refused,
    Subscribe,
    Summary,
    Heard,
    Ping,
    Pong,
    Nodes,
    Goodbye,
    Get,
    Page,
    Without,
    Credit,
    Cancel,
    Expect,
    Doubt,
]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class NotUnderstoodError(ValueError):
    """A message of an unknown kind, or none at all. It is passed over."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes | memoryview) -> Message:
    """Raises: NotUnderstoodError."""
    try:
        message: Message = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotUnderstoodError(str(error)) from error
    return message


def version_of(hello: Hello) -> int:
    """The newest version that both speak; 0: there is none."""
    newest = min(hello.newest, VERSION)
    return newest if newest >= max(hello.oldest, OLDEST) else 0


def split_keys(keys: bytes) -> list[bytes]:
    """The keys of a `Get`, `Expect` or `Doubt`. Raises: NotUnderstoodError: a piece of one is left over."""
    if len(keys) % KEY_BYTES:
        raise NotUnderstoodError(f"{len(keys)} bytes are no keys")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
