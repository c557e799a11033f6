"""What may be said, and that nothing else is understood."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.storage.base import KEY_BYTES
from lmcache_sglang.storage.peers import messages
from lmcache_sglang.storage.peers.messages import (
    FRAME_MOST,
    NODES_MOST,
    OLDEST,
    PAGE_MOST,
    PAGES_MOST,
    TAG_BYTES,
    TAGS_MOST,
    VERSION,
    Credit,
    Get,
    Heard,
    Hello,
    Kind,
    Message,
    NodeRecord,
    Nodes,
    NotUnderstoodError,
    Refused,
    Summary,
    Without,
    decode,
    encode,
    split_keys,
    version_of,
)
from tests.storage.peers.any_message import anything

KEY = "k" * 40


def understands(body: bytes) -> bool:
    try:
        decode(body)
    except NotUnderstoodError:
        return False
    return True


@settings(deadline=None)
@given(anything)
def test_what_is_said_is_understood(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(deadline=None)
@given(anything)
def test_a_newer_version_may_say_more(message: Message) -> None:
    fields = msgspec.msgpack.decode(encode(message))
    assert decode(msgspec.msgpack.encode([*fields, {"more": [1, 2]}, None])) == message


def test_every_kind_has_its_number() -> None:
    kinds = {cls.__struct_config__.tag for cls in messages._Message.__subclasses__()}
    assert kinds == {kind.value for kind in Kind}


@pytest.mark.parametrize("number", sorted(set(range(32)) - {kind.value for kind in Kind}))
def test_a_kind_that_there_is_not_is_not_understood(number: int) -> None:
    assert not understands(msgspec.msgpack.encode([number, 1, 2, 3]))


HELLO = Hello(1, 1, "a", 1)
GET = Get(1, 1, b"", [], 4096, 1)


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        (Hello(1, 65535, "a", 1), Hello(1, 65536, "a", 1)),
        (Hello(1, 1, "a" * 64, 1), Hello(1, 1, "a" * 65, 1)),
        (HELLO, Hello(1, 1, "", 1)),
        (HELLO, Hello(1, 1, "a\n", 1)),
        (HELLO, Hello(1, 1, "a b", 1)),
        (HELLO, Hello(1, 1, "a", 0)),
        (HELLO, Hello(1, 1, "a", -1)),
        (Hello(1, 1, "a", 1, "x" * 256), Hello(1, 1, "a", 1, "x" * 257)),
        (HELLO, Hello(1, 1, "a", 1, "tcp://a:1\n")),
        (HELLO, Hello(1, 1, "a", 1, "tcp://\x1b[2J:1")),
        (Hello(1, 1, "a", 1, "", [b"x" * 16] * 256), Hello(1, 1, "a", 1, "", [b"x" * 16] * 257)),
        (HELLO, Hello(1, 1, "a", 1, "", [b"x" * 15])),
        (Hello(1, 1, "a", 1, "", [], ["x" * 32] * 32), Hello(1, 1, "a", 1, "", [], ["x"] * 33)),
        (HELLO, Hello(1, 1, "a", 1, "", [], ["x" * 33])),
        (Refused("x" * 256), Refused("x" * 257)),
        (Heard(1, 1, (1 << 32) - 1), Heard(1, 1, 1 << 32)),
        (
            Summary(1, 1, 1, False, b"x" * TAGS_MOST * TAG_BYTES, b"", 1),
            Summary(1, 1, 1, False, b"x" * (TAGS_MOST * TAG_BYTES + 1), b"", 1),
        ),
        (
            Nodes([NodeRecord("a", "", KEY)] * NODES_MOST),
            Nodes([NodeRecord("a", "", KEY)] * (NODES_MOST + 1)),
        ),
        (Nodes([NodeRecord("a", "", "")]), Nodes([NodeRecord("a", "", KEY[1:])])),
        (Nodes([]), Nodes([NodeRecord("a", "", KEY + "k")])),
        (Nodes([]), Nodes([NodeRecord("a", "", KEY[1:] + "\n")])),
        (
            Get(1, 1, b"x" * PAGES_MOST * KEY_BYTES, [PAGE_MOST] * PAGES_MOST, FRAME_MOST, 1),
            Get(1, 1, b"x" * (PAGES_MOST * KEY_BYTES + 1), [], FRAME_MOST, 1),
        ),
        (GET, Get(1, 1, b"", [1] * (PAGES_MOST + 1), 4096, 1)),
        (GET, Get(1, 1, b"", [PAGE_MOST + 1], 4096, 1)),
        (GET, Get(1, 1, b"", [0], 4096, 1)),
        (GET, Get(1, 1, b"", [], FRAME_MOST + 1, 1)),
        (GET, Get(1, 1, b"", [], 4095, 1)),
        (GET, Get(1, 1, b"", [], 4096, 0)),
        (Credit(1, (1 << 40) - 1), Credit(1, 1 << 40)),
        (Without(1, 1, 1, 255), Without(1, 1, 1, 256)),
    ],
)
def test_every_field_has_its_bounds(within: Message, beyond: Message) -> None:
    assert decode(encode(within)) == within
    assert not understands(encode(beyond))


@given(st.binary(max_size=200))
def test_noise_is_not_understood_or_is_a_message(body: bytes) -> None:
    try:
        message = decode(body)
    except NotUnderstoodError:
        return
    assert decode(encode(message)) == message


@settings(deadline=None)
@given(anything, st.data())
def test_a_damaged_message_raises_nothing_else(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    understands(bytes(body))
    understands(bytes(body[:cut]))


LONG = b"\xdd\x7f\xff\xff\xff"  # an array of two thousand million
PROMISES = [
    LONG,
    b"\xdf\x7f\xff\xff\xff",
    b"\x92\x08" + LONG,
    b"\x92\x08\xdd\x00\x00\x00\x40",
    b"\x92\x08\x91" + LONG,
    b"\x97\x01\x01\x01\xa1a\x05\xa0" + LONG,
    b"\x97\x10\x01\x01\xc4\x00" + LONG,
    b"\x92\x02\xdb\x7f\xff\xff\xff",
    b"\x98\x04\x01\x01\x01\xc2\xc6\x7f\xff\xff\xff",
    b"\x92\x09" + LONG,  # where nothing is expected
    b"\x92\x09\xdf\x7f\xff\xff\xff",
    b"\x92\x09\xc9\x7f\xff\xff\xff\x01",
    b"\x92\x09" + b"\x91" * 1_000_000,
]


@pytest.mark.parametrize("body", PROMISES, ids=range(len(PROMISES)))
def test_a_promise_of_much_takes_no_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        assert not understands(body)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("oldest", "newest", "agreed"),
    [
        (OLDEST, VERSION, VERSION),
        (OLDEST, VERSION + 5, VERSION),
        (VERSION + 1, VERSION + 5, 0),
        (0, OLDEST - 1, 0),
        (VERSION, OLDEST - 1, 0),
    ],
)
def test_both_go_on_in_the_newest_version_they_share(oldest: int, newest: int, agreed: int) -> None:
    assert version_of(Hello(oldest, newest, "a", 1)) == agreed


def test_keys_are_cut_out_of_what_comes() -> None:
    assert split_keys(b"a" * KEY_BYTES + b"b" * KEY_BYTES) == [b"a" * KEY_BYTES, b"b" * KEY_BYTES]
    with pytest.raises(NotUnderstoodError):
        split_keys(b"a" * (KEY_BYTES + 1))
