"""What a disk and its owner can do to a store: refused by name, or used; and nothing refused is changed."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import lmdb
import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage.base import Lookup, Stored
from lmcache_sglang.storage.slab import files, head
from lmcache_sglang.storage.slab.head import Head
from lmcache_sglang.storage.slab.plan import Plan
from lmcache_sglang.testing.engine import until
from lmcache_sglang.testing.small_store import SmallStore, get, here, put
from lmcache_sglang.testing.store_process import Job, run
from lmcache_sglang.testing.tier_suite import some_keys
from lmcache_sglang.testing.two_tiers import SOON, TwoTiers, keep_open

SIZE = 4 << 20
PAGES = range(60)
MADE_BY_A_REFUSAL = {files.IN_USE}  # beside what was there


@pytest.fixture
def store(tmp_path: Path) -> SmallStore:
    return SmallStore(tmp_path / "store", memory=False, capacity=SIZE)


@pytest.fixture
def populated(store: SmallStore) -> SmallStore:
    """A store with pages, closed."""
    with store.opened() as tier:
        assert set(put(tier, PAGES)) == {Stored.STORED}
    return store


def content(folder: Path) -> dict[str, bytes | None]:
    """Of every file below; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name not in MADE_BY_A_REFUSAL
    }


@contextmanager
def refused(setting: str, folder: Path, says: str) -> Iterator[None]:
    """The block raises a `ConfigError` that names the setting, and changes nothing in the folder."""
    before = content(folder) if folder.is_dir() else {}
    with pytest.raises(ConfigError, match=says) as caught:
        yield
    assert caught.value.setting == setting
    assert before == (content(folder) if folder.is_dir() else {})


# Directories that cannot be used.


@pytest.mark.parametrize(
    "path",
    ["file", "file/below", "file/below/it", "/proc/no/such", "/dev/null", "x" * 300, "loop/a"],
)
def test_a_path_that_cannot_be_a_directory_is_refused(
    store: SmallStore, tmp_path: Path, path: str
) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "loop").symlink_to("loop")
    with refused("path", tmp_path, "directory"):
        store.elsewhere(tmp_path / path).open()


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_without_permission_is_refused(store: SmallStore, made: bool) -> None:
    store.directory.parent.chmod(0o755)
    if made:
        store.directory.mkdir(mode=0o755)
    said = run(open_as_nobody, store)
    assert said.startswith("path: cannot")
    assert "Permission denied" in said
    assert content(store.directory) == {}


def open_as_nobody(store: SmallStore) -> str:
    """The refusal, of a process that has nothing to say on this machine."""
    if os.geteuid() == 0:
        _let_pass(store.directory)
        os.setresuid(65534, 65534, 65534)
    else:
        (store.directory if store.directory.exists() else store.directory.parent).chmod(0o500)
    try:
        store.open()
    except ConfigError as error:
        return str(error)
    return "opened"


def _let_pass(path: Path) -> None:
    """pytest keeps its temporary folders to itself."""
    for folder in path.parents:
        with suppress(OSError):
            folder.chmod(folder.stat().st_mode | 0o011)


