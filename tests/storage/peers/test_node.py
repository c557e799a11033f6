"""A node, and what those who connect to it may do to it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_sglang.storage.peers.actions import Action, Answer, Close, Open, Say
from lmcache_sglang.storage.peers.link import Times
from lmcache_sglang.storage.peers.membership import Known, Membership
from lmcache_sglang.storage.peers.messages import (
    NODES_MOST,
    UNHEARD,
    VERSION,
    Goodbye,
    Heard,
    Hello,
    Message,
    NodeRecord,
    Nodes,
    Ping,
    Pong,
    Refused,
    Subscribe,
    Summary,
)
from lmcache_sglang.storage.peers.node import SESSIONS_MOST, SILENT_PINGS, Identity, Node
from lmcache_sglang.storage.peers.standing import Standing
from lmcache_sglang.testing.peer_network import SetColumn, pack
from tests.storage.peers.any_message import anything

TIMES = Times(ping=2.0, silence=6.0)
OWN, OURS = "tcp://me:1", "o" * 40
LIAR, HONEST, STRANGER = "l" * 40, "h" * 40, "s" * 40
ALLOWED = frozenset({OURS, LIAR, HONEST})
PEER = Known("tcp://h:1", HONEST)
ROUTE = b"route"


class Bench:
    """A node with a clock."""

    def __init__(self, *configured: Known, most: int = NODES_MOST) -> None:
        self.now = 1000.0
        membership = Membership([OWN], OURS, ALLOWED, most)
        membership.configure(configured, ALLOWED, most)
        self.columns: dict[int, SetColumn] = {}
        identity = Identity("me", OWN, OURS)
        self.node = Node(identity, membership, self.column, TIMES, Random(0), most=most)

    def column(self, number: int) -> SetColumn:
        return self.columns.setdefault(number, SetColumn())

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return list(self.node.tick(self.now))

    def hear(self, number: int, *messages: Message) -> list[Action]:
        return [a for each in messages for a in self.node.hear(number, each, self.now)]

    def ask(self, *messages: Message, route: bytes = ROUTE, key: str = HONEST) -> list[Message]:
        """What is answered to who connected."""
        actions = [a for each in messages for a in self.node.asked(route, key, each, self.now)]
        return [
            each.message for each in actions if isinstance(each, Answer) and each.route == route
        ]

    def stands(self, number: int, standing: Standing) -> bool:
        return self.node.links[number].standing is standing

    def link_up(self, number: int = 0, epoch: int = 77) -> None:
        self.tick()
        whole = Summary(epoch, 0, 1, False, pack({1}), b"", 0)
        self.hear(number, hello(epoch), whole)
        assert self.stands(number, Standing.LIVE)


def hello(epoch: int = 77, address: str = "tcp://h:1", node: str = "h") -> Hello:
    return Hello(1, VERSION, node, epoch, address)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_who_asks_is_told_what_there_is_and_what_changes(bench: Bench) -> None:
    list(bench.node.holds(pack({1}), pack({1}), b""))
    assert isinstance(bench.ask(hello())[0], Hello)
    (whole,) = bench.ask(Subscribe(0, 0))
    assert isinstance(whole, Summary)
    assert whole.added == pack({1})
    actions = list(bench.node.holds(pack({1, 2}), pack({2}), b""))
    epoch = bench.node.published.epoch
    assert actions == [Answer(ROUTE, Summary(epoch, 2, 0, False, pack({2}), b"", 2))]


def test_a_ping_is_answered_with_the_state(bench: Bench) -> None:
    bench.ask(hello())
    list(bench.node.holds(pack({1}), pack({1}), b""))
    assert bench.ask(Ping(5)) == [Pong(5, bench.node.published.epoch, 0, 1)]


def test_who_is_not_known_is_greeted(bench: Bench) -> None:
    assert bench.ask(Ping(5)) == [bench.node.hello()]
    assert bench.ask(Subscribe(0, 0)) == [bench.node.hello()]
    assert bench.ask(Heard(0, 0, 0), Goodbye()) == []


def test_who_is_not_allowed_is_not_answered(bench: Bench) -> None:
    assert bench.ask(hello(), Ping(1), key=STRANGER) == []
    assert bench.ask(hello(), Ping(1), key="") == []
    assert bench.node.sessions == {}
    assert list(bench.node.membership) == []


def test_who_is_no_longer_allowed_is_told_nothing_more(bench: Bench) -> None:
    bench.ask(hello(), Subscribe(0, 0))
    bench.tick()
    bench.node.membership.configure([], frozenset({OURS}), NODES_MOST)
    assert Close(0) in bench.tick()
    assert bench.node.sessions == {}
    assert list(bench.node.holds(pack({1}), pack({1}), b"")) == []


def test_a_version_that_is_not_shared_is_refused(bench: Bench) -> None:
    (answer,) = bench.ask(Hello(VERSION + 1, VERSION + 1, "h", 9))
    assert isinstance(answer, Refused)
    assert bench.node.sessions == {}


def test_who_connects_is_linked_to(bench: Bench) -> None:
    bench.ask(hello())
    assert Open(0, "tcp://h:1", HONEST) in bench.tick()


def test_who_never_answers_costs_a_few_summaries(bench: Bench) -> None:
    """However often it greets, subscribes and hears what was never told."""
    told = len(bench.ask(hello(), Subscribe(0, 0))) - 1
    for number in range(200):
        held = {number}
        list(bench.node.holds(pack(held), pack(held), pack({number - 1}) if number else b""))
        asked = bench.ask(hello(), Subscribe(0, 0), Heard(1, number, 0), Ping(number))
        told += sum(isinstance(each, Summary) for each in asked)
    subscription = bench.node.sessions[ROUTE].subscription
    assert subscription is not None
    assert subscription.waiting == UNHEARD
    assert told <= UNHEARD


def test_who_takes_nothing_more_is_forgotten_though_it_pings(bench: Bench) -> None:
    bench.ask(hello(), Subscribe(0, 0))
    for _ in range(int(SILENT_PINGS * TIMES.ping) + 4):
        bench.tick(1.0)
        bench.ask(Ping(1))
    assert bench.node.sessions == {}
    assert bench.ask(Ping(2)) == [bench.node.hello()]  # it may begin anew


def test_who_has_heard_all_is_not_forgotten_for_a_summary_that_is_under_way(bench: Bench) -> None:
    bench.ask(hello(), Subscribe(0, 0), Heard(bench.node.published.epoch, 0, 1))
    for _ in range(60):
        bench.tick(1.0)
        bench.ask(Ping(1))
    list(bench.node.holds(pack({1}), pack({1}), b""))
    bench.tick(1.0)
    assert ROUTE in bench.node.sessions


def test_the_silent_are_forgotten(bench: Bench) -> None:
    bench.ask(hello())
    bench.tick(SILENT_PINGS * TIMES.ping + 0.1)
    assert bench.node.sessions == {}


def test_one_key_does_not_take_all_sessions(bench: Bench) -> None:
    for number in range(2 * SESSIONS_MOST):
        bench.ask(hello(number + 1, ""), route=b"%d" % number, key=LIAR)
    assert len(bench.node.sessions) == SESSIONS_MOST
    assert bench.ask(hello(), route=b"honest") == [bench.node.hello()]
    assert len(bench.node.sessions) == SESSIONS_MOST
    (refused,) = bench.ask(hello(9, ""), route=b"one more", key=LIAR)
    assert isinstance(refused, Refused)
    assert b"honest" in bench.node.sessions


def test_fakes_by_hearsay_are_bounded_and_make_room() -> None:
    bench = Bench(Known("tcp://l:1", LIAR), most=8)
    bench.link_up()
    for number in range(100):
        fakes = [NodeRecord("f", f"tcp://f{number}:{port}", LIAR) for port in range(1, 65)]
        bench.hear(0, Nodes(fakes))
    bench.tick()
    assert len(bench.node.links) == 8
    bench.ask(hello())
    bench.tick()
    assert "tcp://h:1" in {link.known.address for link in bench.node.links.values()}
    assert len(bench.node.links) == 8


def test_strangers_and_nonsense_by_hearsay_are_not_linked_to() -> None:
    bench = Bench(PEER)
    bench.link_up()
    records = [
        NodeRecord("s", "tcp://s:1", STRANGER),
        NodeRecord("p", "tcp://p:1", ""),
        NodeRecord("i", "ipc:///tmp/x", LIAR),
        NodeRecord("m", OWN, LIAR),
        NodeRecord("n", "", LIAR),
        NodeRecord("h", "tcp://h:1", LIAR),
    ]
    bench.hear(0, Nodes(records))
    bench.tick()
    assert [link.known for link in bench.node.links.values()] == [PEER]


def test_goodbye_in_the_name_of_another_ends_nothing() -> None:
    bench = Bench(PEER)
    bench.link_up()
    bench.ask(hello(77, ""), Goodbye(), route=b"liar", key=LIAR)
    assert bench.stands(0, Standing.LIVE)
    bench.ask(hello(77), Goodbye())
    assert bench.stands(0, Standing.LEFT)


def test_the_epoch_of_another_does_not_replace_it() -> None:
    bench = Bench(PEER, Known("tcp://l:1", LIAR))
    bench.link_up(0)
    bench.hear(1, hello(77, "tcp://l:1"))
    assert bench.stands(0, Standing.LIVE)
    bench.tick()
    assert len(bench.node.links) == 2


def test_who_says_to_be_this_node_is_not_believed_it() -> None:
    bench = Bench(PEER)
    bench.tick()
    assert Close(0) in bench.hear(0, hello(bench.node.published.epoch))
    bench.tick()
    assert PEER in list(bench.node.membership)


def test_an_own_address_by_another_name_is_passed() -> None:
    bench = Bench(Known("tcp://alias:1", OURS))
    bench.tick()
    bench.hear(0, hello(bench.node.published.epoch))
    bench.tick()
    assert bench.node.links == {}


def test_a_node_with_two_addresses_is_linked_to_once() -> None:
    bench = Bench(PEER)
    bench.link_up(0)
    bench.hear(0, Nodes([NodeRecord("h", "tcp://h.example:1", HONEST)]))
    bench.tick()
    bench.hear(1, hello(77))
    bench.tick()
    assert [link.known for link in bench.node.links.values()] == [PEER]
    assert bench.stands(0, Standing.LIVE)


def test_the_others_are_told_whom_it_is_linked_to() -> None:
    bench = Bench(PEER)
    bench.ask(hello(5, "", "x"), route=b"x", key=LIAR)
    bench.link_up()
    told = bench.tick(TIMES.ping)
    me, peer = NodeRecord("me", OWN, OURS), NodeRecord("h", "tcp://h:1", HONEST)
    assert Answer(b"x", Nodes([me, peer])) in told
    assert not any(isinstance(getattr(each, "message", None), Nodes) for each in bench.tick(0.1))


def test_it_leaves_once_and_says_nothing_more() -> None:
    bench = Bench(PEER)
    bench.link_up()
    bench.ask(hello(78, ""))
    actions = list(bench.node.leave())
    assert actions == [Say(0, Goodbye()), Close(0), Answer(ROUTE, Goodbye())]
    assert bench.tick() == []
    assert bench.ask(Ping(1)) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["hear", "ask", "tick"]), st.integers(0, 3), anything),
        max_size=60,
    )
)
def test_whatever_is_said_raises_nothing_and_stays_bounded(
    said: list[tuple[str, int, Message]],
) -> None:
    bench = Bench(PEER, Known("tcp://l:1", LIAR), most=4)
    bench.link_up()
    for how, number, message in said:
        if how == "hear":
            bench.hear(number, message)
        elif how == "ask":
            bench.ask(message, route=b"%d" % number, key=(LIAR, HONEST)[number % 2])
        else:
            bench.tick(0.7)
    bench.tick()
    assert len(bench.node.links) <= 4
    assert len(bench.node.membership) <= 4
    assert all(each.waiting <= UNHEARD for each in bench.node.sessions.values())
