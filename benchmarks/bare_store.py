"""The slab store without a medium: index, slots and policy are real, pages are not kept."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from lmcache_sglang.storage import _native
from lmcache_sglang.storage.slab import files
from lmcache_sglang.storage.slab.plan import BLOCK, SLACK_MOST, Plan
from lmcache_sglang.storage.slab.settings import Eviction

SLAB_BYTES = 1 << 20
INDEX_BYTES_A_PAGE = 256
BYTES_A_PAGE = INDEX_BYTES_A_PAGE + 64 + 8  # with its slot in the control block, and its ghost


def bare_store(directory: Path, pages: int, eviction: Eviction = "sieve") -> _native.SlabStore:
    """A store for so many pages of up to 4 KiB, rounded up to whole slabs; its files are in `directory`."""
    slots = SLAB_BYTES // BLOCK
    plan = Plan(SLAB_BYTES, slots, -(-pages // slots), ghosts=max(256, pages))
    control = os.open(directory / files.CONTROL, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(control, 0, plan.control_bytes)
    finally:
        os.close(control)
    return _native.SlabStore(
        {
            "directory": str(directory),
            "medium": "none",
            "alone": True,
            "slab_bytes": plan.slab_bytes,
            "slabs": plan.slabs,
            "slots_per_slab": plan.slots_per_slab,
            "ghosts": plan.ghosts,
            "index_bytes": INDEX_BYTES_A_PAGE * plan.slabs * slots + SLACK_MOST,
            "pages_most": plan.slabs * slots,
            "sync": "volatile",
            "policy": eviction,
            "below": "never",
            "threads": 1,
            "huge_pages": False,
            "queue_depth": 1,
            "engine": "threads",
            "direct": True,
            "id": secrets.token_bytes(16),
        }
    )
