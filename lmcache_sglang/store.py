"""From settings to an open store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .config import Config
from .errors import ConfigError
from .kernels.pages import PageSegments
from .peering import Peering
from .storage.admission import Admission, All, MinimumPrefix, SecondTouch
from .storage.base import NO_LIMITS, Below, CheckReport, Limits, Tier, TierStats
from .storage.chain import CLOSE_SECONDS, Chain
from .storage.slab import filesystem
from .storage.slab.opening import Place
from .storage.slab.plan import SLABS_WANTED
from .storage.slab.settings import SlabSettings
from .storage.slab.tier import SlabTier

if TYPE_CHECKING:
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

Memory = PageSegments | Sequence["Buffer"]


class Store:
    """Pages by key, in the tiers that the settings ask for. For use by hand, tests and benchmarks.

    A key is `storage.base.page_key(namespace, page_hash)`, 48 bytes. Pages are buffers, one a page, or
    `PageSegments`. No call raises for what the world does to a tier: that is a miss, and counted in
    `faults`.

    Raises:
        ConfigError: names the setting that cannot be used.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._chain = open_chain(config or Config.load())

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which pages are here, in any tier."""
        return self._chain.exists(keys)

    def get(
        self,
        keys: Sequence[bytes],
        into: Memory,
        *,
        parent: bytes = b"",
        limits: Limits = NO_LIMITS,
    ) -> list[bool]:
        """Copy pages into writable memory; which of them it now holds, verified.

        Args:
            keys: one run of a chain, in its order.
            parent: the key of the page before it.
            limits: a deadline, and a way to cancel from another thread: `Limits.within(seconds)`.
        """
        segments = _segments(into, writable=True)
        return self._chain.get(keys, segments, parent=parent, limits=limits)

    def put(
        self,
        keys: Sequence[bytes],
        pages: Memory,
        *,
        parent: bytes = b"",
        position: int = 0,
        limits: Limits = NO_LIMITS,
    ) -> list[bool]:
        """Keep copies of pages; which of them are here afterwards.

        Args:
            keys: one run of a chain, in its order.
            parent: the key of the page before it.
            position: of its first page in the chain.
            limits: as of `get`.
        """
        segments = _segments(pages, writable=False)
        return self._chain.put(keys, segments, parent=parent, position=position, limits=limits)

    def pin(self, keys: Sequence[bytes], seconds: float) -> None:
        """Keep pages that are here, and so their ancestors, for so long; 0 ends it. Raises: TierError."""
        for tier in self._slabs():
            tier.pin(keys, seconds)

    def set_quota(self, namespace: bytes, size: int) -> None:
        """The most bytes of one namespace in each tier; 0: no limit of its own. Raises: TierError."""
        for tier in self._slabs():
            tier.set_quota(namespace, size)

    def clear(self, namespace: bytes) -> int:
        """Forget every page of one namespace; how many there were. Raises: TierError: some are still there."""
        return self._chain.clear(namespace)

    def flush(self, timeout: float) -> bool:
        """Wait until what was put is in the lowest tier; False when time ran out (seconds)."""
        return self._chain.flush(timeout)

    def check(self, *, repair: bool = False) -> dict[str, CheckReport]:
        """Walk index and slots of each tier and verify every page. Raises: TierError."""
        return self._chain.check(repair=repair)

    def stats(self) -> list[TierStats]:
        return self._chain.stats()

    def faults(self) -> dict[str, int]:
        """``"tier.reason"`` -> how often it happened since the store was opened."""
        return self._chain.faults.counts()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Write what waits, for up to so many seconds, and let go. Idempotent."""
        self._chain.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _slabs(self) -> list[SlabTier]:
        return [tier for tier in self._chain.tiers if isinstance(tier, SlabTier)]


def _segments(memory: Memory, *, writable: bool) -> PageSegments:
    if isinstance(memory, PageSegments):
        return memory
    return PageSegments.of_buffers(list(memory), writable=writable)


