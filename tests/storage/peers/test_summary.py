"""That who follows has what is told, whatever becomes of the messages."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_sglang.storage.peers import summary as module
from lmcache_sglang.storage.peers.messages import TAG_BYTES, UNHEARD, Heard, Subscribe, Summary
from lmcache_sglang.storage.peers.summary import (
    LOG_TAGS,
    WHOLES,
    Follower,
    Following,
    Published,
    Subscription,
)
from lmcache_sglang.testing.peer_network import SetColumn, pack, unpack

tags = st.sets(st.integers(0, 30), max_size=6)


def change(published: Published, held: set[int], added: set[int], removed: set[int]) -> None:
    added, removed = added - held, removed & held
    held -= removed
    held |= added
    published.change(pack(held), pack(added), pack(removed))


def pump(subscription: Subscription, follower: Follower) -> list[Following]:
    """Everything that there is to tell, told and heard."""
    outcomes = []
    while told := list(subscription.next()):
        for message in told:
            outcomes.append(follower.take(message))
            assert subscription.heard(Heard(message.epoch, message.sequence, message.part))
    return outcomes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two tags, and a log of few changes."""
    monkeypatch.setattr(module, "PIECE", 2 * TAG_BYTES)
    monkeypatch.setattr(module, "LOG_TAGS", 40)


def test_a_newcomer_is_told_all_in_parts(small: None) -> None:
    published, column = Published(7, pack(range(5))), SetColumn()
    follower = Follower(column)
    follower.begin(7)
    told = list(Subscription(published, follower.subscribe()).next())
    assert [(each.part, each.more) for each in told] == [(1, True), (2, True), (3, False)]
    assert [follower.take(each) for each in told][-1] is Following.IN_STEP
    assert column.tags == set(range(5))


def test_who_has_nothing_says_so() -> None:
    published, column = Published(7), SetColumn()
    follower = Follower(column)
    follower.begin(7)
    assert pump(Subscription(published, follower.subscribe()), follower) == [Following.IN_STEP]


def test_who_comes_back_is_told_what_changed() -> None:
    held = {1, 2}
    published, column = Published(7, pack(held)), SetColumn()
    follower = Follower(column)
    follower.begin(7)
    pump(Subscription(published, follower.subscribe()), follower)
    change(published, held, {3}, {1})
    asked = follower.subscribe()
    assert asked == Subscribe(7, 0)
    told = list(Subscription(published, asked).next())
    assert [(each.part, each.added, each.removed) for each in told] == [
        (0, b"", pack({1})),
        (0, pack({3}), b""),
    ]
    assert [follower.take(each) for each in told] == [Following.USED, Following.IN_STEP]
    assert column.tags == {2, 3}


def test_who_comes_back_to_the_same_is_told_so() -> None:
    published, column = Published(7, pack({1})), SetColumn()
    follower = Follower(column)
    follower.begin(7)
    pump(Subscription(published, follower.subscribe()), follower)
    assert pump(Subscription(published, follower.subscribe()), follower) == [Following.IN_STEP]
    assert column.tags == {1}


def test_who_is_far_behind_is_told_all_again(small: None) -> None:
    held = {1}
    published, column = Published(7, pack(held)), SetColumn()
    follower = Follower(column)
    follower.begin(7)
    pump(Subscription(published, follower.subscribe()), follower)
    for tag in range(10, 20):
        change(published, held, {tag}, set())
    told = list(Subscription(published, follower.subscribe()).next())
    assert told[0].part == 1


def test_a_whole_that_is_old_by_the_time_it_is_told_is_no_reason_to_believe(small: None) -> None:
    """What went meanwhile is said after it."""
    held = set(range(12))
    published, column = Published(7, pack(held)), SetColumn()
    follower = Follower(column)
    follower.begin(7)
    subscription = Subscription(published, follower.subscribe())
    first = list(subscription.next())
    change(published, held, set(), {0})
    for message in first:
        follower.take(message)
        subscription.heard(Heard(message.epoch, message.sequence, message.part))
    outcomes = pump(subscription, follower)
    assert outcomes.index(Following.IN_STEP) == len(outcomes) - 1
    assert column.tags == held


