"""A link to one peer: opened, followed, lost and tried again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from random import Random

import pytest

from lmcache_sglang.storage.peers.actions import Action, Close, Open, Say
from lmcache_sglang.storage.peers.backoff import FIRST_SECONDS, MOST_SECONDS
from lmcache_sglang.storage.peers.link import LONG_SECONDS, Link, Times
from lmcache_sglang.storage.peers.membership import Known
from lmcache_sglang.storage.peers.messages import (
    VERSION,
    Goodbye,
    Heard,
    Hello,
    Message,
    Ping,
    Pong,
    Refused,
    Subscribe,
    Summary,
)
from lmcache_sglang.storage.peers.standing import Standing
from lmcache_sglang.testing.peer_network import SetColumn, pack

TIMES = Times(ping=2.0, silence=6.0)
EPOCH = 77
HELLO = Hello(1, VERSION, "peer", EPOCH)
ALL = Summary(EPOCH, 5, 1, False, pack({1, 2}), b"", 5)


class Bench:
    """A link, what it did, and the peer's place in the directory."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.column = SetColumn()
        own = Hello(1, VERSION, "me", 1)
        known = Known("tcp://peer:1")
        self.link = Link(3, known, self.column, TIMES, Random(0), lambda: own)

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return list(self.link.tick(self.now))

    def hear(self, *messages: Message) -> list[Action]:
        return [action for each in messages for action in self.link.hear(each, self.now)]

    def stands(self, standing: Standing) -> bool:
        return self.link.standing is standing

    def go_live(self) -> None:
        self.tick(MOST_SECONDS)
        self.hear(HELLO, ALL)
        assert self.stands(Standing.LIVE)

    def pause(self) -> float:
        """Until it is opened again."""
        start = self.now
        while not any(isinstance(each, Open) for each in self.tick(0.01)):
            assert self.now - start < 2 * MOST_SECONDS
        return self.now - start


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_is_greeted_then_asked_then_believed(bench: Bench) -> None:
    opened = bench.tick()
    assert [type(each) for each in opened] == [Open, Say]
    assert bench.hear(HELLO) == [Say(3, Subscribe(0, 0))]
    assert bench.stands(Standing.FOLLOWING)
    assert not bench.column.is_believed
    assert bench.hear(ALL) == [Say(3, Heard(EPOCH, 5, 1))]
    assert bench.stands(Standing.LIVE)
    assert bench.column.is_believed
    assert bench.column.tags == {1, 2}


def test_what_is_not_all_is_not_believed(bench: Bench) -> None:
    bench.tick()
    bench.hear(HELLO, Summary(EPOCH, 5, 1, False, pack({1, 2}), b"", 6))
    assert not bench.column.is_believed
    bench.hear(Summary(EPOCH, 6, 0, False, b"", pack({1}), 6))
    assert bench.column.is_believed
    assert bench.column.tags == {2}


def test_nothing_counts_before_the_greeting(bench: Bench) -> None:
    bench.tick()
    assert bench.hear(ALL, Pong(0, EPOCH, 99)) == []
    assert bench.link.load == 0
    assert bench.column.tags == set()


def test_it_is_asked_for_signs_of_life(bench: Bench) -> None:
    bench.go_live()
    assert bench.tick(TIMES.ping) == [Say(3, Ping(1))]
    bench.now += 0.25
    bench.hear(Pong(1, EPOCH, 10, 5))
    assert bench.link.rtt == pytest.approx(0.25)
    assert bench.link.load == 10
    bench.hear(Pong(55, EPOCH, 11, 5))  # of no ping
    assert bench.link.rtt == pytest.approx(0.25)


def test_silence_ends_it(bench: Bench) -> None:
    bench.go_live()
    assert Close(3) in bench.tick(TIMES.silence + 0.1)
    assert bench.stands(Standing.AWAY)
    assert not bench.column.is_believed


def test_what_waited_while_this_node_slept_is_not_believed(bench: Bench) -> None:
    bench.go_live()
    bench.now += TIMES.silence + 0.1
    assert bench.hear(Pong(0, EPOCH, 0, 5)) == [Close(3)]
    assert not bench.column.is_believed


def test_a_peer_that_answers_but_tells_nothing_is_let_go(bench: Bench) -> None:
    bench.tick()
    bench.hear(HELLO)
    for _ in range(6):
        bench.tick(1.0)
        bench.hear(Pong(0, EPOCH, 0, 5))
    bench.tick(1.0)
    assert bench.stands(Standing.AWAY)


def test_a_peer_that_has_more_and_does_not_tell_it_is_let_go(bench: Bench) -> None:
    """A summary was dropped on the way; that is seen by the sequence that it is at."""
    bench.go_live()
    for _ in range(30):
        bench.tick(1.0)
        bench.hear(Pong(0, EPOCH, 0, 5))
    assert bench.stands(Standing.LIVE)
    for _ in range(7):
        bench.tick(1.0)
        bench.hear(Pong(0, EPOCH, 0, 6))
    assert bench.stands(Standing.AWAY)


