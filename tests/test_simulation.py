"""Simulated caches do what their policies say, and the default one learns who comes back."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lmcache_sglang.errors import TraceError
from lmcache_sglang.simulation import POLICIES, Trace

PUBLIC = Path(__file__).parents[2] / "shared" / "traces" / "conversation_trace.jsonl"
SIMPLE = ("lru", "sieve", "s3-fifo", "second-touch")

Requests = Sequence[Sequence[int]]


def chats(seed: int, count: int = 2000) -> list[list[int]]:
    """Conversations of a few turns, side by side; each turn sends all of what was said before."""
    rng, fresh = random.Random(seed), iter(range(1, 1 << 30))
    waiting: list[list[int]] = []
    requests = []
    for _ in range(count):
        returns = waiting and rng.random() < 0.5
        chat = waiting.pop(rng.randrange(len(waiting))) if returns else [0]
        chat = [*chat, *(next(fresh) for _ in range(rng.randrange(1, 12)))]
        requests.append(chat)
        if rng.random() < (0.8 if returns else 0.3):
            waiting.append(chat)
    return requests


def prefix_hits(request: Sequence[int], here: Callable[[int], bool]) -> int:
    return next((at for at, block in enumerate(request) if not here(block)), len(request))


def lru(requests: Requests, room: int, *, touches: int = 1) -> tuple[int, int]:
    """Hits and blocks written, the slow way."""
    cache: OrderedDict[int, None] = OrderedDict()
    seen: dict[int, int] = {}
    hits = written = 0
    for request in requests:
        hits += prefix_hits(request, cache.__contains__)
        for block in request:
            seen[block] = seen.get(block, 0) + 1
            if block in cache:
                cache.move_to_end(block)
            elif seen[block] >= touches:
                if len(cache) == room:
                    cache.popitem(last=False)
                cache[block] = None
                written += 1
    return hits, written


def sieve(requests: Requests, room: int) -> tuple[int, int]:
    queue: list[int] = []  # oldest first
    visited: dict[int, bool] = {}
    hand = hits = written = 0
    for request in requests:
        hits += prefix_hits(request, visited.__contains__)
        for block in request:
            if block in visited:
                visited[block] = True
                continue
            if len(queue) == room:
                while visited[queue[hand]]:
                    visited[queue[hand]] = False
                    hand = (hand + 1) % room
                del visited[queue.pop(hand)]
                hand %= room - 1 or 1  # behind the newest there is the oldest
            queue.append(block)
            visited[block] = False
            written += 1
    return hits, written


def belady(requests: Requests, room: int) -> int:
    """Hits where the block that is used last of all gives way."""
    flat = [block for request in requests for block in request]
    never = len(flat)
    after, later = [never] * len(flat), dict[int, int]()
    for at in reversed(range(len(flat))):
        after[at] = later.get(flat[at], never)
        later[flat[at]] = at
    cache: dict[int, int] = {}
    at = hits = 0
    for request in requests:
        hits += prefix_hits(request, cache.__contains__)
        for block in request:
            cache[block] = after[at]
            at += 1
            cache = {each: due for each, due in cache.items() if due < never}
            if len(cache) > room:
                del cache[max(cache, key=cache.__getitem__)]
    return hits


@pytest.mark.parametrize("room", [1, 7, 40, 300])
def test_textbook_policies_do_as_their_books_say(room: int) -> None:
    requests = chats(1, count=400)
    trace = Trace(requests)

    def did(policy: str) -> tuple[int, int]:
        found = trace.simulate(policy, room)
        return found.hit_blocks, found.written_blocks

    assert did("lru") == lru(requests, room)
    assert did("second-touch") == lru(requests, room, touches=2)
    assert did("sieve") == sieve(requests, room)
    assert did("belady")[0] == belady(requests, room)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"second-touch"}))
def test_a_cache_with_room_for_all_finds_all_that_was_there(policy: str) -> None:
    requests = chats(2)
    seen: set[int] = set()
    hits = 0
    for request in requests:
        hits += prefix_hits(request, seen.__contains__)
        seen.update(request)
    trace = Trace(requests)
    found = trace.simulate(policy, trace.distinct)
    assert found.hit_blocks == hits
    assert found.request_blocks == sum(map(len, requests)) == trace.blocks
    assert found.hit_rate == hits / trace.blocks
    if policy != "belady":  # it does not take what nobody will use
        assert found.written_blocks == trace.distinct == len(seen)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.4])
def test_the_default_learns_which_chats_go_on(part: float, seed: int) -> None:
    trace = Trace(chats(seed, count=20_000))
    room = int(part * trace.distinct)
    rates = {policy: trace.simulate(policy, room).hit_rate for policy in POLICIES}
    assert max(rates[policy] for policy in SIMPLE) < rates["default"] < rates["belady"]


def test_the_default_is_no_worse_than_lru_where_only_recency_counts() -> None:
    rng = random.Random(5)
    requests = [
        [start, start + 1] for start in (2 * (at // 8 + rng.randrange(50)) for at in range(40_000))
    ]
    trace = Trace(requests)
    default, least = (trace.simulate(policy, 60).hit_rate for policy in ("default", "lru"))
    assert default > 0.97 * least


def test_blocks_of_any_name_and_in_any_order_are_counted() -> None:
    """Ids of some traces are text; a block may come twice in a request, behind other ones than before, or not at all."""
    rng = random.Random(6)
    requests = [[f"{rng.randrange(40)}" for _ in range(rng.randrange(6))] for _ in range(3000)]
    for policy in POLICIES:
        found = Trace(requests).simulate(policy, 10)
        assert 0 < found.hit_blocks < found.request_blocks == sum(map(len, requests))


def test_what_cannot_be_simulated_is_refused() -> None:
    trace = Trace([[1, 2]])
    with pytest.raises(ValueError, match="no such policy: best"):
        trace.simulate("best", 10)
    with pytest.raises(ValueError, match="at least one"):
        trace.simulate("lru", 0)


def test_traces_are_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "hash_ids": [0, 1]}\n\n{"hash_ids": [0, 1, 2]}\n')
    trace = Trace.read(file)
    assert (trace.requests, trace.blocks, trace.distinct) == (2, 5, 3)
    assert trace.simulate("lru", 10).hit_blocks == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"hash_ids": [0]}\n{"hash_ids": 7}\n', "line 2"),
        ('{"ids": [0]}\n', "line 1.*hash_ids"),
        ("\x00\n", "line 1"),
        ("", "no request"),
        ('{"hash_ids": []}\n', "no request"),
    ],
)
def test_a_file_that_is_no_trace_is_said_to_be_none(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(TraceError, match=says):
        Trace.read(file)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nothing\.jsonl cannot be read: No such file"):
        Trace.read(tmp_path / "nothing.jsonl")


@pytest.mark.skipif(not PUBLIC.exists(), reason="the public trace is not beside the checkout")
def test_the_public_trace() -> None:
    """Figures of LRU that others measured on it too, and what the default is to reach."""
    trace = Trace.read(PUBLIC)
    assert (trace.requests, trace.blocks, trace.distinct) == (12_031, 288_500, 182_790)
    sizes = (1_000, 10_000, 30_000)
    rates = {
        policy: [trace.simulate(policy, size).hit_rate for size in sizes] for policy in POLICIES
    }
    assert rates["lru"] == pytest.approx([0.044, 0.211, 0.326], abs=0.001)
    for at in range(len(sizes)):
        assert (
            max(rates[policy][at] for policy in SIMPLE) < rates["default"][at] < rates["belady"][at]
        )


@pytest.mark.parametrize(
    ("times", "seconds"), [((500, 0, 4500), 4.5), ((500, None, 4500), 0.0), ((7,), 0.0)]
)
def test_how_long_a_trace_took(tmp_path: Path, times: Sequence[int | None], seconds: float) -> None:
    """Only where each request says when it came; in any order."""
    requests = [{"hash_ids": [1], **({} if at is None else {"timestamp": at})} for at in times]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(request) + "\n" for request in requests))
    assert Trace.read(file).seconds == seconds