def test_newcomers_share_what_they_are_told_of() -> None:
    held = set(range(10))
    published = Published(7, pack(held))
    for tag in range(100, 140):
        Subscription(published, Subscribe(0, 0))
        change(published, held, {tag}, set())
    assert len(published._wholes) == 1


def test_a_newcomer_is_told_of_a_state_that_the_log_goes_back_to(small: None) -> None:
    """Or it would begin again and again."""
    held: set[int] = set()
    published = Published(7)
    for tag in range(20):
        change(published, held, {tag}, set())
        assert published.keeps(published.whole())


def test_who_never_answers_costs_little(small: None) -> None:
    """Changes without end, newcomers without end, and nobody who hears."""
    held = set(range(100))
    published = Published(7, pack(held))
    subscriptions: list[Subscription] = []
    told = 0
    for tag in range(1000, 2000):
        change(published, held, {tag}, {tag - 1})
        if tag % 10 == 0:
            subscriptions.append(Subscription(published, Subscribe(0, 0)))
        told += sum(len(list(each.next())) for each in subscriptions)
        wholes = {id(each._whole) for each in subscriptions if each._whole is not None}
        assert len(wholes) <= WHOLES
        assert published._logged <= 40
    assert told == UNHEARD * len(subscriptions)


def test_asking_again_and_again_is_told_no_more() -> None:
    published = Published(7, pack(range(10)))
    subscription = Subscription(published, Subscribe(0, 0))
    told = len(list(subscription.next()))
    for _ in range(50):
        subscription.again(Subscribe(0, 0))
        told += len(list(subscription.next()))
    assert told == subscription.waiting == UNHEARD


