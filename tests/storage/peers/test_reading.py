"""Reading from peers that are dead, hung, slow, lying, busy, or gone: what each costs, and who delivers instead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import zmq

from lmcache_sglang.storage.base import Cancel, Limits, Lookup
from lmcache_sglang.storage.peers.directory import Directory, PeerRecord
from lmcache_sglang.storage.peers.keys import NO_KEYS
from lmcache_sglang.storage.peers.messages import Expect, Get, Why, Without, encode, split_keys
from lmcache_sglang.storage.peers.standing import Standing
from lmcache_sglang.storage.peers.tags import tags_of
from lmcache_sglang.storage.peers.tier import HEAD, PeerLimits, PeerTier
from lmcache_sglang.testing.tier_suite import EngineMemory, bytes_of, read, some_keys
from lmcache_sglang.testing.waiting import wait_until
from tests.storage.peers.scripted_peer import Conversation, Parts, frames, peer

SIZE = 100_000
HIT = Lookup.HIT


@dataclass
class Neighbourhood:
    """This node's directory, as its agent would have written it, and the peers in it."""

    folder: Path
    undo: ExitStack
    context: zmq.Context[zmq.Socket[bytes]]
    directory: Directory
    peers: int = 0
    conversations: list[Conversation] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def add(self, script: Callable[[Conversation], None], keys: Sequence[bytes]) -> Conversation:
        """A peer that is said to have these pages."""
        its = self.undo.enter_context(peer(self.context, script))
        self.know(its.address, keys)
        self.conversations.append(its.conversation)
        return its.conversation

    def know(self, address: str, keys: Sequence[bytes]) -> None:
        number, self.peers = self.peers, self.peers + 1
        self.addresses.append(address)
        record = PeerRecord(f"peer-{number}", address, b"", Standing.LIVE, 1, 1 + number)
        self.directory.set_record(number, record)
        self.directory.put(number, tags_of(keys))
        self.directory.believe(number)
        self.directory.beat()

    def address(self, number: int) -> str:
        return self.addresses[number]

    def tier(self, deadline: float = 2.0) -> PeerTier:
        limits = PeerLimits(deadline=deadline, streams=1)
        return self.undo.enter_context(closing(PeerTier(self.folder, NO_KEYS, limits)))


@pytest.fixture
def around(shared_memory: Path) -> Iterator[Neighbourhood]:
    shared_memory.mkdir(exist_ok=True)
    with ExitStack() as undo:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        undo.callback(context.term)
        directory = Directory.create(shared_memory / HEAD, 4 << 20)
        undo.callback(directory.close)
        yield Neighbourhood(shared_memory, undo, context, directory)


def honest(get: Get) -> list[Parts]:
    return frames(get, [bytes_of(key, SIZE) for key in split_keys(get.keys)])


def times_asked(conversation: Conversation) -> int:
    return sum(isinstance(message, Get) for message in conversation.heard)


def serve(conversation: Conversation) -> None:
    """Honestly, whoever asks, for ever."""
    while True:
        message = conversation.hear()
        if isinstance(message, Get):
            conversation.say(honest(message))


def lie(conversation: Conversation) -> None:
    """The right frames and sums, and other bytes."""
    while True:
        message = conversation.hear()
        if isinstance(message, Get):
            for body, payload in honest(message):
                conversation.say([(body, payload[:-1] + bytes([payload[-1] ^ 1]))])


def hang(conversation: Conversation) -> None:
    """Hear, and say nothing."""


def refuse(why: Why) -> Callable[[Conversation], None]:
    def script(conversation: Conversation) -> None:
        while True:
            message = conversation.hear()
            if isinstance(message, Get):
                without = Without(message.request, 0, len(message.lengths), why)
                conversation.say([(encode(without),)])

    return script


def test_pages_come_from_who_has_them(around: Neighbourhood) -> None:
    keys = some_keys(6)
    around.add(serve, keys[:4])
    tier = around.tier()
    assert tier.exists(keys) == [True] * 4 + [False] * 2
    assert read(tier, keys, SIZE, per_page=3) == [HIT] * 4 + [Lookup.MISS] * 2