def open_chain(config: Config) -> Chain:
    """Open the tiers that the settings ask for, and the way to other nodes.

    Raises:
        ConfigError: names the setting that cannot be used.
    """
    with ExitStack() as undo:
        upper, lower = open_tiers(config)
        for tier in (upper, lower):
            if tier is not None:
                undo.callback(tier.close)
        peers = None
        if config.peers is not None:
            peers = Peering(config, config.peers)
            undo.callback(peers.close)
        chain = Chain(
            upper,
            lower,
            admission=admission_of(config),
            promotion=config.disk.promotion,
            peers=peers,
        )
        undo.pop_all()
    return chain


def open_tiers(config: Config) -> tuple[SlabTier | None, SlabTier | None]:
    """This node's own tiers: memory and disk. Raises: ConfigError, also where there is neither."""
    with ExitStack() as undo:
        lower = _open_disk(config)
        if lower is not None:
            undo.callback(lower.close)
        upper = _open_cpu(config, lower)
        if upper is None and lower is None:
            raise ConfigError(
                "cpu.size",
                "/dev/shm is too small for a CPU tier of automatic size, and disk.size is 0; "
                "make it larger (--shm-size, or --ipc=host) or give a size",
            )
        undo.pop_all()
    return upper, lower


def _open_disk(config: Config) -> SlabTier | None:
    if config.disk.size == 0:
        return None
    size = config.disk.bytes(config.directory)  # too little, of a full disk, is refused below
    settings = SlabSettings(
        eviction=config.disk.eviction,
        durable=config.disk.durability == "durable",
        queue_depth=config.disk.queue_depth,
        engine=config.disk.engine,
        direct=config.disk.direct,
    )
    place = Place(config.directory, memory=False, path_setting="path", size_setting="disk.size")
    return SlabTier(place, size, settings, name="disk")


def _open_cpu(config: Config, lower: SlabTier | None) -> SlabTier | None:
    directory = config.cpu.directory(config.directory)
    size = config.cpu.bytes(directory) if config.cpu.size != 0 else 0
    if size == 0:
        if config.cpu.size != 0:
            logger.warning(
                "lmcache: no CPU tier: %s has too little room for one; make it larger (--shm-size, or "
                "--ipc=host), or set cpu.size",
                directory.parent,
            )
        return None
    settings = SlabSettings(
        eviction=config.cpu.eviction, threads=config.cpu.threads, huge_pages=config.cpu.huge_pages
    )
    place = Place(directory, memory=True, path_setting="cpu.path", size_setting="cpu.size")
    below = Below.NEVER if lower is None else admission_of(config).below(1 << 30, 1)
    tier = SlabTier(place, size, settings, name="cpu", below=below)
    mount = filesystem.mount_of(directory)
    if mount.kind not in filesystem.MEMORY:
        logger.warning(
            "lmcache: cpu.path: %s is on %s (at %s), which is no memory: every page put there is written to "
            "a disk; give a directory in /dev/shm",
            directory,
            mount.kind,
            mount.point,
        )
    return tier


def admission_of(config: Config) -> Admission:
    disk = config.disk
    chosen: Admission = SecondTouch() if disk.admission == "second-touch" else All(disk.mode)
    return MinimumPrefix(disk.minimum_prefix, chosen) if disk.minimum_prefix else chosen


def require_room(chain: Chain, page_bytes: int) -> None:
    """Raise `ConfigError` when a tier of `open_chain` cannot keep even one page of this size."""
    for tier in chain.fits(page_bytes):
        raise _too_small(tier, page_bytes)


def _too_small(tier: Tier, page_bytes: int) -> ConfigError:
    slab = tier.head.slab_bytes if isinstance(tier, SlabTier) else tier.capacity
    return ConfigError(
        f"{tier.name}.size",
        f"pages of this model take {page_bytes} bytes, and the largest that {tier.capacity} bytes can keep "
        f"take {slab}; give it at least {SLABS_WANTED * page_bytes * 2}, or 0 to turn the tier off. A store "
        "that was made smaller before keeps its slabs: delete its directory",
    )
