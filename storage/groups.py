"""Splitting a batch of pages into parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PAGES_MOST = 1024  # that one call of a tier changes in its index


def groups(pages: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive parts of `pages`, of one page at least, of at most `limit` bytes and `PAGES_MOST` pages.

    Args:
        pages: indices into `sizes`.
        sizes: bytes of each page of the whole batch.
    """
    group: list[int] = []
    total = 0
    for page in pages:
        if group and (total + sizes[page] > limit or len(group) == PAGES_MOST):
            yield group
            group, total = [], 0
        group.append(page)
        total += sizes[page]
    if group:
        yield group
