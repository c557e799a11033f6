"""What a disk and its owner can do to a store: refused by name, or right bytes and misses.

Never wrong bytes, never another error, never the end of the process; and nothing that is refused has
been changed.
"""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import lmdb
import pytest

from lmcache_sglang.errors import ConfigError, Reason, TierError
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import Lookup, Stored
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.cpu import CpuTier
from lmcache_sglang.storage.disk import environment, layout, probe
from lmcache_sglang.storage.disk import tier as tier_module
from lmcache_sglang.storage.disk.tier import SMALLEST_SIZE, DiskTier
from lmcache_sglang.testing.disk_process import DiskProcess, page_of
from lmcache_sglang.testing.tier_suite import (
    PAGE,
    ROOMY,
    EngineMemory,
    a_key,
    at_once,
    bytes_of,
    read,
    read_pages,
    some_keys,
    write,
    write_pages,
)

SIZE = 8 << 20
LMDB_PAGE = 4096
PAGES = 100  # in the populated store
OURS_ANYWAY = {layout.LOCK, layout.TURN}  # made by a refusal, beside what was there


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in OURS_ANYWAY
    }


@contextmanager
def refused(setting: str, folder: Path, says: str) -> Iterator[None]:
    """The block raises a `ConfigError` that names the setting, and changes no file in the folder."""
    before = files(folder) if folder.is_dir() else {}
    with pytest.raises(ConfigError, match=says) as caught:
        yield
    assert caught.value.setting == setting
    assert before == (files(folder) if folder.is_dir() else {})


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The LMDB file of a store with pages of all kinds, and free space from pages that were removed."""
    folder = tmp_path_factory.mktemp("populated")
    with closing(DiskTier(folder, SIZE)) as tier:
        for start in range(0, PAGES, 10):
            write_pages(tier, [page_of(number) for number in range(start, start + 10)])
        tier.remove([a_key(number) for number in range(0, PAGES, 7)])
        write_pages(tier, [page_of(number) for number in range(0, PAGES, 14)])
    return (folder / layout.FILE).read_bytes()


def place(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / layout.FILE).write_bytes(content)
    return folder


# Directories that cannot be used.


@pytest.mark.parametrize(
    "path",
    ["file", "file/below", "file/below/it", "/proc/no/such", "/dev/null", "x" * 300, "loop/a"],
)
def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "loop").symlink_to("loop")
    with refused("path", tmp_path, "directory"):
        DiskTier(tmp_path / path, SIZE)


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_without_permission_is_refused(tmp_path: Path, made: bool) -> None:
    path = tmp_path / "store"
    if made:
        path.mkdir(mode=0o755)
    with DiskProcess() as process, refused("path", tmp_path, "Permission denied"):
        if os.geteuid() == 0:
            process.ask("become_nobody")
        else:
            (path if made else tmp_path).chmod(0o500)
        process.ask("open", path=str(path), size=SIZE)


def test_a_read_only_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise OSError(30, "Read-only file system")

    with refused("path", tmp_path, "Read-only file system"), monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        DiskTier(tmp_path, SIZE)


def test_a_lock_file_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / layout.LOCK).mkdir()
    with refused("path", tmp_path, "cannot write in"):
        DiskTier(tmp_path, SIZE)


def test_a_store_that_is_open_already_is_refused_and_goes_on(tmp_path: Path) -> None:
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        write(tier, some_keys(3))
        with pytest.raises(ConfigError, match="already open in this process") as caught:
            DiskTier(tmp_path, SIZE)
        assert caught.value.setting == "path"
        assert read(tier, some_keys(3)) == [Lookup.HIT] * 3
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        assert read(tier, some_keys(3)) == [Lookup.HIT] * 3


# Files that are not ours, or not whole.


def foreign_lmdb(folder: Path, **tables: dict[bytes, bytes]) -> None:
    env = lmdb.open(str(folder / layout.FILE), subdir=False, lock=False, max_dbs=4)
    for name, content in tables.items():
        table = env.open_db(name.encode())
        with env.begin(write=True, db=table) as txn:
            for key, value in content.items():
                txn.put(key, value)
    env.close()


@pytest.mark.parametrize(
    "tables",
    [
        {"accounts": {b"alice": b"100" * 5000}},
        {"meta": {b"version": b"7"}, "pages": {b"1": b"once upon a time"}},
        {"meta": {b"magic": layout.MAGIC}},
        {"meta": {b"format": layout.pack_format(layout.FORMAT)}},
    ],
)
def test_another_programs_lmdb_file_is_refused(
    tmp_path: Path, tables: dict[str, dict[bytes, bytes]]
) -> None:
    foreign_lmdb(tmp_path, **tables)
    with refused("path", tmp_path, "belongs to another program"):
        DiskTier(tmp_path, SIZE)


@pytest.mark.parametrize("content", ["random", "text", "zeros", "one byte"])
def test_a_file_that_is_no_lmdb_file_is_refused(tmp_path: Path, content: str) -> None:
    kinds = {
        "random": random.Random(1).randbytes(100_000),
        "text": b"Dear diary, " * 2000,
        "zeros": bytes(100_000),
        "one byte": b"x",
    }
    place(tmp_path, kinds[content])
    with refused("path", tmp_path, "belongs to another program"):
        DiskTier(tmp_path, SIZE)


def test_a_directory_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / layout.FILE).mkdir()
    with refused("path", tmp_path, "nothing was deleted"):
        DiskTier(tmp_path, SIZE)


@pytest.mark.parametrize("number", [0, 2, 0xFFFF_FFFF])
def test_another_formats_file_is_refused_by_its_number(tmp_path: Path, number: int) -> None:
    with closing(DiskTier(tmp_path, SIZE)) as tier, tier._env.write() as txn:
        txn.put(b"format", layout.pack_format(number), db=tier._env.tables.meta)
    with refused("path", tmp_path, f"written in format {number}, this version reads format 1"):
        DiskTier(tmp_path, SIZE)


@pytest.mark.parametrize("begun", [True, False])
def test_a_store_that_was_only_begun_is_a_new_one(tmp_path: Path, begun: bool) -> None:
    """Its maker was killed before or after LMDB wrote its headers."""
    if begun:
        foreign_lmdb(tmp_path)
    else:
        place(tmp_path, b"")
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        assert write(tier, some_keys(2)) == [Stored.STORED] * 2


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, populated: bytes) -> None:
    lengths = [1, 100, LMDB_PAGE, 2 * LMDB_PAGE - 1, 2 * LMDB_PAGE, len(populated) // 2]
    for length in [*lengths, len(populated) - LMDB_PAGE]:
        place(tmp_path, populated[:length])
        with refused("path", tmp_path, "belongs to another program|is damaged"):
            DiskTier(tmp_path, SIZE)


def test_a_file_that_lacks_only_free_space_at_its_end_is_used(tmp_path: Path) -> None:
    """LMDB may leave free pages there unwritten."""
    file = tmp_path / layout.FILE
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        write(tier, some_keys(4))
        write(tier, some_keys(10, start=10))
        length = file.stat().st_size
        tier.remove(some_keys(10, start=10))
        for _ in range(3):  # LMDB writes its new trees to the first free places
            write(tier, some_keys(1, start=20), size=100)
            tier.remove(some_keys(1, start=20))
    os.truncate(file, length - 3 * PAGE)
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        assert read(tier, some_keys(4)) == [Lookup.HIT] * 4
        assert write(tier, some_keys(10, start=10)) == [Stored.STORED] * 10
        assert tier.check().ok


# Bit rot.


def skeleton(content: bytes) -> list[int]:
    """The LMDB pages that hold headers, trees and the list of free pages, but no page's bytes."""
    found, number = [], 0
    while number < len(content) // LMDB_PAGE:
        own_number, _, flags, count = struct.unpack_from("<QHHI", content, number * LMDB_PAGE)
        overflow = flags & 4 and own_number == number
        if not overflow:
            found.append(number)
        number += count if overflow else 1
    return found