def mounted(kind: str, point: Path, options: str) -> None:
    point.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["mount", "-t", kind, "-o", options, kind, str(point)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not allowed to mount a file system")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    point = tmp_path / "mounted"
    mounted("tmpfs", point, "size=4m")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_read_only_file_system_is_refused(store: SmallStore, tiny_disk: Path) -> None:
    (tiny_disk / "made").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    for name in ("made", "not-made"):
        with refused("path", tiny_disk, "Read-only file system"):
            store.elsewhere(tiny_disk / name).open()


@pytest.mark.parametrize(
    "name", [files.IN_USE, files.INDEX, files.INDEX_LOCK, files.REGION, files.CONTROL, files.OWNERS]
)
@pytest.mark.parametrize("made_before", [True, False])
def test_a_directory_in_a_files_place_is_refused(
    store: SmallStore, name: str, made_before: bool
) -> None:
    store.directory.mkdir()
    if made_before:
        store.open().close()
        (store.directory / name).unlink()
    (store.directory / name / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        store.open()
    assert caught.value.setting == "path"
    assert str(store.directory) in str(caught.value)
    assert (store.directory / name / "mine").is_dir()


def test_a_store_that_is_open_already_is_refused_and_goes_on(store: SmallStore) -> None:
    with store.opened() as tier:
        put(tier, [1, 2])
        with pytest.raises(ConfigError, match="already open in this process") as caught:
            store.open()
        assert caught.value.setting == "path"
        link = store.directory.parent / "link"
        link.symlink_to(store.directory)
        with pytest.raises(ConfigError, match="already open in this process"):
            store.elsewhere(link).open()
        assert get(tier, [1, 2]) == [Lookup.HIT] * 2
    with store.opened() as tier:
        assert get(tier, [1, 2]) == [Lookup.HIT] * 2


# Files that are not ours, or not whole.


def foreign_lmdb(file: Path, **tables: dict[bytes, bytes]) -> None:
    env = lmdb.open(str(file), subdir=False, lock=False, max_dbs=4)
    for name, records in tables.items():
        table = env.open_db(name.encode())
        with env.begin(write=True, db=table) as txn:
            for key, value in records.items():
                txn.put(key, value)
    env.close()


@pytest.mark.parametrize("name", [files.INDEX, files.REGION, files.CONTROL])
def test_a_file_by_our_name_without_a_head_is_another_programs(
    store: SmallStore, name: str
) -> None:
    store.directory.mkdir()
    (store.directory / name).write_bytes(b"precious")
    with refused("path", store.directory, f"{name} is no store's"):
        store.open()


@pytest.mark.parametrize(
    "tables",
    [
        {"accounts": {b"alice": b"100" * 5000}},
        {"meta": {b"version": b"7"}, "pages": {b"1": b"once upon a time"}},
        {"meta": {b"version": b"7"}, "index": {b"1": b"2"}},
    ],
)
def test_another_programs_lmdb_file_is_refused(
    populated: SmallStore, tables: dict[str, dict[bytes, bytes]]
) -> None:
    (populated.directory / files.INDEX).unlink()
    foreign_lmdb(populated.directory / files.INDEX, **tables)
    with refused("path", populated.directory, "index belongs to another program"):
        populated.open()


@pytest.mark.parametrize("kind", ["random", "text", "zeros", "one byte"])
def test_an_index_that_is_no_lmdb_file_is_refused(populated: SmallStore, kind: str) -> None:
    kinds = {
        "random": random.Random(1).randbytes(100_000),
        "text": b"Dear diary, " * 2000,
        "zeros": bytes(100_000),
        "one byte": b"x",
    }
    (populated.directory / files.INDEX).write_bytes(kinds[kind])
    with refused("path", populated.directory, "index (belongs to another program|is damaged)"):
        populated.open()


def test_an_index_that_was_cut_off_is_refused(populated: SmallStore) -> None:
    whole = populated.save()
    for length in (1, 100, 4096, 8191, 8192, 5 * 4096):
        populated.restore(whole)
        os.truncate(populated.directory / files.INDEX, length)
        with refused("path", populated.directory, "belongs to another program|is damaged"):
            populated.open()


def test_an_index_of_garbage_in_memory_is_made_anew_with_a_word(
    shared_memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is there was to be lost at any reboot; an engine must start all the same."""
    store = SmallStore(shared_memory / "store", memory=True, capacity=SIZE)
    with store.opened() as tier:
        put(tier, PAGES)
    (store.directory / files.INDEX).write_bytes(b"garbage" * 10_000)
    with store.opened() as tier:
        assert here(tier, PAGES) == set()
        assert set(put(tier, PAGES)) == {Stored.STORED}
        assert tier.check().ok
    assert "was damaged; what it held is lost" in caplog.text


@pytest.mark.parametrize("memory", [True, False])
def test_the_first_versions_store_is_refused_by_its_number(
    tmp_path: Path, shared_memory: Path, memory: bool
) -> None:
    store = SmallStore((shared_memory if memory else tmp_path) / "store", memory, SIZE)
    store.directory.mkdir()
    foreign_lmdb(store.directory / "pages.lmdb", meta={b"format": b"\1\0\0\0"})
    with refused(
        "path", store.directory, r"pages\.lmdb was written in format 1, this version reads"
    ):
        store.open()


def test_a_later_versions_store_is_refused_by_its_number(populated: SmallStore) -> None:
    file = populated.directory / head.FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"format": 3, "new": True}))
    with refused("path", populated.directory, "written in format 3, this version reads format 2"):
        populated.open()


def test_a_lost_head_is_told(populated: SmallStore) -> None:
    (populated.directory / head.FILE).unlink()
    with refused("path", populated.directory, r"store\.json is lost"):
        populated.open()


# Stores that were being made, or unmade, when their process died.


def test_a_store_that_was_only_begun_is_a_new_one(store: SmallStore) -> None:
    """Killed after the head was written: any of the other files may be missing, or empty."""
    store.directory.mkdir()
    head.write(store.directory, Head.new(Plan.of(SIZE)))
    for name in (files.REGION, files.CONTROL, files.INDEX):
        with store.opened() as tier:
            assert put(tier, [1]) == [Stored.STORED]
        head.write(store.directory, Head.new(Plan.of(SIZE)))
        for file in store.directory.iterdir():
            if file.name != head.FILE:
                file.unlink()
        (store.directory / name).touch()
    assert sum(store.save()[name] == b"" for name in (files.INDEX,)) == 1


@pytest.mark.parametrize("removed", range(7))
def test_a_removal_that_was_cut_short_leaves_a_directory_that_can_be_used(
    populated: SmallStore, removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    real = Path.unlink

    def until_killed(path: Path, missing_ok: bool = False) -> None:
        nonlocal count
        if count == removed:
            raise KeyboardInterrupt
        count += 1
        real(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", until_killed)
        files.remove_own(populated.directory)
        raise KeyboardInterrupt
    with populated.opened() as tier:
        found = get(tier, PAGES)
        assert {Lookup.HIT, Lookup.MISS} >= set(found)
        put(tier, PAGES)
        assert get(tier, PAGES) == [Lookup.HIT] * len(PAGES)
        assert tier.check().ok


@pytest.mark.parametrize("name", [files.INDEX, files.CONTROL, files.INDEX_LOCK, files.OWNERS])
def test_a_file_that_was_removed_by_hand_costs_no_more_than_what_it_held(
    populated: SmallStore, name: str
) -> None:
    (populated.directory / name).unlink()
    with populated.opened() as tier:
        assert here(tier, PAGES) == (set() if name == files.INDEX else set(PAGES))
        put(tier, PAGES)
        assert get(tier, PAGES) == [Lookup.HIT] * len(PAGES)
        assert tier.check().ok


# A region that was shortened by hand.


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_shortened_region_costs_the_pages_that_were_cut_off(
    tmp_path: Path,
    shared_memory: Path,
    memory: bool,
    share: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = SmallStore((shared_memory if memory else tmp_path) / "store", memory, SIZE)
    with store.opened() as tier:
        put(tier, PAGES)
    region = store.directory / files.REGION
    whole = region.stat().st_size
    os.truncate(region, int(share * whole))
    with store.opened() as tier:
        found = get(tier, PAGES)  # checked to the byte
        assert set(found) <= {Lookup.HIT, Lookup.MISS}
        assert (Lookup.HIT in found) == (share > 0)
        assert region.stat().st_size == whole
        put(tier, PAGES)
        assert get(tier, PAGES) == [Lookup.HIT] * len(PAGES)
        assert tier.check().ok
        assert store.allocated() <= SIZE
    assert "was shortened" in caplog.text


def test_a_region_that_was_shortened_while_another_process_has_it_is_not_mapped(
    tiers: TwoTiers, tmp_path: Path
) -> None:
    """It would end this process with SIGBUS, as it may end that one."""
    alone = tiers.but(memory=None)
    other = Job(keep_open, alone, tmp_path / "here")
    until((tmp_path / "here").exists)
    assert tiers.disk is not None
    os.truncate(tiers.disk / files.REGION, 4096)
    with pytest.raises(ConfigError, match="stop all engines that use it") as caught:
        alone.open()
    assert caught.value.setting == "path"
    other.kill()
    with closing(alone.open()) as chain:
        assert chain.exists(some_keys(3)) == [False] * 3


# Limits, and media that do not have so much.


@pytest.mark.parametrize("size", [-1, 0, 4096, 100_000])
def test_a_limit_below_the_least_is_refused_and_names_one_that_does(
    tmp_path: Path, size: int
) -> None:
    with pytest.raises(ConfigError, match="the smallest store takes") as caught:
        SmallStore(tmp_path / "store", False, size).open()
    assert caught.value.setting == "disk.size"
    enough = int(caught.value.problem.split("takes ")[1].split(";")[0])
    with SmallStore(tmp_path / "store", False, enough).opened() as tier:
        assert put(tier, [0]) == [Stored.STORED]


@pytest.mark.parametrize("size", [1 << 45, 1 << 60])
def test_a_limit_beyond_the_disk_is_refused_and_takes_nothing(tmp_path: Path, size: int) -> None:
    store = SmallStore(tmp_path / "store", False, size)
    with refused("disk.size", store.directory, "cannot be allocated"):
        store.open()
    assert store.allocated() == 0


def test_a_full_disk_is_found_at_the_start_and_left_as_it_was(tiny_disk: Path) -> None:
    (tiny_disk / "mine").write_bytes(bytes(1 << 20))
    store = SmallStore(tiny_disk / "store", False, SIZE)
    store.directory.mkdir()
    with refused(
        "disk.size", tiny_disk, "No space left on device; 3141632 bytes are free|No space"
    ):
        store.open()
    (tiny_disk / "mine").unlink()
    smaller = SmallStore(tiny_disk / "store", False, 3 << 20)
    with smaller.opened() as tier:
        assert put(tier, [1]) == [Stored.STORED]


def test_a_sparse_region_on_a_full_disk_is_refused_and_never_a_signal(tiny_disk: Path) -> None:
    """As it is after a copy that leaves holes out."""
    store = SmallStore(tiny_disk / "store", True, 3 << 20)
    with store.opened() as tier:
        put(tier, range(8))
    region = store.directory / files.REGION
    pages, size = region.read_bytes()[: 512 << 10], region.stat().st_size
    region.unlink()
    region.write_bytes(pages)
    os.truncate(region, size)
    (tiny_disk / "mine").write_bytes(bytes(2 << 20))
    with refused("disk.size", tiny_disk, "No space left"):
        store.open()
    (tiny_disk / "mine").unlink()
    with store.opened() as tier:
        put(tier, range(60))
        assert tier.check().ok


def test_a_process_that_may_not_write_such_files_is_told_so(tmp_path: Path) -> None:
    store = SmallStore(tmp_path / "store", False, SIZE)
    store.directory.mkdir()
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with refused("disk.size", store.directory, "ulimit -f"):
            store.open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    store.open().close()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("name", [files.REGION, files.CONTROL, files.INDEX])
def test_a_store_that_cannot_be_made_whole_is_not_made(
    tmp_path: Path,
    name: str,
    error: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk says no to any of its files, for any reason that has to do with room."""
    real = files._reserve

    def reserve(handle: int, size: int, file: Path) -> None:
        if file.name == name:
            raise OSError(error, os.strerror(error))
        real(handle, size, file)

    store = SmallStore(tmp_path / "store", False, SIZE)
    store.directory.mkdir()
    with monkeypatch.context() as patch, refused("disk.size", store.directory, says):
        patch.setattr(files, "_reserve", reserve)
        store.open()
    store.open().close()


def test_a_small_dev_shm_is_told_what_makes_it_larger(shared_memory: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        files.allocate(shared_memory / "region", 1 << 45, "cpu.size")
    said = str(caught.value)
    assert said.startswith("cpu.size: ")
    assert "--shm-size" in said and "--ipc=host" in said


# Processes.


def test_processes_that_start_together_make_one_store(tiers: TwoTiers, tmp_path: Path) -> None:
    marks = [tmp_path / f"here-{number}" for number in range(3)]
    jobs = [Job(keep_open, tiers, mark) for mark in marks]
    until(lambda: all(mark.exists() for mark in marks), SOON)
    with closing(tiers.open()) as chain:
        assert all(report.ok for report in chain.check().values())
    for job in jobs:
        job.kill()


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    store = SmallStore(tmp_path / "store", False, SIZE)
    store.directory.mkdir()
    store.directory.chmod(mode)
    with refused("path", store.directory, "can be written to by everybody"):
        store.open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    store = SmallStore(tmp_path / "store", False, SIZE)
    store.directory.mkdir()
    os.chown(store.directory, 65534, -1)
    with refused("path", store.directory, "can be written to by user 65534"):
        store.open()


@pytest.mark.parametrize("name", ["owners", "index-lock", "keeper", "sweeper"])
def test_another_programs_small_files_are_refused_too(tmp_path: Path, name: str) -> None:
    store = SmallStore(tmp_path / "store", False, SIZE)
    store.directory.mkdir()
    (store.directory / name).write_text("not yours")
    with refused("path", store.directory, "is no store's"):
        store.open()
    assert (store.directory / name).read_text() == "not yours"
