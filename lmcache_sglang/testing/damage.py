"""Bit rot on demand: change one stored byte behind a tier's back, as a failing medium would."""

from __future__ import annotations

from ..storage.cpu import CpuTier
from ..storage.disk.tier import DiskTier


def flip_in_cpu(tier: CpuTier, key: bytes) -> bool:
    """Flip the lowest bit of a page's last byte; whether the page was there."""
    record = tier._records.get(key)
    if record is None:
        return False
    record.data[-1] ^= 1
    return True


def flip_on_disk(tier: DiskTier, key: bytes) -> bool:
    """Flip the lowest bit of a page's last byte; whether the page was there."""
    with tier._env.write() as txn:
        found = txn.get(key, db=tier._env.tables.pages)
        if found is None:
            return False
        data = bytearray(found)
        data[-1] ^= 1
        txn.put(key, data, db=tier._env.tables.pages)
    return True