@pytest.mark.parametrize("where", ["anywhere", "in what leads to the pages", "in the headers"])
def test_flipped_bits_never_give_wrong_bytes_nor_end_the_process(
    tmp_path: Path, populated: bytes, where: str
) -> None:
    rng = random.Random(where)
    trees = skeleton(populated)
    spots: Callable[[], int] = {
        "anywhere": lambda: rng.randrange(len(populated)),
        "in what leads to the pages": lambda: rng.choice(trees) * LMDB_PAGE + rng.randrange(4096),
        "in the headers": lambda: rng.randrange(2) * LMDB_PAGE + rng.randrange(160),
    }[where]
    flips = [(spots(), rng.randrange(8)) for _ in range(120)]
    outcomes: Counter[str] = Counter()

    def try_each(part: int) -> None:
        with DiskProcess() as process:
            for spot, bit in flips[part::2]:
                damaged = bytearray(populated)
                damaged[spot] ^= 1 << bit
                folder = place(tmp_path / str(part), bytes(damaged))
                found = process.ask(
                    "try_out", path=str(folder), size=SIZE, numbers=list(range(PAGES))
                )
                assert found.keys() <= {"used", "refused"}, (spot, bit, found)
                if "refused" in found:
                    assert found == {"refused": "path"}
                    assert (folder / layout.FILE).read_bytes() == damaged
                outcomes.update(found.keys())

    at_once(lambda: try_each(0), lambda: try_each(1))
    assert outcomes.total() == 120
    assert outcomes["used"] > 0


