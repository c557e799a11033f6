"""What it costs to ask which peers hold a page, of as many as a node may have.

    python -m benchmarks.lookups                          64 peers with a million pages each, 1.5 GiB
    python -m benchmarks.lookups --peers 8 --pages 100000

The peers are simulated: random tags, put into a directory as their summaries would be. Times are of whole
calls from Python, a list of keys in and a list of answers out; the median batch and the 99th of 100.
Every answer is checked. Beside it a dict of the same keys, with fewer of them, and the index of our own
store, with fewer still.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.subjects import ours
from benchmarks.subjects.base import addresses, arena
from lmcache_sglang.storage.base import NAMESPACE_BYTES, PAGE_HASH_BYTES
from lmcache_sglang.storage.peers import tags as sets
from lmcache_sglang.storage.peers.directory import (
    EVERYBODY,
    Directory,
    DirectoryView,
    PeerRecord,
)
from lmcache_sglang.storage.peers.keys import NO_KEYS
from lmcache_sglang.storage.peers.standing import Standing
from lmcache_sglang.storage.peers.tier import HEAD, PeerLimits, PeerTier

MEMORY = Path("/dev/shm")
BATCHES = (1, 16, 128, 4096)
KEYS = 1 << 20  # asked for, of each kind: far more than the caches hold the words of
CACHES = 256 << 20  # bytes that leave nothing in them but themselves
CALLS_MOST = 4000  # of one batch size
CHUNK = 1 << 16  # tags of one put, about what a summary's message holds
DICT_KEYS = 1 << 20
INDEX_KEYS = 50_000
FILL = 128
MOST_BYTES = 4 << 30

Ask = Callable[[list[bytes]], list[bool]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds a key."""

    median: float
    p99: float

    def __str__(self) -> str:
        return f"{self.median:6.3f} {self.p99:7.3f}"


def main() -> int:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="lmcache-lookups-", dir=MEMORY) as folder:
        print("us a key: median, p99; by keys a call      " + _row(f"{n:14}" for n in BATCHES))
        _directory(Path(folder), options.peers, options.pages, shared=False)
        _directory(Path(folder), options.peers, options.pages, shared=True)
        _dict()
        _index(Path(folder))
    return 0


def _directory(folder: Path, peers: int, pages: int, *, shared: bool) -> None:
    """Every peer with pages of its own, or all with the same ones."""
    with _opened(folder) as (directory, view):
        started = time.perf_counter()
        sample = _fill(directory, peers, pages, shared)
        seconds = time.perf_counter() - started
        view.refresh()
        name = f"pages that all {peers} peers hold" if shared else "hits, each page of one peer"
        _show(name, view.exists, _keys_of(sample), True)
        _show(f"{name}, holders", lambda keys: _asked(view, keys), _keys_of(sample), True)
        _show("misses beside them", view.exists, _keys_of(os.urandom(len(sample))), False)
        with closing(PeerTier(folder, NO_KEYS, PeerLimits())) as tier:

            def ask(keys: list[bytes]) -> list[bool]:
                directory.beat()
                return tier.exists(keys)

            _show("hits, as a chain asks its tier", ask, _keys_of(sample), True)
            _show("misses, the same", ask, _keys_of(os.urandom(len(sample))), False)
        stats = directory.stats()
        print(
            f"  {stats.live:,} words, {stats.live / stats.words:.0%} of {stats.bytes / 1e9:.2f} GB, "
            f"{stats.bytes / stats.live:.1f} bytes each; put {stats.live / seconds / 1e6:.1f} M/s; "
            f"left out {stats.left_out}"
        )
        started = time.perf_counter()
        directory.forget(0)
        print(f"  forget a peer: {time.perf_counter() - started:.2f} s")


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[Directory, DirectoryView]]:
    directory = Directory.create(folder / HEAD, MOST_BYTES)
    view = DirectoryView(folder / HEAD, silent_seconds=3600)
    try:
        yield directory, view
    finally:
        view.close()
        directory.close()


def _fill(directory: Directory, peers: int, pages: int, shared: bool) -> bytes:
    """Some of the tags put, of all peers."""
    chunks = [min(CHUNK, pages - first) for first in range(0, pages, CHUNK)]
    same = [os.urandom(count * sets.TAG_BYTES) for count in chunks] if shared else []
    share = max(1, KEYS // (peers * len(chunks))) * sets.TAG_BYTES
    sample = b""
    for peer in range(peers):
        for number, count in enumerate(chunks):
            tags = same[number] if shared else os.urandom(count * sets.TAG_BYTES)
            directory.put(peer, tags)
            start = peer * share % max(1, len(tags) - share) // sets.TAG_BYTES * sets.TAG_BYTES
            sample += tags[start : start + share]
        record = PeerRecord(f"peer-{peer}", f"tcp://127.0.0.1:{1 + peer}", b"", Standing.LIVE, 1, 1)
        directory.set_record(peer, record)
        directory.believe(peer)
    return sample


def _keys_of(tags: bytes) -> list[bytes]:
    """Keys with these tags, in any order."""
    rest = bytes(PAGE_HASH_BYTES - sets.TAG_BYTES)
    keys = [
        bytes(NAMESPACE_BYTES) + tags[at : at + sets.TAG_BYTES] + rest
        for at in range(0, len(tags), sets.TAG_BYTES)
    ]
    random.shuffle(keys)
    return keys


def _asked(view: DirectoryView, keys: list[bytes]) -> list[bool]:
    masks = view.holders(keys, EVERYBODY)
    return [masks != bytes(len(masks))]


def _dict() -> None:
    tags = os.urandom(DICT_KEYS * sets.TAG_BYTES)
    keys = _keys_of(tags)
    held = dict.fromkeys(keys, 1)
    asked = [bytes(bytearray(key)) for key in keys[:KEYS]]  # as a lookup has them: other objects
    _show(f"a dict of {DICT_KEYS:,} keys", lambda some: [key in held for key in some], asked, True)


def _index(folder: Path) -> None:
    with ours.index("dram", folder, INDEX_KEYS) as index:
        memory = arena(FILL, index.page_bytes)  # named, so that it stays
        pages = ours.segments(addresses(memory), index.page_bytes)
        keys = [os.urandom(PAGE_HASH_BYTES) for _ in range(INDEX_KEYS)]
        for first in range(0, INDEX_KEYS, FILL):
            some = keys[first : first + FILL]
            index.insert(some, pages.select(range(len(some))))

        def ask(some: list[bytes]) -> list[bool]:
            return [index.lookup(some) == len(some)]

        _show(f"our own store of {INDEX_KEYS:,} pages", ask, keys, True)


def _show(name: str, ask: Ask, keys: list[bytes], expected: bool) -> None:
    costs = [_time(ask, keys, batch, expected) for batch in BATCHES]
    print(f"{name:42} " + _row(map(str, costs)), flush=True)


def _row(cells: Iterator[str] | map[str]) -> str:
    return "  ".join(cells)


def _time(ask: Ask, keys: list[bytes], batch: int, expected: bool) -> Cost:
    found = []
    bytearray(CACHES).count(1)  # so that no word is near from the time before
    starts = range(0, len(keys) - batch + 1, batch)
    for first in random.sample(starts, min(len(starts), CALLS_MOST)):
        some = keys[first : first + batch]
        started = time.perf_counter()
        answer = ask(some)
        found.append((time.perf_counter() - started) / batch * 1e6)
        assert answer.count(not expected) == 0, "a wrong answer"
    return Cost(statistics.median(found), sorted(found)[int(len(found) * 0.99) - 1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.lookups", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--pages", type=int, default=1_000_000, help="of each peer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
