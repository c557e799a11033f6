"""Where a prefix may end: what SGLang asks of each pool of a model (0.5.23, `PoolHitPolicy`).

A pool that needs every page allows the prefixes up to its first gap. One that needs the last pages only
(a sliding window, a recurrent state) allows those prefixes that end where its window is whole, so 5 may be
allowed while 3 and 4 are not. All ranks must stop at the same page, and each knows its own shard only, so
the answer is the whole set and not its maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pages = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one pool: the prefixes that it allows, in pages, and the longest of them (0: none)."""

    prefixes: frozenset[int]
    boundary: int


def all_pages(here: Sequence[bool]) -> Verdict:
    """Every page of the prefix must be here."""
    boundary = leading(np.asarray(here, bool))
    return Verdict(frozenset(range(1, boundary + 1)), boundary)


def trailing_pages(here: Sequence[bool], window: int) -> Verdict:
    """The last `window` pages of the prefix must be here, or all of a shorter one."""
    prefixes = ends(whole_windows(np.asarray(here, bool), window)).tolist()
    return Verdict(frozenset(prefixes), prefixes[-1] if prefixes else 0)


def leading(here: NDArray[np.bool_]) -> int:
    """How many of the first pages are here."""
    return len(here) if here.all() else int(here.argmin())


def whole_windows(here: NDArray[np.bool_], window: int) -> NDArray[np.bool_]:
    """Of each page whether a prefix may end behind it: it and the `window` - 1 pages before it, or all there are, are
    here."""
    pages = np.arange(len(here))
    last_gap = np.maximum.accumulate(np.where(here, -1, pages))
    return pages - last_gap >= np.minimum(window, pages + 1)


def ends(allowed: NDArray[np.bool_]) -> Pages:
    """The prefixes, in pages, shortest first, that end behind a page where they may."""
    return np.flatnonzero(allowed) + 1


def thinned(prefixes: Pages, last: int, scale: int) -> Pages:
    """Some of these prefixes, so that ranks which choose from different ones choose a common one that is long.

    The last ones, and then ever sparser: of each run of `scale` pages that has any the first, of each run of so many
    runs the first, and so on, each time those of the last runs. Where runs begin does not depend on what a rank has,
    so of two ranks that have the same pages up to where the shorter ends, both choose a prefix that is no further
    from there than `scale` / (`last` - 1) times what the other has more, or both their first one.

    Args:
        prefixes: shortest first.
        last: so many of each sparseness.
        scale: how much sparser the next is than the one before.
    """
    if len(prefixes) <= last:
        return prefixes
    chosen, run = [prefixes[-last:]], 1
    while len(prefixes) > last:
        run *= scale
        runs = prefixes // run
        begins = np.ones(len(runs), bool)
        np.not_equal(runs[1:], runs[:-1], out=begins[1:])
        prefixes = prefixes[begins]
        chosen.append(prefixes[-last:])
    return np.unique(np.concatenate(chosen))


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