def test_it_goes_on_where_it_was(bench: Bench) -> None:
    bench.go_live()
    bench.tick(TIMES.silence + 0.1)
    bench.pause()
    assert bench.hear(HELLO) == [Say(3, Subscribe(EPOCH, 5))]
    assert bench.column.tags == {1, 2}
    assert not bench.column.is_believed
    bench.hear(Summary(EPOCH, 5, 0, False, b"", b"", 5))
    assert bench.column.is_believed


def test_a_peer_that_was_cleared_is_not_believed_from_before(bench: Bench) -> None:
    bench.go_live()
    assert bench.hear(Hello(1, VERSION, "peer", EPOCH + 1)) == [Say(3, Subscribe(0, 0))]
    assert not bench.column.is_believed
    assert bench.column.tags == set()


def test_a_peer_of_another_epoch_is_not_believed(bench: Bench) -> None:
    bench.go_live()
    assert bench.hear(Pong(0, EPOCH + 1, 0, 5)) == [Close(3)]
    assert not bench.column.is_believed


def test_a_peer_that_knows_the_link_no_more_is_connected_anew(bench: Bench) -> None:
    bench.go_live()
    assert bench.hear(HELLO) == [Close(3)]
    assert 0 < bench.pause() <= FIRST_SECONDS + 0.02


def test_a_gap_ends_it(bench: Bench) -> None:
    bench.go_live()
    assert bench.hear(Summary(EPOCH, 7, 0, False, b"", b"", 7)) == [Close(3)]
    assert not bench.column.is_believed


@pytest.mark.parametrize(
    "last", [Goodbye(), Refused("no"), Hello(VERSION + 1, VERSION + 1, "p", 9)]
)
def test_who_leaves_or_refuses_is_left_alone_for_a_while(bench: Bench, last: Message) -> None:
    bench.go_live()
    assert bench.hear(last) == [Close(3)]
    assert not bench.column.is_believed
    assert bench.pause() >= LONG_SECONDS


def test_nothing_is_heard_on_a_link_that_is_closed(bench: Bench) -> None:
    bench.go_live()
    bench.hear(Goodbye())
    assert bench.hear(HELLO, ALL, Pong(0, EPOCH, 0, 5)) == []
    assert not bench.column.is_believed


def test_who_is_away_is_tried_seldom_and_then_more_seldom(bench: Bench) -> None:
    pauses = []
    bench.tick()
    for _ in range(9):
        bench.tick(TIMES.silence + 0.1)
        pauses.append(bench.pause())
    assert pauses[0] <= FIRST_SECONDS + 0.02
    assert MOST_SECONDS / 2 <= pauses[-1] <= MOST_SECONDS + 0.02


def test_who_is_live_only_for_a_moment_is_not_tried_sooner(bench: Bench) -> None:
    bench.tick()
    pauses = []
    for _ in range(9):
        bench.hear(HELLO, ALL, Summary(EPOCH, 99, 0, False, b"", b"", 99))
        pauses.append(bench.pause())
    assert pauses[-1] >= MOST_SECONDS / 2


def test_a_sign_of_life_elsewhere_ends_the_wait(bench: Bench) -> None:
    bench.tick()
    for _ in range(8):
        bench.tick(TIMES.silence + 0.1)
        pause = bench.pause()
    assert pause > 5.0
    bench.tick(TIMES.silence + 0.1)
    bench.link.nudge(bench.now)
    assert bench.pause() <= FIRST_SECONDS + 0.02


def test_who_refuses_is_not_tried_for_a_sign_of_life(bench: Bench) -> None:
    bench.tick()
    bench.hear(Refused("no"))
    bench.link.nudge(bench.now)
    assert bench.pause() >= LONG_SECONDS


def test_an_ended_link_leaves_nothing(bench: Bench) -> None:
    bench.go_live()
    assert list(bench.link.end()) == [Close(3)]
    assert not bench.column.is_believed
    assert bench.column.tags == set()


def test_what_a_peer_says_stays_in_its_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.tick()
    with caplog.at_level(logging.WARNING):
        bench.hear(Refused("no\nERROR all is lost\x1b[2J"))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].isprintable()


def storm() -> Iterator[Message]:
    """What a peer may say to have a node work or remember."""
    random = Random(1)
    for number in range(3000):
        said: list[Message] = [
            Hello(1, VERSION, "peer", random.randrange(1, 4)),
            Summary(
                random.randrange(4), number % 4, number % 3, bool(number % 2), b"x" * 16, b"", 3
            ),
            Summary(random.randrange(4), number, 1, True, b"y" * 3, b"", 1 << 60),
            Pong(number, random.randrange(4), (1 << 64) - 1, (1 << 64) - 1),
            Heard(1, 1, 1),
            Subscribe(0, 0),
            Ping(number),
        ]
        yield random.choice(said)


def test_whatever_a_peer_says_it_is_answered_little(bench: Bench) -> None:
    """At most one message for each of its own, and no more connections than pauses allow."""
    opened = said = 0
    for message in storm():
        for action in [*bench.tick(0.01), *bench.hear(message)]:
            opened += isinstance(action, Open)
            said += isinstance(action, Say)
    assert said <= 3000 + 2 * opened
    assert opened <= 8  # half a minute, and each pause longer than the one before
