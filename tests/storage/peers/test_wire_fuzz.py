"""Whatever bytes come as frames: nothing beside the pages is written, and a hit is the page.

The frames go to what receives them from sockets (csrc/frame_acceptor.hpp), without a socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.storage._native import FrameAcceptor
from lmcache_sglang.storage.peers.fetch import Came
from lmcache_sglang.storage.peers.messages import (
    Cancel,
    Credit,
    Doubt,
    Expect,
    Get,
    Goodbye,
    Heard,
    Hello,
    Kind,
    Nodes,
    NotUnderstoodError,
    Page,
    Ping,
    Pong,
    Refused,
    Subscribe,
    Summary,
    Without,
    decode,
    encode,
)
from lmcache_sglang.testing.tier_suite import EngineMemory, bytes_of, some_keys
from tests.storage.peers.scripted_peer import checksum

TOTAL = 1_000_000  # frames, of all seeds together
SEEDS = 10
RUN = 60  # frames to one acceptor

REQUEST = 300
FRAME = 16
SIZES = [40, 1, 16, 33]  # of pages
KEYS = some_keys(len(SIZES))
CONTENTS = [bytes_of(key, size) for key, size in zip(KEYS, SIZES, strict=True)]
WAITING = 1  # the native side's code of a page that is not settled

Parts = Sequence[bytes]


class Verdict(IntEnum):
    """What was made of a message. The values are those of the native side."""

    TAKEN = 0
    COMPLETED = 1
    WITHOUT = 2
    CORRUPT = 3
    NOT_UNDERSTOOD = 4
    FOREIGN = 5
    MISPLACED = 6
    WRONG_LENGTH = 7
    REPEATED = 8
    SETTLED = 9


class Receiver:
    """An acceptor of all pages, and its memory."""

    def __init__(self) -> None:
        self.memory = EngineMemory.blank(SIZES, per_page=3)
        at = self.memory.segments
        self.acceptor = FrameAcceptor(REQUEST, KEYS, at.addresses, at.sizes, at.per_page, FRAME)

    def accept(self, parts: Parts) -> Verdict:
        return Verdict(self.acceptor.accept(*parts))

    def check(self) -> list[int]:
        """What became of the pages, once it is held against their memory."""
        assert self.memory.guards_hold()
        codes = list(self.acceptor.came())
        for page, code in enumerate(codes):
            if code == Came.HIT:
                assert self.memory.page(page) == CONTENTS[page]
            else:
                assert code == WAITING or Came(code) is not Came.UNASKED
        return codes


def piece(page: int, offset: int) -> bytes:
    return CONTENTS[page][offset : offset + FRAME]


def honest() -> list[Parts]:
    return [
        [
            encode(Page(REQUEST, page, at, checksum(KEYS[page], CONTENTS[page]))),
            piece(page, at),
        ]
        for page in range(len(SIZES))
        for at in range(0, SIZES[page], FRAME)
    ]


HONEST = honest()
OTHERS = [
    encode(message)
    for message in (
        Hello(1, 1, "a", 2**64 - 1, "tcp://a:1", [b"n" * 16], ["x"]),
        Refused("no"),
        Subscribe(1, 2),
        Summary(1, 2, 3, True, b"t" * 16, b"", 2),
        Heard(1, 2, 3),
        Ping(1),
        Pong(1, 2, 3),
        Nodes([]),
        Goodbye(),
        Get(1, REQUEST, KEYS[0], [40], 4096, 1),
        Without(REQUEST, 2, 1, 0),
        Without(REQUEST, 3, 1, 255),
        Credit(REQUEST, 1 << 39),
        Cancel(REQUEST),
        Expect(1, KEYS[1], 4096),
        Doubt(1, KEYS[1], [4096]),
    )
]
ODD = [
    *(0, 1, 2, 15, 16, 17, 32, 40, 48, 127, 128, 255, 256, 300, 65535, 65536),
    *(2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 16, 2**64 - 1),
]
_INTERESTING = bytes([0x00, 0x7F, 0x80, 0x90, 0x95, 0x96, 0x9F, 0xC0, 0xC4, 0xC6, 0xCC, 0xCD, 0xCE])
INTERESTING = _INTERESTING + bytes(
    [0xCF, 0xD0, 0xD3, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xE0, 0xFF]
)


class Mutator:
    """Honest messages, and what is made of them."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._ways = [self._spoil, self._cut, self._grow, self._number, self._bytes, self._other]

    def frame(self) -> Parts:
        random = self._random
        parts = HONEST[int(random.random() * len(HONEST))]
        if random.random() < 0.3:
            return parts
        return self._ways[int(random.random() * len(self._ways))](*parts)

    def _spoil(self, body: bytes, payload: bytes) -> Parts:
        spoilt = bytearray(body)
        for _ in range(1 + int(self._random.random() * 3)):
            spoilt[int(self._random.random() * len(body))] = self._byte()
        return [bytes(spoilt), payload]

    def _byte(self) -> int:
        if self._random.random() < 0.5:
            return int(self._random.random() * 256)
        return INTERESTING[int(self._random.random() * len(INTERESTING))]

    def _cut(self, body: bytes, payload: bytes) -> Parts:
        return [body[: int(self._random.random() * len(body))], payload]

    def _grow(self, body: bytes, payload: bytes) -> Parts:
        more = self._random.randbytes(1 + int(self._random.random() * 9))
        return [bytes([self._byte()]) + body[1:] + more, payload]

    def _number(self, body: bytes, payload: bytes) -> Parts:
        """One field is another, and whole: it is understood."""
        numbers = msgspec.msgpack.decode(body)
        numbers[int(self._random.random() * 5)] = ODD[int(self._random.random() * len(ODD))]
        parts = [msgspec.msgpack.encode(numbers), payload]
        return parts[: 1 + int(self._random.random() * 2)]

    def _bytes(self, body: bytes, payload: bytes) -> Parts:
        length = int(self._random.random() * 48)
        return [body, self._random.randbytes(length) if length else b""]

    def _other(self, body: bytes, payload: bytes) -> Parts:
        body = OTHERS[int(self._random.random() * len(OTHERS))]
        return [body] if self._random.random() < 0.5 else self._spoil(body, payload)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_mutated_frames(seed: int) -> None:
    mutator = Mutator(seed)
    verdicts, outcomes = set[Verdict](), set[int]()
    for _ in range(TOTAL // SEEDS // RUN + 1):
        receiver = Receiver()
        for _ in range(RUN):
            parts = mutator.frame()
            verdict = receiver.accept(parts)
            verdicts.add(verdict)
            _decode_as_well(parts[0], verdict)
        outcomes.update(receiver.check())
    assert verdicts == set(Verdict)
    assert outcomes >= {Came.HIT, Came.ABSENT, Came.FAILED, Came.CORRUPT}


def _decode_as_well(body: bytes, verdict: Verdict) -> None:
    """The two decoders agree of messages of this version."""
    try:
        message = decode(body)
    except NotUnderstoodError:
        assert verdict is Verdict.NOT_UNDERSTOOD or _is_beyond(body)
    else:
        assert verdict in _fitting(message)


def _fitting(message: object) -> set[Verdict]:
    if isinstance(message, Page | Without):
        return set(Verdict)  # a `Page` of one part is not understood
    return {Verdict.NOT_UNDERSTOOD}


def _is_beyond(body: bytes) -> bool:
    """Of a later version, or with numbers that are too large; no such page is taken."""
    return body[0] != 0x90 | 5 or any(number > 255 for number in msgspec.msgpack.decode(body))


def test_honest_frames_in_any_order() -> None:
    random = Random(1)
    for _ in range(100):
        receiver = Receiver()
        verdicts = [receiver.accept(parts) for parts in random.sample(HONEST, len(HONEST))]
        assert receiver.check() == [Came.HIT] * len(KEYS)
        assert verdicts.count(Verdict.COMPLETED) == len(KEYS)


class Model:
    """What the acceptor shall say of a `Page`, in other words."""

    def __init__(self) -> None:
        self._lacking = [set(range(0, size, FRAME)) for size in SIZES]
        self._settled = [False] * len(SIZES)
        self._came: list[dict[int, bytes]] = [{} for _ in SIZES]
        self._checksums: list[set[int]] = [set() for _ in SIZES]

    def verdict(self, message: Page, payload: bytes) -> Verdict:
        page, at = message.page, message.offset
        if message.request != REQUEST:
            return Verdict.FOREIGN
        if page >= len(SIZES) or at not in range(0, SIZES[page], FRAME):
            return Verdict.MISPLACED
        if len(payload) != len(piece(page, at)):
            return Verdict.WRONG_LENGTH
        if self._settled[page]:
            return Verdict.SETTLED
        if at not in self._lacking[page]:
            return Verdict.REPEATED
        self._lacking[page].remove(at)
        self._came[page][at] = payload
        self._checksums[page].add(message.checksum)
        if len(self._checksums[page]) == 1 and self._lacking[page]:
            return Verdict.TAKEN
        self._settled[page] = True
        came = b"".join(self._came[page][at] for at in sorted(self._came[page]))
        is_right = self._checksums[page] == {checksum(KEYS[page], came)}
        return Verdict.COMPLETED if is_right else Verdict.CORRUPT


odd = st.sampled_from(ODD)
strange_pages = st.tuples(
    st.builds(
        Page,
        st.just(REQUEST) | odd,
        st.integers(0, len(SIZES)) | odd.filter(lambda number: number < 2**32),
        st.sampled_from([0, FRAME, 2 * FRAME]) | odd,
        st.integers(0, 2**64 - 1),
    ),
    st.binary(max_size=3 * FRAME),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(HONEST) | strange_pages.map(lambda p: [encode(p[0]), p[1]])))
