"""Kernel or copy engine, and how much of the GPU a copy may use.

The figures are computed from what is published of the hardware, or assumed; none was measured by us.
`benchmarks/gpu_check.py` measures both ways side by side, and is what they should be set by.
"""

from __future__ import annotations

from enum import Enum

# PCIe 5.0 x16 moves about 55 GB/s (of 63 by its clock), so 64 KiB take 1.2 us.
# Assumed: 0.25 us of an engine's time for each copy of a batch, and 2.5 us for a call of its own.
SHORTEST_OF_A_BATCH = 64 << 10  # bytes; the engine is then busy moving for 5/6 of the time
SHORTEST_ALONE = 640 << 10  # the same share
# A run costs Python and the driver together about 1 us (assumed) of the thread that asks.
MOST_RUNS = 4096

# To keep a link of 55 GB/s busy at 1.5 us a read (assumed), 82 KB must be under way; a block of 256 threads has
# 4 words of 16 bytes for each, 16 KiB. 32 blocks are six times that, and a sixteenth of what an H100 runs at a time
# (132 SMs of 4 blocks).
BLOCKS_OVER_A_LINK = 32
BLOCKS_AN_SM = 4  # within a GPU: all of it, 64 KiB under way in each SM


class Way(Enum):
    """Who moves the bytes."""

    KERNEL = "kernel"
    ENGINE = "copy engine"


def choose(*, converts: bool, bytes_moved: int, runs: int, over_link: bool, batched: bool) -> Way:
    """Who moves the bytes of one copy.

    A copy engine takes nothing from the SMs, which attention is using, and nothing from caches; but it pays for
    each contiguous run apart, and it can convert nothing. So it gets copies over the link whose runs are long
    enough to hide that: whole pages of page_first and page_first_direct on both sides, or vLLM's blocks of all layers.
    Between two places of one GPU the SMs are faster than an engine.

    Args:
        converts: numbers become others on the way.
        bytes_moved: of the whole copy.
        runs: contiguous pieces of it.
        over_link: one side is memory of the host.
        batched: the driver takes many copies in one call (`cuMemcpyBatchAsync`, CUDA 13).
    """
    if converts or not over_link or runs == 0 or runs > MOST_RUNS:
        return Way.KERNEL
    shortest = SHORTEST_OF_A_BATCH if batched else SHORTEST_ALONE
    return Way.ENGINE if bytes_moved // runs >= shortest else Way.KERNEL


def blocks_for(*, over_link: bool, sms: int) -> int:
    """How many blocks a kernel gets: no more over a link than keep it busy, so that attention has the rest."""
    return min(BLOCKS_OVER_A_LINK, BLOCKS_AN_SM * sms) if over_link else BLOCKS_AN_SM * sms
