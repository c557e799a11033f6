"""Pages from peers that are honest, and from such as are not: only right bytes, only where they belong, in time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread

import pytest
import zmq

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import Cancel, Limits
from lmcache_sglang.storage.peers import libzmq as libzmq_module
from lmcache_sglang.storage.peers.fetch import Came, Delivered, Ended, Fetched, Stream, fetch
from lmcache_sglang.storage.peers.messages import Credit, Get, Pong, Why, Without, encode
from lmcache_sglang.testing.guarded_memory import guarded
from lmcache_sglang.testing.tier_suite import EngineMemory, bytes_of, some_keys
from tests.storage.peers.scripted_peer import (
    FRAME,
    SOON,
    Conversation,
    Parts,
    Peer,
    checksum,
    frame,
    frames,
    peer,
)

SIZES = [3 * FRAME, 3 * FRAME + 1, 1, FRAME - 1, 2 * FRAME]  # of pages
KEYS = some_keys(len(SIZES))
CONTENTS = [bytes_of(key, size) for key, size in zip(KEYS, SIZES, strict=True)]
ALL = range(len(KEYS))
TIME = 0.2  # seconds that are to pass

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


class Fetching:
    """A batch of all pages, and engine memory for it."""

    def __init__(self, per_page: int = 1) -> None:
        self.memory = EngineMemory.blank(SIZES, per_page)

    def run(self, streams: Sequence[Stream], limits: Limits | None = None) -> Fetched:
        """`fetch`, checked: a hit is the page of that key, and all memory around is as it was."""
        limits = limits or Limits.within(SOON)
        fetched = fetch(streams, KEYS, self.memory.segments, limits)
        for i, came in enumerate(fetched.pages):
            if came is Came.HIT:
                assert self.memory.page(i) == CONTENTS[i]
        assert self.memory.guards_hold()
        return fetched


def stream(
    socket: zmq.Socket[bytes],
    pages: Sequence[int] = ALL,
    *,
    credit: int = 1 << 30,
    stall: float = SOON,
) -> Stream:
    return Stream(socket, 7, pages, FRAME, credit, stall)


def fetch_from(
    context: Context,
    script: Callable[[Conversation], None],
    *,
    stall: float = SOON,
    limits: Limits | None = None,
) -> tuple[list[Came], Delivered]:
    with peer(context, script) as one, one.connected() as socket:
        fetched = Fetching().run([stream(socket, stall=stall)], limits)
    (delivered,) = fetched.streams
    return fetched.pages, delivered


def honest(conversation: Conversation) -> None:
    get = conversation.hear_get()
    conversation.say(frames(get, CONTENTS))


@pytest.mark.parametrize("per_page", [1, 3])
@pytest.mark.parametrize("transport", ["inproc", "ipc", "tcp"])
def test_an_honest_peer_delivers_all(
    context: Context, tmp_path: Path, transport: str, per_page: int
) -> None:
    address = {"inproc": "inproc://peer", "ipc": f"ipc://{tmp_path}/p", "tcp": "tcp://127.0.0.1:*"}
    with peer(context, honest, address[transport]) as one, one.connected() as socket:
        fetched = Fetching(per_page).run([stream(socket)])
    assert fetched.pages == [Came.HIT] * len(KEYS)
    (delivered,) = fetched.streams
    assert (delivered.ended, delivered.bytes, delivered.ignored) == (
        Ended.COMPLETE,
        sum(SIZES),
        0,
    )
    assert delivered.seconds_to_first is not None
    assert 0 < delivered.seconds_to_first <= delivered.seconds


def test_frames_may_come_in_any_order(context: Context) -> None:
    def script(conversation: Conversation) -> None:
        all_frames = frames(conversation.hear_get(), CONTENTS)
        random.Random(1).shuffle(all_frames)
        conversation.say(all_frames)

    pages, delivered = fetch_from(context, script)
    assert pages == [Came.HIT] * len(KEYS)
    assert delivered.ignored == 0


def _useless(get: Get) -> list[Parts]:
    """Messages that must change nothing, each wrong in one way. Their bytes are not those of the pages."""
    wrong, lie = bytes(FRAME), 0
    body, _ = frame(get.request, 0, 0, wrong, lie)
    return [
        frame(get.request + 1, 0, 0, wrong, lie),  # of another request
        frame(get.request, len(KEYS), 0, wrong, lie),  # no such page
        frame(get.request, 2**32 - 1, 0, wrong, lie),
        frame(get.request, 0, 1, wrong, lie),  # overlaps
        frame(get.request, 0, FRAME // 2, wrong, lie),
        frame(get.request, 0, 3 * FRAME, wrong, lie),  # at the page's end
        frame(get.request, 0, 2**63, wrong, lie),  # far beyond it
        frame(get.request, 0, 2**64 - FRAME, wrong, lie),
        frame(get.request, 0, 0, wrong + b"\0", lie),  # oversized
        frame(get.request, 0, 0, bytes(SIZES[0]), lie),
        frame(get.request, 0, 0, wrong[:-1], lie),  # truncated
        frame(get.request, 0, 0, b"", lie),
        frame(get.request, 1, 3 * FRAME, wrong, lie),  # longer than the page's last frame
        [body],  # one part
        [body, wrong, wrong],  # three
        [body, wrong, b"", wrong],
        [b"", b""],
        [b"\xc1", wrong],
        [wrong],
        [body[:-1], wrong],
        [body + b"\0", wrong],
        [encode(Pong(get.request, 1, 2)), wrong],  # of no use here
        [encode(Pong(get.request, 1, 2))],
        [encode(Without(get.request, 0, len(KEYS), Why.ABSENT)), wrong],
        [encode(Without(get.request + 1, 0, len(KEYS), Why.ABSENT))],
        [encode(Without(get.request, 0, len(KEYS) + 1, Why.ABSENT))],
        [encode(Without(get.request, 1, 2**32 - 1, Why.ABSENT))],
        [encode(Without(get.request, len(KEYS), 1, Why.ABSENT))],
        [encode(Without(get.request, 0, 0, Why.ABSENT))],
    ]


def test_useless_messages_are_passed_over(context: Context) -> None:
    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        sent.extend(_useless(get))
        conversation.say(sent)
        conversation.say(frames(get, CONTENTS))

    sent: list[Parts] = []
    pages, delivered = fetch_from(context, script)
    assert pages == [Came.HIT] * len(KEYS)
    assert delivered.ignored == len(sent)


def test_a_frame_that_came_is_not_written_again(context: Context) -> None:
    """Whether its page is whole by then or not."""

    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        for each in frames(get, CONTENTS)[:-1]:
            conversation.say([each, [each[0], bytes(len(each[1]))], each])
        conversation.say(frames(get, CONTENTS)[-1:])

    pages, delivered = fetch_from(context, script)
    assert pages == [Came.HIT] * len(KEYS)
    assert delivered.ignored == 2 * (sum(-(-size // FRAME) for size in SIZES) - 1)


def test_a_newer_version_may_say_more(context: Context) -> None:
    def longer(parts: Parts) -> Parts:
        body = bytes([parts[0][0] + 1]) + parts[0][1:] + b"\xa3new"
        return [body, *parts[1:]]

    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        conversation.say([longer([encode(Without(get.request, 0, 1, Why.ABSENT))])])
        conversation.say([longer(each) for each in frames(get, CONTENTS)])

    pages, _ = fetch_from(context, script)
    assert pages == [Came.ABSENT] + [Came.HIT] * (len(KEYS) - 1)


def test_wrong_bytes_end_the_stream(context: Context) -> None:
    """What came before stays; the rest may be asked of another peer."""

    def script(conversation: Conversation) -> None:
        all_frames = frames(conversation.hear_get(), CONTENTS)
        body, piece = all_frames[5]  # of page 1
        all_frames[5] = [body, bytes([piece[0] ^ 1]) + piece[1:]]
        conversation.say(all_frames)

    pages, delivered = fetch_from(context, script)
    assert pages == [Came.HIT, Came.CORRUPT] + [Came.DISTRUSTED] * 3
    assert delivered.ended is Ended.CORRUPT


def swapped(get: Get) -> list[Parts]:
    (first, one), (second, two), *rest = frames(get, CONTENTS)
    return [[first, two], [second, one], *rest]


def of_another_frame(get: Get) -> list[Parts]:
    told = frames(get, CONTENTS)
    return [[body, told[0][1]] for body, _ in told]


def of_another_key(get: Get) -> list[Parts]:
    wrong = checksum(KEYS[1], CONTENTS[0])
    return [
        frame(get.request, 0, at, CONTENTS[0][at : at + FRAME], wrong)
        for at in range(0, SIZES[0], FRAME)
    ]


def of_two_checksums(get: Get) -> list[Parts]:
    first, (_, piece), last = frames(get, CONTENTS)[:3]
    return [first, frame(get.request, 0, FRAME, piece, 1), last]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("lie", [swapped, of_another_frame, of_another_key, of_two_checksums])
def test_right_bytes_must_be_in_their_place(
    context: Context, lie: Callable[[Get], list[Parts]], backwards: bool
) -> None:
    """Whether they are hashed as they are copied, or where they lie."""

    def script(conversation: Conversation) -> None:
        told = lie(conversation.hear_get())[:3]
        conversation.say(reversed(told) if backwards else told)

    pages, delivered = fetch_from(context, script)
    assert pages == [Came.CORRUPT] + [Came.DISTRUSTED] * 4
    assert delivered.ended is Ended.CORRUPT


def test_pages_may_come_interleaved(context: Context) -> None:
    """Only one is hashed while it is copied."""

    def script(conversation: Conversation) -> None:
        told = frames(conversation.hear_get(), CONTENTS)
        conversation.say([*told[0:6:3], *told[1:6:3], *told[2:6:3], *told[6:]])

    pages, _ = fetch_from(context, script)
    assert pages == [Came.HIT] * len(KEYS)


@pytest.mark.parametrize(
    ("why", "came"),
    [
        (Why.ABSENT, Came.ABSENT),
        (Why.BUSY, Came.BUSY),
        (Why.FAILED, Came.FAILED),
        (Why.LEAVING, Came.LEAVING),
        (200, Came.FAILED),
    ],
)
def test_pages_may_not_come(context: Context, why: int, came: Came) -> None:
    """Even when some frames of one were there; pages that are whole remain so."""

    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        conversation.say(frames(get, CONTENTS)[:4])  # page 0, and one frame of page 1
        conversation.say([[encode(Without(get.request, 0, 3, why))]])
        conversation.say([[encode(Without(get.request, 3, 2, why))]])

    pages, delivered = fetch_from(context, script)
    assert pages == [Came.HIT] + [came] * 4
    assert (delivered.ended, delivered.ignored) == (Ended.COMPLETE, 0)


def silent(conversation: Conversation) -> None:
    conversation.hear_get()


def begin_and_die(conversation: Conversation) -> None:
    conversation.say(frames(conversation.hear_get(), CONTENTS)[:4])
    conversation.router.close()


def flood(conversation: Conversation) -> None:
    get = conversation.hear_get()
    conversation.say_until_stopped(frame(get.request + 1, 0, 0, b"", 0))


def flood_with_bytes(conversation: Conversation) -> None:
    get = conversation.hear_get()
    conversation.say_until_stopped(frame(get.request, 0, 1, bytes(1 << 20), 0))


FAULTY = [silent, begin_and_die, flood, flood_with_bytes]


@pytest.mark.parametrize("script", FAULTY)
def test_a_stream_without_anything_useful_ends(
    context: Context, script: Callable[[Conversation], None]
) -> None:
    pages, delivered = fetch_from(context, script, stall=TIME)
    assert delivered.ended is Ended.STALLED
    assert pages[1:] == [Came.STALLED] * 4


@pytest.mark.parametrize("script", FAULTY)
def test_the_deadline_ends_all(context: Context, script: Callable[[Conversation], None]) -> None:
    pages, delivered = fetch_from(context, script, limits=Limits.within(TIME))
    assert delivered.ended is Ended.LATE
    assert pages[1:] == [Came.LATE] * 4


def _after(event: Event, call: Callable[[], None]) -> None:
    event.wait(SOON)
    call()


@pytest.mark.parametrize("script", FAULTY)
def test_a_call_can_be_cancelled(context: Context, script: Callable[[Conversation], None]) -> None:
    cancel = Cancel()
    with peer(context, script) as one, one.connected() as socket:
        asked = one.conversation.asked
        thread = Thread(target=_after, args=(asked, cancel.set))
        thread.start()
        fetched = Fetching().run([stream(socket)], Limits.within(60 * SOON, cancel))
        thread.join(SOON)
    assert fetched.streams[0].ended is Ended.CANCELLED
    assert fetched.pages[1:] == [Came.CANCELLED] * 4


def test_nothing_is_asked_when_time_is_up(context: Context) -> None:
    with peer(context, honest) as one, one.connected() as socket:
        fetched = Fetching().run([stream(socket)], Limits.within(0))
        assert fetched.pages == [Came.LATE] * len(KEYS)
        assert not one.conversation.heard


def test_streams_run_at_once(context: Context) -> None:
    """Three to two peers; what one of them suffers does the others no harm."""

    def share(pages: Sequence[int]) -> Callable[[Conversation], None]:
        def script(conversation: Conversation) -> None:
            get = conversation.hear_get()
            conversation.say(frames(get, [CONTENTS[page] for page in pages]))

        return script

    with ExitStack() as stack:

        def connect(script: Callable[[Conversation], None]) -> zmq.Socket[bytes]:
            return stack.enter_context(stack.enter_context(peer(context, script)).connected())

        fetched = Fetching(3).run(
            [
                stream(connect(flood), [4], stall=TIME),
                stream(connect(share([3, 0])), [3, 0]),
                stream(connect(share([1])), [1]),
            ]
        )
    assert fetched.pages == [Came.HIT, Came.HIT, Came.UNASKED, Came.HIT, Came.STALLED]
    assert [each.ended for each in fetched.streams] == [
        Ended.STALLED,
        Ended.COMPLETE,
        Ended.COMPLETE,
    ]


def test_all_bytes_are_granted_and_never_too_many(context: Context) -> None:
    """A server that keeps to the protocol, with credit for less than one frame: a page goes to its end."""
    most = FRAME // 2

    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        credit = get.credit
        for page, (key, content) in enumerate(zip(KEYS, CONTENTS, strict=True)):
            while credit <= 0:
                message = conversation.hear()
                assert isinstance(message, Credit)
                credit += message.bytes
            assert credit <= most
            credit -= len(content)
            for at in range(0, len(content), FRAME):
                piece = content[at : at + FRAME]
                conversation.say([frame(get.request, page, at, piece, checksum(key, content))])

    with peer(context, script) as one, one.connected() as socket:
        fetched = Fetching().run([stream(socket, credit=most)])
    assert fetched.pages == [Came.HIT] * len(KEYS)


def test_a_connection_that_takes_no_request_is_busy(context: Context) -> None:
    with context.socket(zmq.DEALER) as socket:  # connected to nobody
        fetched = Fetching().run([stream(socket)])
    assert fetched.pages == [Came.BUSY] * len(KEYS)
    assert fetched.streams[0].ended is Ended.BUSY
    assert fetched.streams[0].seconds_to_first is None


def test_a_message_of_very_many_parts_breaks_the_connection(context: Context) -> None:
    def script(conversation: Conversation) -> None:
        conversation.hear_get()
        conversation.say([[b""] * 1000])

    pages, delivered = fetch_from(context, script)
    assert delivered.ended is Ended.BROKEN
    assert pages == [Came.BROKEN] * len(KEYS)


def test_a_context_that_ends_breaks_the_connection(context: Context) -> None:
    own: Context = zmq.Context()
    heard = Event()
    terminating = Thread(target=_after, args=(heard, own.term))

    def script(conversation: Conversation) -> None:
        conversation.hear_get()
        heard.set()

    with peer(context, script) as one, own.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(one.address)
        terminating.start()
        fetched = Fetching().run([stream(socket)])
    terminating.join(SOON)
    assert fetched.pages == [Came.BROKEN] * len(KEYS)


def test_memory_of_the_engine_is_kept_to_the_byte(context: Context) -> None:
    """Both ends of both pages lie beside memory that may not be touched."""
    memory = [guarded(SIZES[0], at_end=at_end) for at_end in (False, True)]
    into = PageSegments([each.data_ptr() for each in memory], [SIZES[0]] * 2, 1, memory)

    def script(conversation: Conversation) -> None:
        get = conversation.hear_get()
        conversation.say(_useless(get))
        conversation.say(frames(get, CONTENTS[:1] * 2))

    with peer(context, script) as one, one.connected() as socket:
        fetched = fetch([stream(socket, [0, 1])], [KEYS[0]] * 2, into, Limits.within(SOON))
    assert fetched.pages == [Came.HIT] * 2
    assert [bytes(each.numpy().data) for each in memory] == CONTENTS[:1] * 2


class TestMistakesOfTheCaller:
    @pytest.fixture
    def asked(self, context: Context) -> Iterator[Peer]:
        with peer(context, honest) as one:
            yield one
            assert not one.conversation.heard

    def test_a_page_in_two_streams(self, asked: Peer) -> None:
        with (
            asked.connected() as one,
            asked.connected() as other,
            pytest.raises(ValueError, match="one stream"),
        ):
            Fetching().run([stream(one, [0, 1]), stream(other, [1])])

    def test_one_socket_for_two_streams(self, asked: Peer) -> None:
        with asked.connected() as one, pytest.raises(ValueError, match="socket"):
            Fetching().run([stream(one, [0]), stream(one, [1])])

    @pytest.mark.parametrize("page", [-1, len(KEYS)])
    def test_a_page_beyond_the_batch(self, asked: Peer, page: int) -> None:
        with asked.connected() as one, pytest.raises(ValueError, match="none of the batch"):
            Fetching().run([stream(one, [page])])

    def test_a_page_without_bytes(self, asked: Peer) -> None:
        memory = EngineMemory.blank([0])
        with asked.connected() as one, pytest.raises(ValueError, match="bytes"):
            fetch([stream(one, [0])], KEYS[:1], memory.segments, Limits.within(SOON))

    def test_other_counts(self, asked: Peer) -> None:
        with asked.connected() as one, pytest.raises(ValueError, match="equally many"):
            fetch([stream(one)], [*KEYS, KEYS[0]], Fetching().memory.segments, Limits.within(SOON))

    def test_a_closed_socket(self, context: Context) -> None:
        socket = context.socket(zmq.DEALER)
        socket.close()
        with pytest.raises(ValueError, match="closed"):
            Fetching().run([stream(socket)])

    @pytest.mark.parametrize(
        ("pages", "frame_bytes", "credit"),
        [(1025, FRAME, 1), (1, 4095, 1), (1, (8 << 20) + 1, 1), (1, FRAME, 0), (1, FRAME, 1 << 40)],
    )
    def test_more_than_the_protocol_allows(
        self, context: Context, pages: int, frame_bytes: int, credit: int
    ) -> None:
        with context.socket(zmq.DEALER) as socket, pytest.raises(ValueError, match=r"not|takes"):
            Stream(socket, 1, range(pages), frame_bytes, credit, SOON)


@pytest.mark.parametrize("version", [(4, 1, 9), (3, 0, 0)])
def test_an_old_library_is_named(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: version)
    with pytest.raises(ConfigError, match=r"4\.2"):
        libzmq_module.libzmq.__wrapped__()


def test_a_backend_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cffi's, of which the sockets' module is written in Python."""
    monkeypatch.setattr(zmq.backend, "Socket", Stream)
    with pytest.raises(ConfigError, match="Cython"):
        libzmq_module.libzmq.__wrapped__()
