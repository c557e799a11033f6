"""Damage behind a store's back."""

from __future__ import annotations

import os

from ..storage.slab import files
from ..storage.slab.tier import SlabTier


def region_offset(tier: SlabTier, content: bytes) -> int:
    """Where a page lies in the region, found by its first bytes. Raises: ValueError, it is not there."""
    region = (tier.directory / files.REGION).read_bytes()
    return region.index(content[: min(len(content), 512)])


def flip(tier: SlabTier, content: bytes, at: int = 0) -> None:
    """Change one byte of a stored page, in its file or its memory, and nothing else."""
    offset = region_offset(tier, content) + at
    file = os.open(tier.directory / files.REGION, os.O_RDWR)
    try:
        (byte,) = os.pread(file, 1, offset)
        os.pwrite(file, bytes([byte ^ 0x10]), offset)
        os.fsync(file)
    finally:
        os.close(file)
