"""From settings to an open store."""

from __future__ import annotations

import logging

from .config import Config
from .errors import ConfigError
from .storage.base import Tier
from .storage.chain import Chain
from .storage.cpu import CpuTier
from .storage.disk.tier import DiskTier

logger = logging.getLogger(__name__)

SPILL_SHARE = 0.25  # of cpu.size, for pages on their way to the disk


def open_chain(config: Config, *, sharers: int = 1) -> Chain:
    """Open the tiers that the settings ask for.

    Args:
        sharers: engine processes on this node that open the same settings; the CPU tier of each gets
            an equal part of `cpu.size`. The disk tier is one for all of them.

    Raises:
        ConfigError: names the setting that cannot be used.
    """
    memory = config.cpu.bytes() // max(1, sharers)
    disk_size = config.disk.bytes(config.directory)
    disk = DiskTier(config.directory, disk_size) if config.disk.size != 0 else None
    waiting = int(memory * SPILL_SHARE) if disk else 0
    cpu = CpuTier(memory - waiting) if config.cpu.size != 0 else None
    logger.info(
        "lmcache: cpu tier %s, disk tier %s",
        f"{memory / 1e9:.2f} GB" if cpu else "off",
        f"{disk_size / 1e9:.2f} GB in {config.directory}" if disk else "off",
    )
    return Chain(cpu, disk, spill_bytes=waiting)


def require_room(chain: Chain, page_bytes: int) -> None:
    """Raise `ConfigError` when the chain of `open_chain` cannot keep even one page of this size."""
    for tier in chain.fits(page_bytes):
        raise _too_small(tier, page_bytes, tier.capacity, "for pages")
    upper, *lower = chain.tiers
    waiting = int(upper.capacity * SPILL_SHARE / (1 - SPILL_SHARE))
    if lower and page_bytes > waiting:  # it would never be written to the disk
        raise _too_small(upper, page_bytes, waiting, "for pages on their way to the disk")


def _too_small(tier: Tier, page_bytes: int, room: int, purpose: str) -> ConfigError:
    return ConfigError(
        f"{tier.name}.size",
        f"pages of this model take {page_bytes} bytes, and the {room} bytes there are {purpose} "
        "cannot keep one in use; give it more, or 0 to turn the tier off",
    )