def test_each_page_is_asked_of_its_holder(around: Neighbourhood) -> None:
    keys = some_keys(8)
    for number in range(4):
        around.add(serve, keys[number::4])
    assert read(around.tier(), keys, SIZE) == [HIT] * 8


def test_pages_that_are_nowhere_cost_no_round_trip(around: Neighbourhood) -> None:
    conversation = around.add(serve, some_keys(1))
    tier = around.tier()
    assert read(tier, some_keys(50, start=100), SIZE) == [Lookup.MISS] * 50
    assert conversation.heard == []


def test_what_a_peer_has_lost_is_a_miss(around: Neighbourhood) -> None:
    """A false positive costs one request."""
    conversation = around.add(refuse(Why.ABSENT), some_keys(3))
    assert read(around.tier(), some_keys(3), SIZE) == [Lookup.MISS] * 3
    assert [type(each) for each in conversation.heard] == [Get]


@pytest.mark.parametrize("script", [lie, hang, refuse(Why.ABSENT), refuse(Why.BUSY)])
def test_another_holder_delivers_what_the_first_one_does_not(
    around: Neighbourhood, script: Callable[[Conversation], None]
) -> None:
    keys = some_keys(6)
    for each in (script, serve):
        around.add(each, keys)
    tier = around.tier(deadline=4.0)
    for _ in range(2):  # whoever is asked first
        assert read(tier, keys, SIZE) == [HIT] * 6


def test_a_dead_peer_costs_one_deadline_and_is_then_left_alone(around: Neighbourhood) -> None:
    keys = some_keys(3)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
    around.know(f"tcp://127.0.0.1:{port}", keys)
    tier = around.tier(deadline=1.0)
    assert set(read(tier, keys, SIZE)) == {Lookup.LATE}
    assert tier.exists(keys) == [False] * 3, "it is promised at once again"
    assert read(tier, keys, SIZE) == [Lookup.MISS] * 3


def test_a_hung_peer_is_tried_again_after_a_rest(around: Neighbourhood) -> None:
    keys, awake = some_keys(3), Event()

    def sleep_first(conversation: Conversation) -> None:
        conversation.hear()
        awake.wait()
        serve(conversation)

    around.add(sleep_first, keys)
    tier = around.tier(deadline=0.6)
    assert set(read(tier, keys, SIZE)) == {Lookup.LATE}
    awake.set()
    assert tier.exists(keys) == [False] * 3
    wait_until(lambda: all(tier.exists(keys)))
    assert read(tier, keys, SIZE) == [HIT] * 3


def test_who_lies_twice_in_a_row_is_asked_no_more(
    around: Neighbourhood, caplog: pytest.LogCaptureFixture
) -> None:
    keys = some_keys(4)
    conversation = around.add(lie, keys)
    tier = around.tier()
    for number in range(2):
        assert Lookup.CORRUPT in read(tier, [keys[number]], SIZE)
        if number == 0:
            wait_until(lambda: all(tier.exists(keys)))
    asked = times_asked(conversation)
    assert tier.exists(keys) == [False] * 4
    assert read(tier, keys, SIZE) == [Lookup.MISS] * 4
    assert times_asked(conversation) == asked
    assert "peer-0 sent wrong bytes" in caplog.text


def test_a_page_that_came_wrong_is_not_promised_once_it_was_removed(around: Neighbourhood) -> None:
    keys = some_keys(3)
    around.add(serve, keys)
    tier = around.tier()
    assert tier.remove(keys[1:2]) == 1
    assert tier.exists(keys) == [True, False, True]
    assert tier.remove(keys[1:2]) == 0