def nodes(content: bytes, kind: int) -> Iterator[int]:
    """Where the nodes of LMDB's leaves (kind 2) or branches (kind 1) begin."""
    for number in skeleton(content):
        start = number * LMDB_PAGE
        flags, lower = struct.unpack_from("<HH", content, start + 10)
        if number >= 2 and flags == kind:
            count = (lower - 16) // 2
            yield from (start + at for at in struct.unpack_from(f"<{count}H", content, start + 16))


def test_a_record_that_is_not_as_long_as_ours_is_refused(tmp_path: Path, populated: bytes) -> None:
    """LMDB would take its length at its word, and move memory that is not there."""
    damaged = bytearray(populated)
    for at in nodes(populated, kind=2):
        room = LMDB_PAGE - at % LMDB_PAGE
        if struct.unpack_from("<4H", populated, at) == (48, 0, 0, 8) and room > 600:  # in `order`
            struct.pack_into("<H", damaged, at, 560)
    with refused(
        "path", place(tmp_path, bytes(damaged)), "a record of order has lengths 8 and 560"
    ):
        DiskTier(tmp_path, SIZE)


def test_space_that_lmdb_lost_track_of_is_no_damage(tmp_path: Path, populated: bytes) -> None:
    leaking = bytearray(populated)
    for header in (0, LMDB_PAGE):
        (last_page,) = struct.unpack_from("<Q", populated, header + 136)
        struct.pack_into("<Q", leaking, header + 136, last_page + 5)
    with closing(DiskTier(place(tmp_path, bytes(leaking)), SIZE)) as tier:
        assert read_pages(tier, [page_of(6)]) == [Lookup.HIT]
        assert write(tier, some_keys(3, start=5000)) == [Stored.STORED] * 3
        assert tier.check().ok


