"""Peers under a DNS name, with answers that are made up, and with the system's own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sglang.storage.peers import names
from lmcache_sglang.storage.peers.addresses import TcpAddress, parse
from lmcache_sglang.storage.peers.names import (
    KEPT_SECONDS,
    Answer,
    NameWatch,
    NoAnswer,
    Outcome,
    resolve,
)

SOON = 30.0
ONE, TWO = frozenset({"tcp://10.0.0.1:7801"}), frozenset({"tcp://10.0.0.2:7801"})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watch:
    """A watch that is given its answers."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.told: list[frozenset[str]] = []
        self.outcome: Outcome = NoAnswer("not asked yet")
        self.watch = NameWatch(
            "peers.svc",
            7801,
            30.0,
            self.told.append,
            resolve=lambda name, port: self.outcome,
            clock=self.clock,
        )

    def look(self, outcome: Outcome, after: float = 0.0) -> frozenset[str]:
        self.clock.now += after
        self.outcome = outcome
        self.watch.look()
        return self.watch.addresses


# --- the system's answers ---


def system(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., object]) -> None:
    stand_in = SimpleNamespace(**{**vars(socket), "getaddrinfo": answer})
    monkeypatch.setattr(names, "socket", stand_in)


def test_each_address_is_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 9)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 9, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 9)),
    ]
    system(monkeypatch, lambda *_, **__: found)
    assert resolve("peers.svc", 9) == Answer(frozenset({"tcp://10.0.0.1:9", "tcp://[fd00::1]:9"}))


def test_the_systems_own_resolver() -> None:
    assert resolve("127.0.0.1", 9) == Answer(frozenset({"tcp://127.0.0.1:9"}))
    assert resolve("::1", 9) == Answer(frozenset({"tcp://[::1]:9"}))


@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".example", "a b", "", "\udcff"])
def test_what_is_no_name_has_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("", "a b"):  # these would be asked for
        error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        system(monkeypatch, raising(error))
    outcome = resolve(name, 9)
    assert isinstance(outcome, NoAnswer)
    assert outcome.reason


def raising(error: Exception) -> Callable[..., object]:
    def answer(*_: object, **__: object) -> object:
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (socket.gaierror(socket.EAI_NODATA, "No address"), Answer(frozenset())),
        (socket.gaierror(socket.EAI_NONAME, "Not known"), NoAnswer("Not known")),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), NoAnswer("Temporary failure")),
        (OSError("no sockets left"), NoAnswer("no sockets left")),
    ],
)
def test_no_address_is_an_answer_and_no_answer_is_none(
    error: Exception, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    system(monkeypatch, raising(error))
    assert resolve("peers.svc", 9) == outcome


# --- what counts ---


def test_those_concerned_are_told_of_changes_only() -> None:
    watch = Watch()
    for outcome in (Answer(ONE), Answer(ONE), Answer(ONE | TWO), Answer(TWO)):
        watch.look(outcome)
    assert watch.told == [ONE, ONE | TWO, TWO]


def test_an_empty_answer_is_an_answer() -> None:
    watch = Watch()
    watch.look(Answer(ONE))
    assert watch.look(Answer(frozenset())) == frozenset()
    assert watch.told == [ONE, frozenset()]


def test_the_last_answer_is_kept_for_a_while() -> None:
    watch = Watch()
    watch.look(Answer(ONE))
    assert watch.look(NoAnswer("down"), after=KEPT_SECONDS) == ONE
    assert watch.look(NoAnswer("down"), after=1) == frozenset()
    assert watch.look(Answer(ONE)) == ONE
    assert watch.told == [ONE, frozenset(), ONE]


def test_a_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        for outcome in (NoAnswer("down"), NoAnswer("down"), Answer(ONE), NoAnswer("down")):
            watch.look(outcome)
    assert [record.getMessage() for record in caplog.records] == [
        "lmcache: no peers under peers.svc: down"
    ] * 2


OUTCOMES = st.one_of(
    st.builds(NoAnswer, st.just("down")),
    st.builds(Answer, st.frozensets(st.sampled_from(["tcp://a:1", "tcp://b:1", "tcp://c:1"]))),
)


@given(st.lists(st.tuples(OUTCOMES, st.floats(0, 2 * KEPT_SECONDS))))
def test_what_counts_is_the_last_answer_unless_it_is_old(
    steps: list[tuple[Outcome, float]],
) -> None:
    watch, last, at = Watch(), frozenset[str](), 0.0
    for outcome, after in steps:
        now = watch.look(outcome, after)
        if isinstance(outcome, Answer):
            last, at = outcome.addresses, watch.clock.now
        assert now == (last if watch.clock.now - at <= KEPT_SECONDS else frozenset())
        last = now
    assert all(one != other for one, other in zip(watch.told, watch.told[1:], strict=False))


@given(st.ip_addresses(), st.integers(1, 65535))
def test_addresses_are_as_they_are_written_in_settings(ip: object, port: int) -> None:
    address = TcpAddress(str(ip), port)
    assert parse(str(address)) == address


# --- the thread ---


@pytest.fixture
def asked() -> Iterator[tuple[NameWatch, SimpleQueue[str], Event]]:
    """A watch of an hour, the names it asked for, and what an answer waits for."""
    names_asked: SimpleQueue[str] = SimpleQueue()
    go_on = Event()

    def slow(name: str, port: int) -> Outcome:
        names_asked.put(name)
        go_on.wait(SOON)
        return Answer(ONE)

    watch = NameWatch("peers.svc", 1, 3600.0, lambda _: None, resolve=slow)
    yield watch, names_asked, go_on
    go_on.set()
    watch.close()


def test_it_asks_at_once_and_a_close_ends_the_wait(
    asked: tuple[NameWatch, SimpleQueue[str], Event],
) -> None:
    watch, names_asked, go_on = asked
    go_on.set()
    watch.start()
    assert names_asked.get(timeout=SOON) == "peers.svc"
    watch.close()
    watch._thread.join(SOON)
    assert not watch._thread.is_alive()
    assert names_asked.empty()


def test_it_asks_again_and_again() -> None:
    answers: SimpleQueue[frozenset[str]] = SimpleQueue()
    turns = iter([ONE, TWO, ONE])
    watch = NameWatch(
        "x", 1, 0.001, answers.put, resolve=lambda name, port: Answer(next(turns, ONE))
    )
    watch.start()
    assert [answers.get(timeout=SOON) for _ in range(3)] == [ONE, TWO, ONE]
    watch.close()


def test_an_answer_after_the_close_changes_nothing(
    asked: tuple[NameWatch, SimpleQueue[str], Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "CLOSE_SECONDS", 0.01)
    watch, names_asked, go_on = asked
    watch.start()
    names_asked.get(timeout=SOON)
    watch.close()  # the look-up hangs; it is left alone
    go_on.set()
    watch._thread.join(SOON)
    assert watch.addresses == frozenset()


def test_closing_what_never_began_is_nothing() -> None:
    watch = Watch().watch
    watch.close()
    watch.close()