def test_a_read_ends_when_it_is_given_up(around: Neighbourhood) -> None:
    keys, cancel = some_keys(2), Cancel()
    conversation = around.add(hang, keys)
    tier = around.tier(deadline=60.0)
    memory = EngineMemory.blank([SIZE] * 2)
    outcome: list[Lookup] = []

    def run() -> None:
        outcome.extend(tier.get(keys, memory.segments, Limits(None, cancel)))

    thread = Thread(target=run)
    thread.start()
    assert conversation.asked.wait(10.0)
    cancel.set()
    thread.join(10.0)
    assert not thread.is_alive()
    assert outcome == [Lookup.LATE] * 2
    assert tier.exists(keys) == [True] * 2, "its caller's haste is held against the peer"


def test_a_callers_little_time_is_kept_and_not_held_against_the_peer(around: Neighbourhood) -> None:
    keys = some_keys(2)
    around.add(hang, keys)
    tier = around.tier(deadline=60.0)
    memory = EngineMemory.blank([SIZE] * 2)
    started = time.monotonic()
    assert tier.get(keys, memory.segments, Limits.within(0.1)) == [Lookup.LATE] * 2
    assert time.monotonic() - started < 30.0
    assert tier.exists(keys) == [True] * 2


def test_many_reads_at_once_have_connections_of_their_own(around: Neighbourhood) -> None:
    keys = some_keys(8)
    around.add(serve, keys)
    tier = around.tier()
    outcomes: list[list[Lookup]] = []
    threads = [Thread(target=lambda: outcomes.append(read(tier, keys, SIZE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert outcomes == [[HIT] * 8] * 4


def test_a_chain_is_told_of_as_soon_as_its_first_pages_hit(around: Neighbourhood) -> None:
    keys = some_keys(10)
    conversation = around.add(serve, keys)
    tier = around.tier()
    assert read(tier, keys[:1], SIZE) == [HIT]  # from which the length of a page is known
    tier.exists(keys)
    tier.exists(keys)  # once is enough
    assert read(tier, keys[1:2], SIZE) == [HIT]
    (word,) = (each for each in conversation.heard if isinstance(each, Expect))
    assert (word.keys, word.length) == (b"".join(keys), SIZE)


@pytest.mark.parametrize("standing", [Standing.CONNECTING, Standing.FOLLOWING, Standing.AWAY])
def test_only_who_is_live_is_asked(around: Neighbourhood, standing: Standing) -> None:
    keys = some_keys(2)
    conversation = around.add(serve, keys)
    around.directory.set_record(0, PeerRecord("peer-0", "tcp://127.0.0.1:1", b"", standing, 1, 1))
    assert around.tier().exists(keys) == [False] * 2
    assert conversation.heard == []


def test_a_peer_that_was_forgotten_is_not_asked(around: Neighbourhood) -> None:
    keys = some_keys(2)
    around.add(serve, keys)
    tier = around.tier()
    assert tier.exists(keys) == [True] * 2
    around.directory.doubt(0)
    assert tier.exists(keys) == [False] * 2
    assert read(tier, keys, SIZE) == [Lookup.MISS] * 2


def test_without_an_agent_nobody_is_asked(shared_memory: Path) -> None:
    shared_memory.mkdir(exist_ok=True)
    with closing(PeerTier(shared_memory, NO_KEYS, PeerLimits())) as tier:
        assert tier.exists(some_keys(2)) == [False] * 2
        assert read(tier, some_keys(2), SIZE) == [Lookup.MISS] * 2


def _has_looked_since(tier: PeerTier, looked: float) -> bool:
    tier.exists(some_keys(1))
    return tier._looked > looked


def test_who_lied_is_not_asked_any_sooner_for_having_been_away(around: Neighbourhood) -> None:
    keys = some_keys(3)
    conversation = around.add(lie, keys)
    tier = around.tier()
    for number in range(2):
        wait_until(lambda: all(tier.exists(keys)))
        read(tier, keys[number : number + 1], SIZE)
    asked = times_asked(conversation)
    live = PeerRecord("peer-0", around.address(0), b"", Standing.LIVE, 1, 99)
    for record in (replace(live, state=Standing.AWAY), live):
        around.directory.set_record(0, record)
        wait_until(partial(_has_looked_since, tier, tier._looked))
    assert tier.exists(keys) == [False] * 3
    assert times_asked(conversation) == asked