def test_each_frame_is_judged_as_the_model_does(given_frames: list[Parts]) -> None:
    receiver, model = Receiver(), Model()
    for body, payload in given_frames:
        message = decode(body)
        assert isinstance(message, Page)
        assert receiver.accept([body, payload]) is model.verdict(message, payload)
    receiver.check()


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=64), st.none() | st.binary(max_size=40))
def test_arbitrary_bytes(body: bytes, payload: bytes | None) -> None:
    receiver = Receiver()
    assert receiver.acceptor.accept(body, payload) not in (Verdict.TAKEN, Verdict.COMPLETED)
    receiver.check()


def _widths(number: int) -> Iterator[bytes]:
    """All ways to write it."""
    if number < 0x80:
        yield bytes([number])
    for code, width in ((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8)):
        if number < 1 << 8 * width:
            yield bytes([code]) + number.to_bytes(width, "big")


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(HONEST))
def test_numbers_may_be_written_in_any_width(data: st.DataObject, parts: Parts) -> None:
    numbers = msgspec.msgpack.decode(parts[0])
    array = data.draw(st.sampled_from([b"\x95", b"\xdc\0\5", b"\xdd\0\0\0\5"]))
    body = array + b"".join(data.draw(st.sampled_from(list(_widths(each)))) for each in numbers)
    assert decode(body) == decode(parts[0])
    assert Receiver().accept([body, parts[1]]) in (Verdict.TAKEN, Verdict.COMPLETED)


def test_an_array_that_ends_early_is_none() -> None:
    body, payload = HONEST[0]
    assert body[1] == Kind.PAGE
    for end in range(len(body)):
        assert Receiver().accept([body[:end], payload]) is Verdict.NOT_UNDERSTOOD
