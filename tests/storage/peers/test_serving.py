"""Whose turn it is, what a request may take, and what is said of pages that do not come."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lmcache_sglang.storage.base import NAMESPACE_BYTES
from lmcache_sglang.storage.peers.messages import (
    Cancel,
    Credit,
    Get,
    NotUnderstoodError,
    Why,
    Without,
)
from lmcache_sglang.storage.peers.serving import (
    BATCH_BYTES,
    IDLE_SECONDS,
    OWNER_MOST,
    REQUESTS_MOST,
    Batch,
    Passed,
    Serving,
)
from lmcache_sglang.testing.tier_suite import OTHER_NAMESPACE, a_key, some_keys

OURS = b"\0" * NAMESPACE_BYTES
LARGEST = 8 << 20
A, B = b"route a", b"route b"


@pytest.fixture
def serving() -> Serving:
    return Serving(lambda namespace: namespace == OURS, per_route=4)


def get(
    serving: Serving,
    number: int,
    lengths: Sequence[int],
    *,
    route: bytes = A,
    owner: int = 1,
    keys: Sequence[bytes] = (),
    credit: int = 1 << 30,
    now: float = 0.0,
) -> list[Passed]:
    joined = b"".join(keys or some_keys(len(lengths)))
    asked = Get(1, number, joined, list(lengths), 4096, credit)
    return list(serving.get(route, owner, asked, LARGEST, now))


def take(serving: Serving) -> Batch:
    """The next turn, begun."""
    turn = serving.turn()
    assert isinstance(turn, Batch)
    serving.begun(turn)
    return turn


def test_a_request_is_read_in_batches_to_its_end(serving: Serving) -> None:
    assert get(serving, 7, [BATCH_BYTES // 2] * 5) == []
    spans = []
    while len(serving):
        batch = take(serving)
        spans.append((batch.first, batch.end))
        serving.done(batch)
    assert spans == [(0, 2), (2, 4), (4, 5)]
    assert serving.turn() is None


def test_a_page_larger_than_a_batch_goes_alone(serving: Serving) -> None:
    get(serving, 7, [BATCH_BYTES + 1, 10])
    batch = take(serving)
    assert (batch.first, batch.end, batch.bytes) == (0, 1, BATCH_BYTES + 1)


def test_requests_take_turns(serving: Serving) -> None:
    get(serving, 1, [BATCH_BYTES] * 3)
    get(serving, 2, [BATCH_BYTES] * 3, route=B)
    order = []
    while len(serving):
        batch = take(serving)
        order.append(batch.request.number)
        serving.done(batch)
    assert order == [1, 2, 1, 2, 1, 2]


def test_one_request_is_not_read_by_two_workers(serving: Serving) -> None:
    get(serving, 1, [BATCH_BYTES] * 2)
    batch = take(serving)
    assert serving.turn() is None
    serving.done(batch)
    assert isinstance(serving.turn(), Batch)


def test_no_more_is_read_than_there_is_credit_for(serving: Serving) -> None:
    get(serving, 1, [1000] * 10, credit=3500)
    batch = take(serving)
    assert batch.bytes == 3000
    serving.done(batch)
    assert take(serving).bytes == 1000  # what was begun goes to its end
    assert serving.turn() is None


def test_credit_lets_a_request_go_on(serving: Serving) -> None:
    get(serving, 1, [1000] * 10, credit=1000)
    serving.done(take(serving))
    assert serving.turn() is None
    serving.credit(A, Credit(1, 2000), now=1.0)
    assert take(serving).bytes == 2000


def test_credit_while_a_worker_reads_does_not_give_two_turns(serving: Serving) -> None:
    get(serving, 1, [1000] * 10, credit=1000)
    batch = take(serving)
    serving.credit(A, Credit(1, 1000), now=1.0)
    assert serving.turn() is None
    serving.done(batch)
    serving.done(take(serving))
    assert serving.turn() is None


def test_credit_for_a_request_of_another_route_is_nobodys(serving: Serving) -> None:
    get(serving, 1, [1000] * 2, credit=1000)
    serving.done(take(serving))
    serving.credit(B, Credit(1, 1000), now=1.0)
    serving.credit(A, Credit(2, 1000), now=1.0)
    assert serving.turn() is None


def test_a_cancelled_request_is_not_read_any_further(serving: Serving) -> None:
    get(serving, 1, [BATCH_BYTES] * 3)
    batch = take(serving)
    serving.cancel(A, Cancel(1))
    assert batch.request.is_over
    serving.done(batch)
    assert (len(serving), serving.turn()) == (0, None)


def test_who_is_gone_leaves_nothing_behind(serving: Serving) -> None:
    for number in range(3):
        get(serving, number, [10])
    get(serving, 9, [10], route=B)
    serving.gone(A)
    assert take(serving).request.number == 9
    assert len(serving) == 1


def test_pages_of_other_namespaces_are_never_looked_up(serving: Serving) -> None:
    keys = [a_key(0), a_key(1, OTHER_NAMESPACE), a_key(2, OTHER_NAMESPACE), a_key(3)]
    get(serving, 1, [10] * 4, keys=keys)
    first = take(serving)
    assert (first.first, first.end) == (0, 1)
    serving.done(first)
    assert serving.turn() == Passed(A, Without(1, 1, 2, Why.ABSENT))
    assert take(serving).end == 4


def test_nothing_at_all_that_is_shared_ends_the_request(serving: Serving) -> None:
    get(serving, 1, [10], keys=[a_key(1, OTHER_NAMESPACE)])
    assert serving.turn() == Passed(A, Without(1, 0, 1, Why.ABSENT))
    assert (len(serving), serving.turn()) == (0, None)


def test_a_page_larger_than_all_memory_does_not_come(serving: Serving) -> None:
    get(serving, 1, [LARGEST + 1, 10])
    assert serving.turn() == Passed(A, Without(1, 0, 1, Why.ABSENT))
    assert take(serving).first == 1


def test_too_many_requests_of_one_connection_are_turned_away(serving: Serving) -> None:
    for number in range(4):
        assert get(serving, number, [10]) == []
    assert get(serving, 4, [10, 10]) == [Passed(A, Without(4, 0, 2, Why.BUSY))]
    assert get(serving, 4, [10], route=B) == []
    assert serving.turned_away == 1


def test_there_is_room_again_once_one_has_ended(serving: Serving) -> None:
    for number in range(4):
        get(serving, number, [10])
    serving.done(take(serving))
    assert get(serving, 4, [10]) == []


def test_all_askers_together_cannot_fill_the_memory(serving: Serving) -> None:
    for route in range(REQUESTS_MOST // 4):
        for number in range(4):
            assert get(serving, number, [10], route=route.to_bytes(4), owner=route) == []
    assert [p.without.why for p in get(serving, 1, [10], route=b"late")] == [Why.BUSY]
    assert len(serving) == REQUESTS_MOST


def test_a_number_twice_is_turned_away(serving: Serving) -> None:
    get(serving, 1, [10])
    assert [p.without.why for p in get(serving, 1, [10])] == [Why.BUSY]


def test_who_gives_no_more_credit_is_forgotten(serving: Serving) -> None:
    get(serving, 1, [1000] * 2, credit=1000, now=5.0)
    serving.done(take(serving))
    serving.expire(5.0 + IDLE_SECONDS)
    assert len(serving) == 1
    serving.expire(5.1 + IDLE_SECONDS)
    assert len(serving) == 0


@pytest.mark.parametrize(
    "asked",
    [
        Get(1, 1, b"", [], 4096, 1),
        Get(1, 1, some_keys(1)[0] + b"x", [10], 4096, 1),
        Get(1, 1, some_keys(1)[0], [10, 10], 4096, 1),
    ],
)
def test_what_makes_no_sense_is_not_understood(serving: Serving, asked: Get) -> None:
    with pytest.raises(NotUnderstoodError):
        list(serving.get(A, 1, asked, LARGEST, 0.0))
    assert len(serving) == 0


def test_who_asks_and_cancels_leaves_nothing_behind(serving: Serving) -> None:
    """Also while nobody's turn comes."""
    for number in range(5000):
        get(serving, number, [10])
        serving.cancel(A, Cancel(number))
    assert (len(serving), len(serving._turns)) == (0, 0)


def test_a_number_that_is_used_again_is_another_request(serving: Serving) -> None:
    get(serving, 1, [10])
    old = take(serving)
    serving.cancel(A, Cancel(1))
    get(serving, 1, [20])
    serving.done(old)
    assert len(serving) == 1
    assert take(serving).bytes == 20


def test_one_asker_with_many_connections_leaves_room_for_others(serving: Serving) -> None:
    answers = [
        get(serving, number, [10], route=route.to_bytes(4), owner=7)
        for route in range(OWNER_MOST)
        for number in range(2)
    ]
    assert answers.count([]) == OWNER_MOST
    assert get(serving, 1, [10], route=b"other", owner=8) == []


def test_who_has_no_room_lets_others_go_first(serving: Serving) -> None:
    get(serving, 1, [BATCH_BYTES] * 2, owner=7)
    get(serving, 2, [BATCH_BYTES] * 2, route=B, owner=8)
    serving.has_room = lambda owner, _: owner == 8
    assert take(serving).request.number == 2
    assert serving.turn() is None
    serving.has_room = lambda *_: True
    assert take(serving).request.number == 1