def test_the_log_is_bounded_by_small_changes_too() -> None:
    published = Published(7)
    for tag in range(LOG_TAGS // 8):
        published.change(b"", pack({tag}), b"")
    assert len(published._log) * module.CHANGE_TAGS <= LOG_TAGS


@pytest.mark.parametrize(
    "asked", [Subscribe(7, 99), Subscribe(8, 0), Subscribe(7, (1 << 64) - 1), Subscribe(0, 5)]
)
def test_a_state_that_there_never_was_is_answered_with_all(asked: Subscribe) -> None:
    published = Published(7, pack({1}))
    assert [each.part for each in Subscription(published, asked).next()] == [1]


def test_a_wrong_answer_counts_for_nothing() -> None:
    subscription = Subscription(Published(7), Subscribe(0, 0))
    list(subscription.next())
    assert not subscription.heard(Heard(7, 5, 1))
    assert not subscription.heard(Heard(8, 0, 1))
    assert subscription.heard(Heard(7, 0, 1))
    assert not subscription.heard(Heard(7, 0, 1))


ROW = [
    Summary(7, 3, 1, True, pack({1}), b"", 3),
    Summary(7, 3, 2, False, pack({2}), b"", 3),
    Summary(7, 4, 0, False, pack({3}), b"", 4),
    Summary(7, 5, 0, False, b"", pack({1}), 5),
]


@pytest.mark.parametrize(
    "wrong",
    [
        [ROW[0], ROW[2]],  # a part is missing
        [ROW[0], Summary(7, 3, 3, False, b"", b"", 3)],
        [ROW[0], Summary(7, 4, 2, False, b"", b"", 4)],  # of another whole
        [*ROW[:2], ROW[3]],  # a change is missing
        [*ROW[:3], ROW[2]],  # twice
        [*ROW[:2], Summary(8, 4, 0, False, b"", b"", 4)],  # another epoch
        [*ROW[:2], Summary(7, 4, 0, False, b"123", b"", 4)],  # no tags
        [*ROW[:2], Summary(7, 4, 2, False, b"", b"", 4)],  # a part after the last
    ],
    ids=range(8),
)
def test_what_does_not_follow_ends_it(wrong: list[Summary]) -> None:
    column = SetColumn()
    follower = Follower(column)
    follower.begin(7)
    outcomes = [follower.take(each) for each in wrong]
    assert outcomes[-1] is Following.LOST
    assert column.tags == set()
    assert follower.subscribe() == Subscribe(0, 0)


def test_another_epoch_forgets_all() -> None:
    column = SetColumn()
    follower = Follower(column)
    follower.begin(7)
    for message in ROW:
        follower.take(message)
    assert column.tags == {2, 3}
    follower.begin(8)
    assert column.tags == set()
    assert follower.take(ROW[3]) is Following.PASSED


@given(
    st.lists(
        st.builds(
            Summary,
            st.integers(6, 8),
            st.integers(0, 5),
            st.integers(0, 3),
            st.booleans(),
            st.binary(max_size=17),
            st.binary(max_size=17),
            st.integers(0, 5),
        )
    )
)
def test_a_follower_hears_any_nonsense(said: list[Summary]) -> None:
    follower = Follower(SetColumn())
    follower.begin(7)
    for message in said:
        if follower.take(message) is Following.IN_STEP:
            assert message.epoch == 7
            assert follower.sequence == message.sequence


class Telling(RuleBasedStateMachine):
    """One that tells and one that follows, over a connection that may be lost, or say things twice."""

    def __init__(self) -> None:
        super().__init__()
        self._was = (module.PIECE, module.LOG_TAGS)
        module.PIECE, module.LOG_TAGS = 2 * TAG_BYTES, 60
        self.epochs = itertools.count(1)
        self.held: set[int] = set()
        self.published = Published(next(self.epochs))
        self.column = SetColumn()
        self.follower = Follower(self.column)
        self.history = {(self.published.epoch, 0): set[int]()}
        self.old: list[Summary] = []
        self.connect()

    def teardown(self) -> None:
        module.PIECE, module.LOG_TAGS = self._was

    def connect(self) -> None:
        self.down: deque[Summary] = deque()
        self.answers: deque[Heard] = deque()
        self.follower.begin(self.published.epoch)
        self.subscription = Subscription(self.published, self.follower.subscribe())

    @rule(added=tags, removed=tags)
    def changes(self, added: set[int], removed: set[int]) -> None:
        added, removed = added - self.held, removed & self.held - added
        before, first = set(self.held), self.published.sequence
        change(self.published, self.held, added, removed)
        for number, (more, less) in enumerate(
            module._pieces(pack(added), pack(removed)), first + 1
        ):
            before = (before - unpack(less)) | unpack(more)
            self.history[self.published.epoch, number] = set(before)

    @rule(held=tags)
    def clears(self, held: set[int]) -> None:
        self.held = set(held)
        self.published.begin(next(self.epochs), pack(held))
        self.history[self.published.epoch, 0] = set(held)

    @rule()
    def tells(self) -> None:
        self.down.extend(self.subscription.next())

    @rule()
    def loses_the_connection(self) -> None:
        self.connect()

    @precondition(lambda self: self.down)
    @rule(count=st.integers(1, 6))
    def hears(self, count: int) -> None:
        down = self.down
        while down is self.down and down and count:
            self.takes(down.popleft())
            count -= 1

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def hears_something_twice(self, data: st.DataObject) -> None:
        self.takes(data.draw(st.sampled_from(self.old)))

    @precondition(lambda self: self.down)
    @rule()
    def loses_one(self) -> None:
        self.down.popleft()

    @rule()
    def answers_arrive(self) -> None:
        while self.answers:
            self.subscription.heard(self.answers.popleft())

    def takes(self, message: Summary) -> None:
        self.old.append(message)
        outcome = self.follower.take(message)
        if outcome is Following.LOST:
            self.connect()
            return
        self.answers.append(Heard(message.epoch, message.sequence, message.part))
        if outcome is Following.IN_STEP:
            state = (self.follower.epoch, self.follower.sequence)
            assert self.column.tags == self.history[state]

    @invariant()
    def little_is_on_its_way(self) -> None:
        assert self.subscription.waiting <= UNHEARD
        assert self.published._logged <= 60

    @rule()
    def everything_is_told_at_last(self) -> None:
        self.connect()
        assert pump(self.subscription, self.follower)[-1] is Following.IN_STEP
        assert self.column.tags == self.held
        self.connect()


TestTelling = Telling.TestCase
TestTelling.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
