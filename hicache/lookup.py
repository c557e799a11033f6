"""Which pages of some pools are stored: whole, or in pieces that engines of other topologies stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..storage.base import Tier
    from ..storage.chain import Chain
    from .stored_pool import Standing

PIECES_AT_ONCE = 512  # pages that pieces are looked for of, before a gap ends it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of one pool.

    Attributes:
        standing: of the pool; None: it is not stored.
        page_hashes: of its pages.
        beside_kv: whether each goes with the KV page of the same place, and is of no use without that.
    """

    standing: Standing | None
    page_hashes: list[bytes]
    beside_kv: bool = True


@dataclass(frozen=True, slots=True)
class Found:
    """Of one pool, in the order of the pages that were asked for.

    Attributes:
        holders: the tier that a page comes from, of pieces the lowest; None: the page is not here.
    """

    holders: list[Tier | None]

    @property
    def here(self) -> list[bool]:
        return [holder is not None for holder in self.holders]

    @property
    def tiers(self) -> list[Tier]:
        """Of the pages that are here."""
        return [holder for holder in self.holders if holder is not None]


def look_up(chain: Chain, wanted: Sequence[Wanted]) -> tuple[list[Found], int]:
    """One lookup for all pools' own pages, and more where some are missing and others may have their pieces.

    Args:
        wanted: the first is the KV pool's; behind a gap in it nothing is of use.

    Returns:
        For each pool what was found, nothing for one that is not stored; and of how many pages there were some
        pieces and not all.
    """
    own = [
        each.standing.namespace + page_hash
        for each in wanted
        if each.standing is not None
        for page_hash in each.page_hashes
    ]
    answers = iter(chain.holders(own))
    found: list[Found] = []
    partly, usable = 0, len(wanted[0].page_hashes)
    for each in wanted:
        is_kv = each is wanted[0]
        holders = [] if each.standing is None else [next(answers) for _ in each.page_hashes]
        if each.standing is not None and None in holders:
            pages = range(usable if each.beside_kv else len(holders))
            partly += _look_for_pieces(
                chain, each.standing, each.page_hashes, holders, pages, prefix=is_kv
            )
        if is_kv and None in holders:
            usable = holders.index(None)
        found.append(Found(holders))
    return found, partly


def _look_for_pieces(
    chain: Chain,
    standing: Standing,
    page_hashes: list[bytes],
    holders: list[Tier | None],
    among: range,
    *,
    prefix: bool,
) -> int:
    """Fill in who has the pieces of those of these pages that are missing, up to a gap for a `prefix`; how many
    lack some of theirs."""
    partly = 0
    missing = [i for i in among if holders[i] is None]
    for start in range(0, len(missing) if standing.tiling.covers else 0, PIECES_AT_ONCE):
        pages = missing[start : start + PIECES_AT_ONCE]
        for cover in standing.tiling.covers:
            keys = [piece.namespace + page_hashes[i] for piece in cover for i in pages]
            found = chain.holders(keys)
            for at, i in enumerate(pages):
                pieces = found[at :: len(pages)]
                if None not in pieces:
                    holders[i] = holders[i] or _lowest(chain, pieces)
                elif any(pieces):
                    partly += 1
        if prefix and any(holders[i] is None for i in pages):
            break
    return partly


def _lowest(chain: Chain, holders: Sequence[Tier | None]) -> Tier:
    there = {holder.name for holder in holders if holder is not None}
    return next(tier for tier in reversed(chain.tiers) if tier.name in there)