def test_a_tree_that_leads_backwards_is_not_followed_for_ever(
    tmp_path: Path, populated: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that was too large to be looked at before, with damaged branches."""
    monkeypatch.setattr(environment, "_probe", lambda file: probe.verdict("ours"))
    monkeypatch.setattr(tier_module, "_CHECKED_AT_ONCE", 8)
    damaged = bytearray(populated)
    for at in nodes(populated, kind=1):
        damaged[at + 8] = 0xFF  # the first byte of the key that leads to a leaf
    tier = DiskTier(place(tmp_path, bytes(damaged)), SIZE)

    def check() -> None:
        with pytest.raises(TierError) as caught:
            tier.check()
        assert caught.value.reason is Reason.CORRUPT

    at_once(check)
    tier.close()


def test_a_flipped_bit_in_a_page_costs_that_page_only(tmp_path: Path, populated: bytes) -> None:
    _, content = page_of(6)  # 70,001 bytes
    damaged = bytearray(populated)
    damaged[populated.index(content) + 5000] ^= 0x10
    with closing(DiskTier(place(tmp_path, bytes(damaged)), SIZE)) as tier:
        assert tier.check().corrupt == [a_key(6)]
        some = [5, 6, 8]
        assert read_pages(tier, [page_of(number) for number in some]) == [
            Lookup.HIT,
            Lookup.CORRUPT,
            Lookup.HIT,
        ]


# Limits.


def test_a_limit_below_the_least_is_refused(tmp_path: Path) -> None:
    for size in (-1, 0, SMALLEST_SIZE - 1):
        with refused("disk.size", tmp_path, f"the least is {SMALLEST_SIZE}"):
            DiskTier(tmp_path / "store", size)
    assert not (tmp_path / "store").exists()


def test_a_limit_beyond_the_machine_is_refused(tmp_path: Path) -> None:
    for size in (1 << 60, 1 << 70):
        with refused("disk.size", tmp_path, "cannot be mapped"):
            DiskTier(tmp_path / "store", size)


def test_a_limit_below_a_page_is_told_by_fits(tmp_path: Path) -> None:
    with closing(DiskTier(tmp_path, SMALLEST_SIZE)) as tier:
        assert tier.fits(PAGE)
        assert not tier.fits(SMALLEST_SIZE)
        assert not tier.fits(tier.capacity // 2)  # each write would evict the one before
        assert Chain(None, tier).fits(SMALLEST_SIZE) == [tier]


def test_a_lowered_limit_keeps_the_newest_pages(tmp_path: Path) -> None:
    keys = some_keys(60)
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        for key in keys:
            write(tier, [key])
    file = tmp_path / layout.FILE
    assert file.stat().st_size > SIZE // 4
    with closing(DiskTier(tmp_path, SIZE // 4)) as tier:
        here = tier.exists(keys)
        assert here == sorted(here) and 10 < sum(here) < 60
        assert tier.stats().bytes <= tier.capacity
        assert file.stat().st_size <= SIZE // 4
        assert tier.check().ok
        assert [lookup is Lookup.HIT for lookup in read(tier, keys)] == here
        write(tier, some_keys(40, start=100))
        assert file.stat().st_size <= SIZE // 4
    with closing(DiskTier(tmp_path, SIZE)) as tier:  # and it can be raised again
        assert tier.capacity > SIZE // 2
        assert write(tier, keys) == [Stored.STORED] * 60


def test_a_limit_just_above_the_file_holds_from_the_start(tmp_path: Path) -> None:
    """The file fits, but what it holds is more than a file of that size may."""
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        write(tier, some_keys(60))
    size = (tmp_path / layout.FILE).stat().st_size + LMDB_PAGE
    with closing(DiskTier(tmp_path, size)) as tier:
        assert tier.stats().bytes <= tier.capacity
        assert tier.stats().pages < 60
        assert tier.check().ok


def test_a_reopened_file_keeps_its_limit(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(DiskTier(tmp_path, SIZE)) as tier:
            write(tier, some_keys(5))
            assert tier._env.map_size == SIZE


def test_a_lowered_limit_that_cannot_be_reached_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(DiskTier(tmp_path, SIZE)) as tier:
        write(tier, some_keys(60))
    with monkeypatch.context() as patch, pytest.raises(ConfigError) as caught:
        patch.setattr(environment.Environment, "resize", _no_space)
        DiskTier(tmp_path, SIZE // 4)
    assert caught.value.setting == "disk.size"
    with closing(DiskTier(tmp_path, SIZE)) as tier:  # it was closed again
        assert tier.check().ok


def _no_space(self: object, size: int) -> None:
    raise TierError("disk", Reason.FULL, "No space left on device")


# A disk that fills up while it is in use.


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "mounted"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not allowed to mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def fill(tier: DiskTier) -> tuple[list[bytes], TierError]:
    """Write pages until one fails; those that did not, and the error."""
    kept: list[bytes] = []
    for key in some_keys(200):
        try:
            tier.put([key], EngineMemory([bytes_of(key)]).segments)
        except TierError as error:
            return kept, error
        kept.append(key)
    raise AssertionError("the disk took more than it has")


def test_a_full_disk_is_used_as_far_as_it_goes(tiny_disk: Path) -> None:
    """Somebody else's file takes a part of it; the limit is far beyond."""
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    keys = some_keys(200)
    with closing(DiskTier(tiny_disk, 64 << 20)) as tier:
        for key in keys:
            assert write(tier, [key]) == [Stored.STORED]
        here = tier.exists(keys)
        assert 10 < sum(here) < 60
        assert here == sorted(here), "an older page outlived a newer one"
        assert [lookup is Lookup.HIT for lookup in read(tier, keys)] == here
        assert tier.check().ok
    with closing(DiskTier(tiny_disk, 64 << 20)) as tier:
        assert tier.exists(keys) == here


def test_a_file_size_limit_is_an_error_that_costs_no_earlier_page(tmp_path: Path) -> None:
    with closing(DiskTier(tmp_path, 64 << 20)) as tier:
        with files_of_at_most(2 << 20):
            kept, error = fill(tier)
            assert error.reason in (Reason.IO, Reason.FULL)
            assert len(kept) > 10
            assert read(tier, kept) == [Lookup.HIT] * len(kept)
        assert write(tier, some_keys(3, start=500)) == [Stored.STORED] * 3
        assert tier.check().ok


def test_a_full_disk_under_a_chain_is_misses_and_a_count(tmp_path: Path) -> None:
    keys = some_keys(60)
    with closing(Chain(CpuTier(ROOMY), DiskTier(tmp_path, 64 << 20), spill_bytes=ROOMY)) as chain:
        memory = EngineMemory([bytes_of(key) for key in keys])
        with files_of_at_most(2 << 20):
            for start in range(0, 60, 5):
                part = memory.segments.select(range(start, start + 5))
                assert chain.put(keys[start : start + 5], part) == [True] * 5
                assert chain.flush(30)
            counts = chain.faults.counts()
            assert sum(counts.values()) >= 1
            assert counts.keys() <= {"disk.io", "disk.full"}
        _, lower = chain.tiers
        missing = lower.exists(keys).count(False)
        assert 0 < missing < 60
        assert chain.put(keys, memory.segments) == [True] * 60
        assert chain.flush(30)
        assert lower.exists(keys) == [True] * 60
        assert read(lower, keys) == [Lookup.HIT] * 60


# Other processes: sharing, pausing, dying.


def test_processes_share_pages_and_limit(tmp_path: Path) -> None:
    mine, others = list(range(0, 200, 2)), list(range(1, 200, 2))
    size = 4 << 20
    with closing(DiskTier(tmp_path, size)) as tier, DiskProcess() as other:
        other.ask("open", path=str(tmp_path), size=size)
        assert other.ask("put", numbers=[0, 1, 2]) == ["stored"] * 3
        assert write_pages(tier, [page_of(n) for n in (1, 3)]) == [Stored.PRESENT, Stored.STORED]
        assert other.ask("get", numbers=[3, 2, 9]) == ["hit", "hit", "miss"]
        assert other.ask("remove", numbers=[3]) == 1
        assert tier.exists([a_key(3)]) == [False]

        def write_mine() -> None:
            for start in range(0, 100, 10):
                part = [page_of(number) for number in mine[start : start + 10]]
                tier.put(
                    [key for key, _ in part], EngineMemory([data for _, data in part]).segments
                )
                assert tier.stats().bytes <= tier.capacity
                assert (tmp_path / layout.FILE).stat().st_size <= size

        def write_others() -> None:
            for start in range(0, 100, 10):
                other.ask("put", numbers=others[start : start + 10])

        at_once(write_mine, write_others)
        assert tier.check().ok
        assert other.ask("used") == tier.stats().bytes
        seen = [lookup.value for lookup in read_pages(tier, [page_of(n) for n in range(200)])]
        assert other.ask("get", numbers=list(range(200))) == seen
        assert set(seen) == {"hit", "miss"}


def test_processes_that_start_together_make_one_store(tmp_path: Path) -> None:
    with DiskProcess() as one, DiskProcess() as two, DiskProcess() as three:
        capacities: list[int] = []

        def start(process: DiskProcess, size: int) -> Callable[[], None]:
            return lambda: capacities.append(
                process.ask("open", path=str(tmp_path), size=size)  # the first one's size holds
            )

        at_once(start(one, SIZE), start(two, SIZE), start(three, SIZE))
        assert len(set(capacities)) == 1
        one.ask("put", numbers=[1])
        two.ask("put", numbers=[2])
        assert three.ask("get", numbers=[1, 2]) == ["hit", "hit"]


def test_processes_that_disagree_on_the_limit_keep_the_first_ones(tmp_path: Path) -> None:
    """LMDB's processes must map a file alike."""
    with DiskProcess() as one, DiskProcess() as two:
        capacity = one.ask("open", path=str(tmp_path), size=SIZE)
        assert two.ask("open", path=str(tmp_path), size=4 * SIZE) == capacity
        for start in range(0, 400, 20):
            two.ask("put", numbers=list(range(start, start + 20)))
        assert (tmp_path / layout.FILE).stat().st_size <= SIZE
        assert one.ask("get", numbers=[399]) == two.ask("get", numbers=[399]) == ["hit"]


def test_a_paused_process_holds_nobody_up(tmp_path: Path) -> None:
    from signal import SIGCONT, SIGSTOP

    with closing(DiskTier(tmp_path, SIZE)) as tier, DiskProcess() as other:
        other.ask("open", path=str(tmp_path), size=SIZE)
        other.ask("put", numbers=[1])
        other.signal(SIGSTOP)
        assert write(tier, some_keys(3, start=500)) == [Stored.STORED] * 3
        assert tier.remove([a_key(1)]) == 1
        tier.close()
        with closing(DiskTier(tmp_path, SIZE)) as again:
            assert read(again, some_keys(3, start=500)) == [Lookup.HIT] * 3
        other.signal(SIGCONT)
        assert other.ask("get", numbers=[1]) == ["miss"]


def test_a_process_stopped_in_the_middle_of_a_write_costs_the_others_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from signal import SIGSTOP

    monkeypatch.setattr(environment, "WRITE_SECONDS", 0.2)
    with closing(DiskTier(tmp_path, SIZE)) as tier, DiskProcess() as other:
        write(tier, some_keys(1))
        other.ask("open", path=str(tmp_path), size=SIZE)
        other.ask("write_for_ever")
        other.signal(SIGSTOP)
        with pytest.raises(TierError) as busy:
            write(tier, some_keys(2))
        assert busy.value.reason is Reason.BUSY
        assert read(tier, some_keys(1)) == [Lookup.HIT]  # reading goes on
        other.kill()
        assert write(tier, some_keys(2)) == [Stored.PRESENT, Stored.STORED]


def test_a_process_killed_while_reading_does_not_keep_the_others_from_writing(
    tmp_path: Path,
) -> None:
    """LMDB frees nothing that a reader may still look at, and believes that a killed one does."""
    with closing(DiskTier(tmp_path, ROOMY)) as tier, DiskProcess() as other:
        other.ask("open", path=str(tmp_path), size=ROOMY)
        other.ask("read_for_ever")
        other.kill()
        page = bytes(256 << 10)
        for batch in range(4 * tier.capacity // (8 * len(page))):
            keys = some_keys(8, start=8 * batch)
            assert tier.put(keys, PageSegments.of_buffers([page] * 8)) == [Stored.STORED] * 8


def test_a_process_killed_while_writing_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    path, size = str(tmp_path), ROOMY
    first = 0
    with DiskProcess() as process:
        for batches in random.Random(3).choices(range(1, 5), k=20):
            after = process.ask("die_writing", path=path, size=size, first=first, batches=batches)
            assert after > first
            found = process.ask("try_out", path=path, size=size, numbers=list(range(first, after)))
            assert found == {"used": {"hit": 3 * (after - first)}}
            first = after
        with closing(DiskTier(tmp_path, size)) as tier:
            assert tier.check().ok
            everything = [page_of(number) for number in range(first)]
            assert read_pages(tier, everything) == [Lookup.HIT] * first


def test_a_process_killed_while_writing_holds_nobody_up(tmp_path: Path) -> None:
    """It may die with LMDB's writer lock in its hands."""
    path, size, first = str(tmp_path), ROOMY, 0
    with closing(DiskTier(tmp_path, size)) as tier, DiskProcess() as process:
        for round_ in range(5):
            first = process.ask("die_writing", path=path, size=size, first=first, batches=1)
            keys = some_keys(3, start=5000 + 3 * round_)
            assert write(tier, keys) == [Stored.STORED] * 3
            assert tier.check().ok
        assert read_pages(tier, [page_of(n) for n in range(first)]) == [Lookup.HIT] * first
