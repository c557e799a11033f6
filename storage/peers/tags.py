"""The 64 bits by which nodes name a page to one another.

A page's tag is the first 8 bytes of its hash XOR the first 8 of its namespace, little-endian. Sets of tags
are `bytes`, 8 for each tag; sorted, each once, where a function says so. Both halves of a key are digests,
so tags are as good as random: of N pages about N * (N - 1) / 2^65 pairs share one.
"""

from __future__ import annotations

from collections.abc import Iterable

from .. import _native

TAG_BYTES = 8


def tags_of(keys: Iterable[bytes]) -> bytes:
    """The tags of pages, in the order of their keys. Raises: ValueError, for what is no key."""
    return _native.tags_of(list(keys))


def count(tags: bytes) -> int:
    return len(tags) // TAG_BYTES


def sort(tags: bytes) -> bytes:
    """The set of some tags. Raises: ValueError, when they end within one."""
    return _native.sorted_tags(tags)


def merge(one: bytes, other: bytes) -> bytes:
    """The tags of either of two sets, as a set."""
    return _native.merge_tags(one, other)


def without(tags: bytes, others: bytes) -> bytes:
    """The tags of a set that are not in another one, as a set."""
    return _native.tags_without(tags, others)
