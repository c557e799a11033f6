"""Pages in an engine's memory, and the native calls that move them to and from records.

A *page* lies in the engine's memory as one or more *segments* (K and V, or one a layer). A *record*
is the same bytes in one contiguous buffer, as tiers keep it. `gather`, `scatter` and `checksums` are
one native call for a whole batch each, and hold the GIL only to read their arguments.

A checksum is XXH3-64 of the record, seeded with XXH3-64 of the page's key: whole bytes that lie under
another page's key do not verify.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from . import _native

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class PageSegments:
    """Where the bytes of some pages lie.

    Attributes:
        addresses: first byte of each segment, page after page, ``per_page`` entries a page.
        sizes: bytes of each segment, in the same order.
        per_page: segments of one page, the same for all pages of a batch.
        owner: whatever must stay alive for the addresses to stay valid.

    The maker guarantees that the addresses stay valid while a call that was given them runs.
    """

    addresses: Sequence[int]
    sizes: Sequence[int]
    per_page: int
    owner: object = None

    def __post_init__(self) -> None:
        if self.per_page < 1 or len(self.addresses) % self.per_page:
            raise ValueError(
                f"{len(self.addresses)} addresses do not divide into pages of {self.per_page}"
            )
        if len(self.sizes) != len(self.addresses):
            raise ValueError(f"{len(self.addresses)} addresses but {len(self.sizes)} sizes")

    @classmethod
    def of_buffers(cls, buffers: Sequence[Buffer], *, writable: bool = False) -> PageSegments:
        """One segment a page: each buffer is a whole page."""
        addresses = [_native.address_of(buffer, writable) for buffer in buffers]
        return cls(addresses, [memoryview(buffer).nbytes for buffer in buffers], 1, buffers)

    def __len__(self) -> int:
        return len(self.addresses) // self.per_page

    def page_bytes(self) -> list[int]:
        """Bytes of each page."""
        n = self.per_page
        return [sum(self.sizes[i : i + n]) for i in range(0, len(self.sizes), n)]

    def select(self, pages: Sequence[int]) -> PageSegments:
        """The given pages, by index, in the given order."""
        n = self.per_page
        if len(pages) == len(self) and all(i == page for i, page in enumerate(pages)):
            return self
        at = list(chain.from_iterable(range(page * n, page * n + n) for page in pages))
        return PageSegments(
            [self.addresses[i] for i in at], [self.sizes[i] for i in at], n, self.owner
        )


def gather(keys: Sequence[bytes], pages: PageSegments, records: Sequence[Buffer]) -> list[int]:
    """Copy each page into its record and return the records' checksums.

    Raises:
        ValueError: the counts differ, or a record is not as long as its page; nothing was copied.
        BufferError: a record is not writable.
    """
    return _native.gather_pages(
        list(keys), list(records), pages.addresses, pages.sizes, pages.per_page
    )


def scatter(
    keys: Sequence[bytes],
    records: Sequence[Buffer],
    checksums: Sequence[int],
    pages: PageSegments,
) -> list[bool]:
    """Copy each record whose length and checksum hold into its page; say which did.

    A page whose record does not verify is left as it was.

    Raises:
        ValueError: the counts differ; nothing was copied.
    """
    return _native.scatter_pages(
        list(keys), list(records), checksums, pages.addresses, pages.sizes, pages.per_page
    )


def place(records: Sequence[Buffer], pages: PageSegments) -> None:
    """Copy each record into its page: bytes that this process made of verified ones.

    Raises:
        ValueError: the counts differ, or a record is not as long as its page; nothing was copied.
    """
    _native.place_pages(list(records), pages.addresses, pages.sizes, pages.per_page)


def checksums(keys: Sequence[bytes], records: Sequence[Buffer]) -> list[int]:
    """The checksum of each record under its key."""
    return _native.checksum_pages(list(keys), list(records))
