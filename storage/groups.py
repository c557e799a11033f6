"""Splitting a batch of pages into parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def groups(pages: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive parts of `pages` of at most `limit` bytes together, and of one page at least.

    Args:
        pages: indices into `sizes`.
        sizes: bytes of each page of the whole batch.
    """
    group: list[int] = []
    total = 0
    for page in pages:
        if group and total + sizes[page] > limit:
            yield group
            group, total = [], 0
        group.append(page)
        total += sizes[page]
    if group:
        yield group
