"""From settings to tiers, and the store by hand: what it keeps, for whom, and what a bad setting is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import lmcache_sglang
from lmcache_sglang import config as config_module
from lmcache_sglang.config import Config
from lmcache_sglang.errors import ConfigError, Reason, TierError
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.admission import All, MinimumPrefix, SecondTouch
from lmcache_sglang.storage.base import Below, Tier
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.plan import SLABS_WANTED
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.store import Store, open_chain, require_room
from lmcache_sglang.testing.tier_suite import OTHER_NAMESPACE, PAGE, a_key, bytes_of, some_keys

MIB = 1 << 20
SOON = 30.0

Opener = Callable[..., Chain]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens a chain by the sizes of its tiers, and more; closes it after the test."""
    chains: list[Chain] = []

    def open_(cpu: object, disk: object, **more: object) -> Chain:
        settings = {"path": tmp_path / "store", "cpu": {"size": cpu}}
        chains.append(open_chain(Config.of(settings | {"disk": {"size": disk} | more})))
        return chains[-1]

    yield open_
    for chain in chains:
        chain.close()


def tier(chain: Chain, name: str) -> SlabTier:
    found: Tier = next(tier for tier in chain.tiers if tier.name == name)
    assert isinstance(found, SlabTier)
    return found


def names(chain: Chain) -> list[str]:
    return [tier.name for tier in chain.tiers]


def put_page(chain: Chain, number: int, size: int) -> bool:
    return chain.put([a_key(number)], PageSegments.of_buffers([bytes(size)])) == [True]


# From settings to tiers.


@pytest.mark.parametrize("off", [0, "0", "0GiB"])
def test_a_tier_of_size_nothing_is_off(
    opened: Opener, off: object, tmp_path: Path, shared_memory: Path
) -> None:
    assert names(opened("64MiB", off)) == ["cpu"]
    assert not (tmp_path / "store").exists()
    shutil.rmtree(shared_memory)
    shared_memory.mkdir()
    assert names(opened(off, "16MiB")) == ["disk"]
    assert list(shared_memory.iterdir()) == []


def test_both_tiers_come_in_order_memory_first(opened: Opener) -> None:
    chain = opened("64MiB", "16MiB")
    assert names(chain) == ["cpu", "disk"]
    assert [tier.capacity for tier in chain.tiers] == [64 * MIB, 16 * MIB]
    assert tier(chain, "cpu").place.memory
    assert not tier(chain, "disk").place.memory


