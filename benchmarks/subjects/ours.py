"""Our store: the slab tier, in memory and on disk. All that the benchmarks know about it is in this file."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from benchmarks.bare_store import BYTES_A_PAGE, bare_store
from benchmarks.subjects.base import Batch, Options, Subject, SubjectError, addresses, drop_files
from lmcache_sglang import Config, Store
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import Lookup, Stored, page_key
from lmcache_sglang.storage.slab import files, plan
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.plan import BLOCK, Plan
from lmcache_sglang.storage.slab.settings import SlabSettings
from lmcache_sglang.storage.slab.tier import SlabTier

if TYPE_CHECKING:
    from lmcache_sglang.storage._native import SlabStore

NAMESPACE = hashlib.sha256(b"benchmarks").digest()[:16]
SPARE = 2  # times the bytes of a round: what a store is given, so that none evicts by accident
LEAST = 64 << 20
ALONE = "index alone"  # a medium that keeps nothing
DEPTH = SlabSettings().queue_depth  # of our reads and writes; raw direct I/O is measured at it too

Outcome = TypeVar("Outcome", Stored, Lookup)


def _open(
    medium: str, directory: Path, size: int, threads: int = SlabSettings().threads
) -> SlabTier:
    """The tier of a medium (`dram`, `nvme`) in a directory, with `size` bytes."""
    place = Place(directory / "store", memory=medium == "dram")
    return SlabTier(place, size, SlabSettings(threads=threads), name=medium)


def bytes_for(pages: int) -> int:
    """The least capacity whose index has room for so many pages of the smallest size."""
    size = max(LEAST, pages * BLOCK)
    while Plan.of(size).pages_most < pages:
        size += size // 64
    return size


def require(outcome: list[Outcome], wanted: Outcome) -> None:
    """Raise unless each page met its one good end."""
    if outcome.count(wanted) != len(outcome):
        worst = next(each for each in outcome if each is not wanted)
        raise SubjectError(f"{worst} where {wanted} was expected")


def segments(rows_at: Sequence[int], page_bytes: int) -> PageSegments:
    """One segment a page."""
    return PageSegments(rows_at, [page_bytes] * len(rows_at), 1)


@dataclass(frozen=True)
class _Call:
    keys: list[bytes]
    source: PageSegments
    target: PageSegments


class _Ours(Subject):
    """What the store and its tiers have in common: calls that are made ready before the clock starts."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        all_pages = options.pages * options.workers
        self._size = max(bytes_for(all_pages), all_pages * options.page_bytes * SPARE)
        self._namespace = NAMESPACE[:-1] + bytes([options.rank])  # each worker's own
        self._calls: dict[bytes, _Call] = {}

    def prepare(self, batch: Batch) -> None:
        size = self.options.page_bytes
        self._calls[batch.keys[0]] = _Call(
            [page_key(self._namespace, key) for key in batch.keys],
            segments(addresses(batch.source), size),
            segments(addresses(batch.target), size),
        )

    def exists(self, batch: Batch) -> int:
        here = self._exist(self._calls[batch.keys[0]].keys)
        return here.index(False) if False in here else len(here)

    @abstractmethod
    def _exist(self, keys: list[bytes]) -> list[bool]: ...


