"""What an engine is replayed, and what could be given back of it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from lmcache_sglang.testing.trace import (
    VOCABULARY,
    make_trace,
    reachable,
    reachable_in,
    read_trace,
    tokens,
)


def test_equal_blocks_are_equal_pages_and_others_are_not() -> None:
    pages = [tuple(tokens([block], 16)[:16]) for block in range(2000)]
    assert len(set(pages)) == len(pages)
    assert tokens([7, 8, 9], 16)[16:32] == list(pages[8])
    assert all(token in VOCABULARY for page in pages for token in page)


def test_a_prompt_ends_with_a_token_that_is_always_computed() -> None:
    assert len(tokens([1, 2], 16)) == 33


def test_reachable_is_the_prefix_that_came_before() -> None:
    assert reachable([[0, 1, 2], [0, 1, 3], [0, 1, 2, 4], [5, 1]]) == [0, 2, 3, 0]


def test_a_small_cache_forgets_what_was_used_longest_ago_and_ends_first() -> None:
    asked = [[0, 1, 2], [3, 4], [0, 1, 2]]
    assert reachable_in(asked, room=5) == [0, 0, 3]
    assert reachable_in(asked, room=4) == [0, 0, 2]
    assert reachable_in(asked, room=2) == [0, 0, 0]


def test_our_own_conversations_share_a_start_and_grow() -> None:
    asked = make_trace(conversations=5, turns=4)
    assert len(asked) == 20
    assert all(blocks[0] == 0 for blocks in asked)
    by_conversation: dict[int, list[list[int]]] = {}
    for blocks in asked:
        by_conversation.setdefault(blocks[1], []).append(blocks)
    assert {len(turns) for turns in by_conversation.values()} == {4}
    for turns in by_conversation.values():
        for before, after in pairwise(turns):
            assert after[: len(before)] == before
    assert asked == make_trace(conversations=5, turns=4)


def test_of_a_trace_the_conversations_that_come_back_are_read(tmp_path: Path) -> None:
    asked = [[0, 1], [0, 2, 3], [0, 1, 4], [0], [0, 5], [0, 1, 4, 6, 7], [0, 5, 8]]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"hash_ids": blocks}) + "\n" for blocks in asked))
    first = read_trace(path, conversations=1, turns=2, longest=4)
    assert first == [[0, 1], [0, 1, 4]]
    both = read_trace(path, conversations=2, turns=2, longest=9)
    assert both == [[0, 1], [0, 1, 4], [0, 5], [0, 1, 4, 6, 7], [0, 5, 8]]
