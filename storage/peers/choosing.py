"""Which peer to ask for which page: so that the last page comes as soon as possible.

Each page goes to the holder that would be done with it first, by what it takes to answer, what waits there and how fast
it delivers (list scheduling). One request so comes from several peers where that is faster, and from one where another
one would take longer to answer than to be done without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a peer is thought to take.

    Attributes:
        latency: seconds to the first byte.
        load: bytes that wait there for others.
        rate: bytes a second.
    """

    latency: float
    load: int
    rate: float

    @property
    def start(self) -> float:
        return self.latency + self.load / self.rate


def choose(
    holders: Sequence[int], sizes: Sequence[int], peers: Mapping[int, Estimate]
) -> dict[int, list[int]]:
    """The pages to ask of each peer, in their order.

    Args:
        holders: of each page a mask of the numbers of those that have it; pages of nobody among `peers` are left out.
        sizes: bytes of each page.
    """
    ready = {number: estimate.start for number, estimate in peers.items()}
    chosen: dict[int, list[int]] = {}
    numbers: dict[int, list[int]] = {}  # of a mask, as most pages have the same
    for page, (mask, size) in enumerate(zip(holders, sizes, strict=True)):
        if mask not in numbers:
            numbers[mask] = [number for number in peers if mask >> number & 1]
        if not numbers[mask]:
            continue
        done = {n: ready[n] + size / peers[n].rate for n in numbers[mask]}
        best = min(done, key=done.__getitem__)
        ready[best] = done[best]
        chosen.setdefault(best, []).append(page)
    return chosen


def deal(pages: Sequence[int], sizes: Sequence[int], streams: int, least: int) -> list[list[int]]:
    """Share a peer's pages out among its connections, about equally many bytes each.

    Args:
        least: bytes below which another connection is not worth it.
    """
    total = sum(sizes[page] for page in pages)
    count = max(1, min(streams, len(pages), total // max(1, least)))
    shares: list[list[int]] = [[] for _ in range(count)]
    taken = 0
    for page in pages:
        shares[min(count - 1, taken * count // max(1, total))].append(page)
        taken += sizes[page]
    return [share for share in shares if share]