class _Tier(_Ours):
    medium: ClassVar[str]

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._tier = _open(self.medium, options.directory, self._size, options.threads)

    def version(self) -> str:
        return f"lmcache-sglang {version('lmcache-sglang')}, {type(self._tier).__name__}"

    def put(self, batch: Batch) -> None:
        call = self._calls[batch.keys[0]]
        require(self._tier.put(call.keys, call.source), Stored.STORED)

    def get(self, batch: Batch) -> None:
        call = self._calls[batch.keys[0]]
        require(self._tier.get(call.keys, call.target), Lookup.HIT)

    def _exist(self, keys: list[bytes]) -> list[bool]:
        return self._tier.exists(keys)

    def forget(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._tier.remove(self._calls.pop(batch.keys[0]).keys)

    def close(self) -> None:
        self._tier.close()


class OursDram(_Tier):
    medium: ClassVar[str] = "dram"
    setup: ClassVar[str] = (
        "SlabTier in /dev/shm, its own copy threads as many as said, else default settings; checksums "
        "verified on every read"
    )
    durable: ClassVar[str] = "in memory, outlives the process"


class OursNvme(_Tier):
    medium: ClassVar[str] = "nvme"
    setup: ClassVar[str] = (
        f"SlabTier in a file, default settings (direct I/O, depth {DEPTH}); checksums verified on every read"
    )
    durable: ClassVar[str] = "the store itself, before put returns"

    def drop_cache(self) -> None:
        drop_files(self.data_files())

    def data_files(self) -> list[Path]:
        return [self.options.directory / "store" / files.REGION]


class OursStore(_Ours):
    """`Store`, as a program that uses the package has it."""

    setup: ClassVar[str] = (
        "Store with its memory tier, default settings: SlabTier behind the chain that turns failures into "
        "misses; checksums verified on every read"
    )
    durable: ClassVar[str] = "in memory, outlives the process"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        memory = {"size": self._size, "path": str(options.directory / "store")}
        settings = {"path": str(options.directory / "none"), "cpu": memory, "disk": {"size": 0}}
        self._store = Store(Config.of(settings))

    def version(self) -> str:
        return f"lmcache-sglang {version('lmcache-sglang')}, Store"

    def put(self, batch: Batch) -> None:
        call = self._calls[batch.keys[0]]
        self._require(self._store.put(call.keys, call.source), "kept")

    def get(self, batch: Batch) -> None:
        call = self._calls[batch.keys[0]]
        self._require(self._store.get(call.keys, call.target), "read")

    def _exist(self, keys: list[bytes]) -> list[bool]:
        return self._store.exists(keys)

    def forget(self, batches: Sequence[Batch]) -> None:
        self._calls.clear()
        self._store.clear(self._namespace)

    def close(self) -> None:
        self._store.close()

    def _require(self, outcome: list[bool], what: str) -> None:
        if not all(outcome):
            raise SubjectError(
                f"{outcome.count(False)} pages were not {what}: {self._store.faults()}"
            )


class Index:
    """A store full of the smallest pages, to time its index; see benchmarks/growth.py."""

    page_bytes = BLOCK

    def __init__(self, tier: SlabTier, directory: Path) -> None:
        self._tier = tier
        self._directory = directory / "store"

    def insert(self, keys: Sequence[bytes], pages: PageSegments) -> None:
        require(self._tier.put([page_key(NAMESPACE, key) for key in keys], pages), Stored.STORED)

    def lookup(self, keys: Sequence[bytes]) -> int:
        return sum(self._tier.exists([page_key(NAMESPACE, key) for key in keys]))

    @property
    def evicted(self) -> int:
        return self._tier.stats().evicted

    @property
    def index_bytes_per_page(self) -> float:
        """What the index uses of its file, old versions of its nodes included."""
        counts = self._tier.counts()
        return counts["index_bytes"] / counts["pages"]

    @property
    def bytes_beside_pages(self) -> int:
        """Of all files but the one with the pages; they are allocated in full from the start."""
        return _allocated(p for p in self._directory.iterdir() if p.name != files.REGION)


@contextmanager
def _planned_for_small_pages() -> Iterator[None]:
    """A store is planned for pages of 16 KiB and more. What is timed here is the index: let the plan be for
    pages as small as its slots.
    """
    before = plan.PAGE_USUAL
    plan.PAGE_USUAL = BLOCK
    try:
        yield
    finally:
        plan.PAGE_USUAL = before


def _allocated(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_blocks * 512 for path in paths)


class BareIndex:
    """As `Index`, of a store that keeps no pages: with room for more than memory or disk have."""

    page_bytes = BLOCK

    def __init__(self, store: SlabStore, directory: Path) -> None:
        self._store = store
        self._directory = directory

    def insert(self, keys: Sequence[bytes], pages: PageSegments) -> None:
        named = [page_key(NAMESPACE, key) for key in keys]
        sizes, per_page = pages.sizes, pages.per_page
        codes = self._store.put(named, pages.addresses, sizes, per_page, None, None, "never", 60.0)
        if any(codes):
            raise SubjectError("a page was not taken")

    def lookup(self, keys: Sequence[bytes]) -> int:
        return sum(self._store.exists([page_key(NAMESPACE, key) for key in keys]))

    @property
    def evicted(self) -> int:
        return self._store.counts()["evicted"]

    @property
    def index_bytes_per_page(self) -> float:
        counts = self._store.counts()
        return counts["index_bytes"] / counts["pages"]

    @property
    def bytes_beside_pages(self) -> int:
        return _allocated(self._directory.iterdir())


def index_capacity(medium: str, room: int) -> int:
    """Bytes that `index` takes."""
    if medium == ALONE:
        return room * BYTES_A_PAGE
    with _planned_for_small_pages():
        return bytes_for(room)


@contextmanager
def index(medium: str, directory: Path, room: int) -> Iterator[Index | BareIndex]:
    """An empty store with room for so many of the smallest pages, and then it evicts."""
    if medium == ALONE:
        yield BareIndex(bare_store(directory, room), directory)
        return
    with _planned_for_small_pages():
        tier = _open(medium, directory, bytes_for(room))
    try:
        yield Index(tier, directory)
    finally:
        tier.close()
