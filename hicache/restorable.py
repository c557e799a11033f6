"""Where a prefix may end: what SGLang asks of each pool of a model (0.5.23, `PoolHitPolicy`).

A pool that needs every page allows the prefixes up to its first gap. One that needs the last pages only
(a sliding window, a recurrent state) allows those prefixes that end where its window is whole, so 5 may be
allowed while 3 and 4 are not. All ranks must stop at the same page, and each knows its own shard only, so
the answer is the whole set and not its maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one pool: the prefixes that it allows, in pages, and the longest of them (0: none)."""

    prefixes: frozenset[int]
    boundary: int


def all_pages(here: Sequence[bool]) -> Verdict:
    """Every page of the prefix must be here."""
    boundary = next((i for i, found in enumerate(here) if not found), len(here))
    return Verdict(frozenset(range(1, boundary + 1)), boundary)


def trailing_pages(here: Sequence[bool], window: int) -> Verdict:
    """The last `window` pages of the prefix must be here, or all of a shorter one."""
    prefixes, run = [], 0
    for end, found in enumerate(here, 1):
        run = run + 1 if found else 0
        if run >= min(window, end):
            prefixes.append(end)
    return Verdict(frozenset(prefixes), prefixes[-1] if prefixes else 0)


def block_groups(here: Sequence[bool], group: int, pages: int) -> int:
    """How many pages the leading whole groups cover. Such a pool is a second form of the pages: it has a
    verdict of its own and never shortens a prefix.

    Args:
        here: of each key; `group` keys in turn belong to one block.
        pages: of the prefix, that a block covers.
    """
    if group <= 0:
        return 0
    whole = 0
    while (whole + 1) * group <= len(here) and all(here[whole * group : (whole + 1) * group]):
        whole += 1
    return whole * pages
