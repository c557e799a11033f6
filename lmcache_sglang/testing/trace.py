"""Multi-turn traffic as lists of block ids, and the prompts that share prefixes as those do.

A request is the ids of its prompt's blocks in order; equal ids stand for equal text up to and including that
block. One block becomes one page here, so a trace of 512-token blocks is replayed at a thirty-second of its
size with pages of 16.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

Blocks = list[int]

VOCABULARY = range(3, 503)  # of testing/tiny_model.py, without its special tokens
# Next to a checkout, where there is one; not part of the repository.
SHARED_TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"


def read_trace(path: Path, *, conversations: int, turns: int, longest: int) -> list[Blocks]:
    """The first conversations of a trace that come back, with everything they ask, in order of arrival.

    The trace is Mooncake's: one JSON object a line, with `hash_ids`. Its first block is the same for nearly
    all (a system prompt), so that the second one tells conversations apart.

    Args:
        conversations: how many.
        turns: each of them asks so often at least.
        longest: requests of more blocks are left out.
    """
    with path.open() as lines:
        asked: list[Blocks] = [json.loads(line)["hash_ids"] for line in lines]
    asked = [blocks for blocks in asked if 2 <= len(blocks) <= longest]
    times = Counter(blocks[1] for blocks in asked)
    returning = dict.fromkeys(blocks[1] for blocks in asked if times[blocks[1]] >= turns)
    chosen = set(list(returning)[:conversations])
    return [blocks for blocks in asked if blocks[1] in chosen]


def make_trace(
    *, conversations: int, turns: int, first: int = 20, grows: int = 6, seed: int = 0
) -> list[Blocks]:
    """Conversations of a few turns, in turn order within each, mixed with one another.

    Args:
        first: blocks of a conversation's first prompt, about; one of them is the system prompt, of all.
        grows: by how many blocks a turn is longer than the one before it, about.
    """
    rng = random.Random(seed)
    fresh = iter(range(1, 1 << 20))
    open_ones: list[Blocks] = [[0] for _ in range(conversations)]
    order = [number for number in range(conversations) for _ in range(turns)]
    rng.shuffle(order)
    asked = []
    for number in order:
        blocks = open_ones[number]
        more = first if len(blocks) == 1 else grows
        blocks += [next(fresh) for _ in range(rng.randint(more // 2, more + more // 2))]
        asked.append(list(blocks))
    return asked


def tokens(blocks: Sequence[int], page_size: int) -> list[int]:
    """The prompt: a page for each block, and one more token, which is always computed.

    Without that one the last page would be asked for in vain: SGLang computes at least one token.
    """
    return [token for block in blocks for token in _page(block, page_size)] + [VOCABULARY[0]]


def _page(block: int, page_size: int) -> Iterator[int]:
    """Tokens that no other block has: the id itself, and then noise that depends on it."""
    size, rest = len(VOCABULARY), block
    noise = random.Random(block)
    for _ in range(page_size):
        rest, digit = divmod(rest, size)
        yield VOCABULARY[digit] if rest or digit else noise.choice(VOCABULARY)


def reachable(asked: Sequence[Sequence[int]]) -> list[int]:
    """Of each request, the blocks that one before it brought: what a cache without limits gives back."""
    known: set[int] = set()
    found = []
    for blocks in asked:
        found.append(next((i for i, block in enumerate(blocks) if block not in known), len(blocks)))
        known.update(blocks)
    return found


def reachable_in(asked: Sequence[Sequence[int]], room: int) -> list[int]:
    """The same of a cache of so many blocks, of which the least recently used gives way, ends first."""
    kept: dict[int, None] = {}
    found = []
    for blocks in asked:
        found.append(next((i for i, block in enumerate(blocks) if block not in kept), len(blocks)))
        for block in reversed(blocks):
            kept.pop(block, None)
            kept[block] = None
        for block in list(kept)[: max(0, len(kept) - room)]:
            del kept[block]
    return found
