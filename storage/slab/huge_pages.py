"""Whether the kernel gives huge pages to shared memory when it is asked."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

# https://docs.kernel.org/admin-guide/mm/transhuge.html, "Shmem / internal tmpfs"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_GIVEN = ("[always]", "[within_size]", "[advise]", "[force]")


def asked_for(wanted: bool, switch: Path = SWITCH) -> bool:
    """Whether to ask for them. Says once, in the log, why not when they were wanted."""
    if not wanted:
        return False
    setting = switch.read_text().strip() if switch.is_file() else "no such switch"
    if any(given in setting for given in _GIVEN):
        return True
    logger.warning(
        "lmcache: no huge pages: %s says %r; as root, write `advise` into it", switch, setting
    )
    return False
