"""What a power cut leaves of a store in a file: whole, if it is durable; else at least never wrong.

Modelled is the region, on a simulated device: what lies in it when a flush has ended is safe, and of what
was written since, each sector of 512 bytes is old, new or neither, each by itself. So writes are lost,
torn and reordered at will. A cut comes at any step, also in the middle of a change; `control`, which nobody
syncs, is lost with it.

Assumed, and not tried, is what LMDB and the file system promise. Of the index: a commit that has returned
is on the medium whole, and one that has not left no trace. Not durable (MDB_NOMETASYNC), the last commit
may be missing as well, and only the last; pages of a commit are never torn, lost singly, or reordered behind
its meta page, which LMDB writes after it has synced the rest. A sync that returned was one: no device lies.
Of the files: they were made, at their full size, long before. Cuts while a store is made or resized are not
modelled; kills then are (test_crash_opening.py).
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import lmdb
import pytest

from lmcache_sglang.storage.base import Lookup
from lmcache_sglang.storage.slab import files, opening, probe
from lmcache_sglang.storage.slab.settings import Engine, SlabSettings
from lmcache_sglang.testing import crash_script
from lmcache_sglang.testing.crash_script import NUMBERS
from lmcache_sglang.testing.injection import Recorded, injected
from lmcache_sglang.testing.small_store import SmallStore, get, here, put, write_file

CAPACITY = 1 << 20  # the pages of the script do not fit into it
OPERATIONS = 60
CUTS_PER_STEP = 0.2
SECTOR = 512


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: the indexes are sound, and there are many."""

    def look(task: str, index: Path, argument: str) -> dict[str, str]:
        return probe.inspect(str(index), opening.EXPECTED)

    monkeypatch.setattr(opening, "_probe", look)


@dataclass
class Device:
    """A step hook that knows what is safe, and sometimes keeps what a power cut would leave now."""

    directory: Path
    rng: random.Random
    durable: bool
    unsafe: list[tuple[int, int]] = field(default_factory=list)  # written since the last flush
    flushing: bool = False
    left: list[tuple[bytes, bytes]] = field(default_factory=list)  # index and region after each cut

    def __post_init__(self) -> None:
        self.safe = self._region()
        self.committed = [self._index()] * 2

    def __call__(self, name: str, offset: int, size: int) -> int:
        if self.flushing:  # it has ended: this is the next step of the same thread
            self.safe, self.unsafe, self.flushing = self._region(), [], False
        if name == "write":
            self.unsafe.append((offset, size))
        elif name == "flush":
            self.flushing = True
        elif name == "index_committed":
            self.committed = [self.committed[1], self._index()]
        if self.rng.random() < CUTS_PER_STEP:
            self.left.append((self._index_left(), self._region_left()))
        return 0

    def _index(self) -> bytes:
        return (self.directory / files.INDEX).read_bytes()

    def _region(self) -> bytes:
        return (self.directory / files.REGION).read_bytes()

    def _index_left(self) -> bytes:
        return self.committed[1] if self.durable else self.rng.choice(self.committed)

    def _region_left(self) -> bytes:
        left, new = bytearray(self.safe), self._region()
        for offset, size in self.unsafe:
            for at in range(offset, offset + size, SECTOR):
                choices = [
                    self.safe[at : at + SECTOR],
                    new[at : at + SECTOR],
                    self.rng.randbytes(SECTOR),
                ]
                left[at : at + SECTOR] = self.rng.choice(choices)
        return bytes(left)


def cut(store: SmallStore, left: tuple[bytes, bytes], saved: dict[str, bytes]) -> None:
    """Make a store of what a power cut left."""
    store.restore(saved)
    for name, content in zip((files.INDEX, files.REGION), left, strict=True):
        write_file(store.directory / name, content)
    (store.directory / files.CONTROL).unlink()  # it may hold anything; tests of damage try that


@pytest.mark.parametrize("engine", ["threads", "io_uring"])
@pytest.mark.parametrize("durable", [True, False])
def test_pages_that_exist_after_a_power_cut_are_whole(
    shared_memory: Path, durable: bool, engine: Engine
) -> None:
    settings = SlabSettings(durable=durable, engine=engine)
    store = SmallStore(shared_memory / "store", False, CAPACITY, settings)
    again = store.elsewhere(shared_memory / "again")
    crash_script.fill(store, 3)
    saved = store.save()
    cuts, rng = 0, random.Random(engine)
    with store.opened() as tier:
        device = Device(store.directory, rng, durable)
        before = here(tier, NUMBERS)
        for operation in islice(crash_script.operations(4), OPERATIONS):
            with injected(device):
                crash_script.apply(tier, operation)
            after = here(tier, NUMBERS)
            for left in device.left:
                cut(again, left, saved)
                look(again, durable, before, after)
                cuts += 1
            device.left.clear()
            before = after
    assert cuts > 80


def look(store: SmallStore, durable: bool, before: set[int], after: set[int]) -> None:
    with store.opened() as tier:
        found = sorted(here(tier, NUMBERS))
        outcome = set(get(tier, found))  # checks that a hit is right
        if durable:
            assert outcome <= {Lookup.HIT}
            assert before & after <= set(found) <= before | after
            report = tier.check()
            assert report.ok, report
        else:
            assert outcome <= {Lookup.HIT, Lookup.CORRUPT}
            tier.check(repair=True)
            assert tier.check().ok
        assert put(tier, [8], [b""])[0].kept
        assert get(tier, [8]) == [Lookup.HIT]


@dataclass
class Watch(Recorded):
    """Every step, and every write to where the index says that a page lies."""

    directory: Path = Path()
    overwritten: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._published = self._slots()

    def __call__(self, name: str, offset: int, size: int) -> int:
        if name == "index_committed":
            self._published = self._slots()
        elif name == "write":
            end = offset + size
            if any(slot.start < end and offset < slot.stop for slot in self._published):
                self.overwritten.append((offset, size))
        return super().__call__(name, offset, size)

    def _slots(self) -> list[range]:
        copy = self.directory.parent / "copy"
        copy.write_bytes((self.directory / files.INDEX).read_bytes())
        env = lmdb.open(str(copy), subdir=False, readonly=True, lock=False, max_dbs=8)
        with env, env.begin(db=env.open_db(b"index", create=False)) as txn:
            places = [struct.unpack_from("<QI", entry) for _, entry in txn.cursor()]
        return [range(offset, offset + length) for offset, length in places]


def test_data_is_flushed_before_it_is_published_and_written_over_nothing_that_is(
    shared_memory: Path,
) -> None:
    store = SmallStore(shared_memory / "store", False, CAPACITY)
    crash_script.fill(store, 3)
    written = 0
    with store.opened() as tier:
        for operation in islice(crash_script.operations(5), OPERATIONS):
            seen = Watch(directory=store.directory)
            with injected(seen):
                crash_script.apply(tier, operation)
            assert not seen.overwritten
            if "write" in seen.names:
                last = len(seen.names) - seen.names[::-1].index("write")
                rest = ["flush", "publish", "index_begin", "index_commit", "index_committed"]
                assert seen.names[last:] == rest
                written += seen.names.count("write")
    assert written > 30