def test_automatic_sizes_open(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_free", lambda path: 600 * MIB)
    chain = opened("auto", "auto")
    assert [tier.capacity for tier in chain.tiers] == [300 * MIB, 150 * MIB]
    require_room(chain, 4096)


def test_a_container_with_a_small_dev_shm_runs_without_a_cpu_tier_and_is_told(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(config_module, "_free", lambda path: 64 * MIB)
    assert names(opened("auto", "16MiB")) == ["disk"]
    assert "no CPU tier" in caplog.text
    assert "--shm-size" in caplog.text
    with pytest.raises(ConfigError, match="--shm-size") as caught:
        opened("auto", 0)
    assert caught.value.setting == "cpu.size"


def test_memory_that_is_none_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shared_memory: Path
) -> None:
    settings = {"path": tmp_path / "store", "disk": {"size": 0}}
    proc = tmp_path / "memory"
    open_chain(Config.of(settings | {"cpu": {"size": "8MiB", "path": proc}})).close()
    assert ("cpu.path" in caplog.text) == (kind_of(tmp_path) != "tmpfs")
    caplog.clear()
    open_chain(Config.of(settings | {"cpu": {"size": "8MiB", "path": shared_memory / "m"}})).close()
    assert "cpu.path" not in caplog.text


def kind_of(path: Path) -> str:
    from lmcache_sglang.storage.slab.filesystem import mount_of

    return mount_of(path).kind


@pytest.mark.parametrize(
    ("settings", "policy", "below"),
    [
        ({}, All(), Below.NOW),
        ({"mode": "write-back"}, All("write-back"), Below.ON_EVICT),
        ({"admission": "second-touch"}, SecondTouch(), Below.ON_TOUCH),
        ({"minimum_prefix": 4}, MinimumPrefix(4, All()), Below.NOW),
        (
            {"minimum_prefix": 4, "admission": "second-touch"},
            MinimumPrefix(4, SecondTouch()),
            Below.ON_TOUCH,
        ),
    ],
    ids=str,
)
def test_the_policies_are_those_of_the_settings(
    opened: Opener, settings: dict[str, Any], policy: object, below: Below
) -> None:
    chain = opened("8MiB", "8MiB", **settings)
    assert chain._admission == policy
    assert tier(chain, "cpu")._below is below
    assert tier(chain, "disk")._below is Below.NEVER


def test_the_other_settings_reach_their_tiers(tmp_path: Path) -> None:
    cpu = {"size": "8MiB", "eviction": "lru", "threads": 5, "huge_pages": True}
    disk = {
        "size": "8MiB",
        "eviction": "s3-fifo",
        "durability": "relaxed",
        "queue_depth": 3,
        "engine": "threads",
        "direct": False,
        "promotion": "never",
    }
    with closing(open_chain(Config.of({"path": tmp_path, "cpu": cpu, "disk": disk}))) as chain:
        above, below = tier(chain, "cpu").settings, tier(chain, "disk").settings
        assert (above.eviction, above.threads, above.huge_pages) == ("lru", 5, True)
        assert (below.eviction, below.durable, below.queue_depth) == ("s3-fifo", False, 3)
        assert (below.engine, below.direct) == ("threads", False)
        assert chain._promotion == "never"


@pytest.mark.parametrize(
    ("cpu", "disk", "page", "blamed"),
    [
        ("8MiB", 0, MIB, "cpu.size"),
        ("8MiB", "64MiB", MIB, "cpu.size"),
        (0, "8MiB", MIB, "disk.size"),
        ("64MiB", "8MiB", MIB, "disk.size"),
    ],
)
def test_a_limit_below_one_page_is_named_with_one_that_does(
    opened: Opener, cpu: object, disk: object, page: int, blamed: str, tmp_path: Path
) -> None:
    chain = opened(cpu, disk)
    with pytest.raises(ConfigError) as caught:
        require_room(chain, page)
    assert caught.value.setting == blamed
    said = caught.value.problem
    assert str(page) in said
    enough = int(said.split("at least ")[1].split(",")[0])
    assert enough == 2 * SLABS_WANTED * page
    other = Place(tmp_path / "other", memory=False)
    with closing(SlabTier(other, enough)) as larger:
        assert larger.fits(page)


@pytest.mark.parametrize(
    ("cpu", "disk", "page"),
    [("8MiB", 0, 64 << 10), ("64MiB", "64MiB", MIB), (0, "64MiB", MIB), ("80MiB", "64MiB", 1)],
)
def test_a_limit_that_passes_does_keep_a_page(
    opened: Opener, cpu: object, disk: object, page: int
) -> None:
    chain = opened(cpu, disk)
    require_room(chain, page)
    assert put_page(chain, 1, page)
    assert chain.flush(SOON)
    for each in chain.tiers:
        assert each.stats().pages == 1, each.name
    assert chain.faults.counts() == {}


@pytest.mark.parametrize("size", [1, "64KiB"])
@pytest.mark.parametrize("which", ["cpu", "disk"])
def test_a_size_too_small_for_any_store_is_named_and_leaves_nothing_open(
    opened: Opener, size: object, which: str
) -> None:
    sizes = {"cpu": "8MiB", "disk": "8MiB"}
    with pytest.raises(ConfigError) as caught:
        opened(**sizes | {which: size})
    assert caught.value.setting == f"{which}.size"
    opened(**sizes)  # in this process, where a directory can be open once


def test_a_lock_that_cannot_be_made_leaves_nothing_open(
    opened: Opener, shared_memory: Path
) -> None:
    opened("8MiB", "8MiB").close()
    (lock,) = shared_memory.rglob("keeper")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(ConfigError) as caught:
        opened("8MiB", "8MiB")
    assert caught.value.setting == "cpu.path"
    lock.rmdir()
    opened("8MiB", "8MiB")


def test_a_full_disk_does_not_turn_the_tier_off_without_a_word(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An automatic size of a full disk is 0, which a user did not ask for."""
    monkeypatch.setattr("lmcache_sglang.config.DISK_SHARE", 0.0)
    with pytest.raises(ConfigError) as caught:
        opened("64MiB", "auto")
    assert caught.value.setting == "disk.size"


@pytest.mark.parametrize("which", ["path", "cpu.path"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, which: str) -> None:
    (tmp_path / "file").write_text("mine")
    settings: dict[str, Any] = {"path": tmp_path / "store", "cpu": {"size": "8MiB"}}
    if which == "path":
        settings["path"] = tmp_path / "file"
    else:
        settings["cpu"]["path"] = tmp_path / "file"
    with pytest.raises(ConfigError) as caught:
        open_chain(Config.of(settings | {"disk": {"size": "16MiB"}}))
    assert caught.value.setting == which
    assert (tmp_path / "file").read_text() == "mine"


# The store by hand.


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.of({"path": tmp_path, "cpu": {"size": "8MiB"}, "disk": {"size": "16MiB"}})


def buffers(count: int) -> list[bytearray]:
    return [bytearray(PAGE) for _ in range(count)]


def test_pages_are_put_and_got_as_buffers(config: Config) -> None:
    keys = some_keys(4)
    pages, into = [bytes_of(key) for key in keys], buffers(4)
    with lmcache_sglang.Store(config) as store:
        assert store.put(keys[:3], pages[:3]) == [True] * 3
        assert store.exists(keys) == [True, True, True, False]
        assert store.get(keys, into) == [True, True, True, False]
        assert [bytes(page) for page in into[:3]] == pages[:3]
        assert store.flush(SOON)
        assert [stats.pages for stats in store.stats()] == [3, 3]
        assert all(report.ok for report in store.check().values())
        assert store.faults() == {}
    with lmcache_sglang.Store(config) as store:
        assert store.exists(keys) == [True, True, True, False]


def test_segments_are_taken_as_they_are(config: Config) -> None:
    (key,) = some_keys(1)
    page, into = bytes_of(key), bytearray(PAGE)
    with Store(config) as store:
        assert store.put([key], PageSegments.of_buffers([page])) == [True]
        assert store.get([key], PageSegments.of_buffers([into], writable=True)) == [True]
    assert bytes(into) == page


def test_memory_that_may_not_be_written_is_the_callers_mistake(config: Config) -> None:
    (key,) = some_keys(1)
    with Store(config) as store:
        store.put([key], [bytes_of(key)])
        with pytest.raises((ValueError, BufferError, TypeError)):
            store.get([key], [bytes(PAGE)])


def test_clear_forgets_one_namespace(config: Config) -> None:
    ours, theirs = some_keys(2), [a_key(number, OTHER_NAMESPACE) for number in range(3)]
    with Store(config) as store:
        store.put(ours, [bytes_of(key) for key in ours])
        store.put(theirs, [bytes_of(key) for key in theirs])
        assert store.clear(OTHER_NAMESPACE) == 3
        assert store.exists(ours + theirs) == [True] * 2 + [False] * 3


@pytest.fixture
def by_lru(tmp_path: Path) -> Config:
    """SIEVE comes back to a page that it has passed only when others have been used since."""
    cpu, disk = ({"size": size, "eviction": "lru"} for size in ("8MiB", "16MiB"))
    return Config.of({"path": tmp_path, "cpu": cpu, "disk": disk})


def test_a_pinned_page_and_its_ancestors_stay_until_the_pin_ends(by_lru: Config) -> None:
    chain, others = some_keys(3), some_keys(400, start=100)
    with Store(by_lru) as store:
        store.put(chain, [bytes_of(key) for key in chain])
        assert store.flush(SOON)
        store.pin(chain[2:], 3600.0)
        for key in others:  # more than either tier holds
            store.put([key], [bytes_of(key)])
        assert store.flush(SOON)
        for each in store._slabs():
            assert each.exists(chain) == [True] * 3, each.name
        store.pin(chain[2:], 0)
        for key in others:
            store.put([key], [bytes_of(key)])
        assert store.flush(SOON)
        assert store.exists(chain) == [False] * 3


def test_a_pin_ends_by_itself(by_lru: Config) -> None:
    (key,), others = some_keys(1), some_keys(400, start=100)
    with Store(by_lru) as store:
        store.put([key], [bytes_of(key)])
        assert store.flush(SOON)
        store.pin([key], 0.01)
        time.sleep(2.1)  # a pin is counted in whole seconds
        for other in others:
            store.put([other], [bytes_of(other)])
        assert store.flush(SOON)
        assert store.exists([key]) == [False]


def test_a_quota_bounds_one_namespace_and_no_other(config: Config) -> None:
    theirs = [a_key(number, OTHER_NAMESPACE) for number in range(60)]
    ours = some_keys(30)
    with Store(config) as store:
        store.put(ours, [bytes_of(key) for key in ours])
        store.set_quota(OTHER_NAMESPACE, 10 * PAGE)
        for key in theirs:
            store.put([key], [bytes_of(key)])
        assert store.flush(SOON)
        here = store.exists(theirs)
        assert 1 <= sum(here) <= 20  # ten in each tier, not all the same
        assert here[-1]
        assert store.exists(ours) == [True] * 30
    with Store(config) as store:  # it lasts
        for key in theirs:
            store.put([key], [bytes_of(key)])
        assert store.flush(SOON)
        assert sum(store.exists(theirs)) <= 20
        store.set_quota(OTHER_NAMESPACE, 0)
        for key in theirs:
            store.put([key], [bytes_of(key)])
        assert sum(store.exists(theirs)) == 60


def test_a_parent_that_is_named_outlives_what_follows_it(config: Config) -> None:
    head, tail, others = some_keys(3), some_keys(3, start=10), some_keys(400, start=100)
    with Store(config) as store:
        store.put(tail, [bytes_of(key) for key in tail], parent=head[-1], position=3)
        store.put(head, [bytes_of(key) for key in head])
        for key in others:
            store.put([key], [bytes_of(key)])
            here = store.exists(head + tail)
            assert here == sorted(here, reverse=True), "a page was kept without its ancestors"
        assert not all(here)


def test_a_closed_store_misses_and_closes_again(config: Config) -> None:
    store = Store(config)
    store.put(some_keys(1), [bytes_of(a_key(0))])
    store.close()
    store.close()
    assert store.exists(some_keys(1)) == [False]
    assert store.get(some_keys(1), buffers(1)) == [False]
    with pytest.raises(TierError) as caught:
        store.pin(some_keys(1), 1.0)
    assert caught.value.reason is Reason.CLOSED
    assert store.faults()["cpu.closed"] >= 1


def test_without_settings_the_environments_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"path: {tmp_path / 'store'}\ncpu: {{size: 0}}\ndisk: {{size: 8MiB}}\n")
    monkeypatch.setenv(config_module.ENVIRONMENT, str(file))
    with Store() as store:
        assert [stats.name for stats in store.stats()] == ["disk"]
    assert (tmp_path / "store" / "region").is_file()


def test_a_program_that_ends_without_closing_ends_as_it_says(
    tmp_path: Path, shared_memory: Path
) -> None:
    """Its background thread must not outlive the interpreter: that ended it with SIGABRT."""
    program = f"""
import sys
from lmcache_sglang import Config, Store
from lmcache_sglang.storage.base import page_key
cpu = {{"size": "16MiB", "path": {str(shared_memory / "unclosed")!r}}}
store = Store(Config.of({{"path": {str(tmp_path / "unclosed")!r}, "cpu": cpu, "disk": {{"size": "32MiB"}}}}))
store.put([page_key(bytes(16), bytes(32))], [bytes(4096)])
sys.exit(3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (3, "")
