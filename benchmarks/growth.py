"""What lookup, insert and eviction cost as the index of our store grows.

Runs in a worker with our environment. Pages are the smallest there are, so the index is what is timed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.subjects import ours
from benchmarks.subjects.base import SubjectError, addresses, arena
from benchmarks.wire import Message

BATCH = 128
FILL = BATCH  # pages of one call while filling: what an engine puts
MOST_OF_FREE = 0.75
SAMPLES = 100  # batches timed
SPARE = (SAMPLES + 8) * BATCH  # pages that fit beside those of the fill


def measure(medium: str, directory: Path, count: int) -> Message:
    """Fill a store with `count` pages and time it."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count()
    _require_room(medium, directory, ours.index_capacity(medium, count + SPARE))
    with ours.index(medium, directory, count + SPARE) as index:
        memory = arena(FILL, index.page_bytes)  # named, so that it stays
        pages = ours.segments(addresses(memory), index.page_bytes)

        def insert(keys: list[bytes]) -> None:
            index.insert(keys, pages.select(range(len(keys))))

        for size in _pieces(count, FILL):
            insert(list(itertools.islice(_keys(numbers), size)))
        lookup = _time(index.lookup, (_some(count) for _ in range(SAMPLES)))
        fresh = (list(itertools.islice(_keys(numbers), BATCH)) for _ in itertools.count())
        inserted = _time(insert, itertools.islice(fresh, SAMPLES))
        evict = _evicting(index, insert, numbers)
        used = index.index_bytes_per_page
        beside = index.bytes_beside_pages / (count + SPARE)
    return {
        "lookup": statistics.median(lookup),
        "lookup_p99": _p99(lookup),
        "insert": statistics.median(inserted),
        "insert_p99": _p99(inserted),
        "evict": statistics.median(evict),
        "index_bytes": used,
        "beside_bytes": beside,
    }


def _key(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def _keys(numbers: Iterator[int]) -> Iterator[bytes]:
    return map(_key, numbers)


def _some(count: int) -> list[bytes]:
    return [_key(random.randrange(count)) for _ in range(BATCH)]


def _pieces(count: int, most: int) -> Iterator[int]:
    while count:
        piece = min(count, most)
        yield piece
        count -= piece


def _time(call: Callable[[list[bytes]], object], batches: Iterable[list[bytes]]) -> list[float]:
    """Microseconds a key, of each batch."""
    found = []
    for batch in batches:
        start = time.perf_counter()
        call(batch)
        found.append((time.perf_counter() - start) / len(batch) * 1e6)
    return found


def _evicting(
    index: ours.Index | ours.BareIndex,
    insert: Callable[[list[bytes]], None],
    numbers: Iterator[int],
) -> list[float]:
    """The same for inserts that evict: those after the store has become full."""
    keys = _keys(numbers)
    while not index.evicted:
        insert(list(itertools.islice(keys, FILL)))
    return _time(insert, (list(itertools.islice(keys, BATCH)) for _ in range(SAMPLES)))


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99) - 1]


def _require_room(medium: str, directory: Path, size: int) -> None:
    """Leave some of what is free: the machine is not ours alone."""
    free = shutil.disk_usage(directory).free
    if medium != "nvme":
        free = min(free, _available_memory())
    if size > free * MOST_OF_FREE:
        raise SubjectError(f"it takes {size >> 20:,} MiB and {free >> 20:,} MiB are free")


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise SubjectError("/proc/meminfo does not say how much memory is available")
