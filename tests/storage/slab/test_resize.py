"""A store that is opened with another size: the pages that have room stay, and the limit holds at once."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage.base import Lookup
from lmcache_sglang.storage.slab import files
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.engine import until
from lmcache_sglang.testing.small_store import SmallStore, get, here, put
from lmcache_sglang.testing.store_process import Job
from lmcache_sglang.testing.tier_suite import some_keys
from lmcache_sglang.testing.two_tiers import TwoTiers, keep_open
from lmcache_sglang.testing.two_tiers import put as put_pages

MIB = 1 << 20
SIZE = 8 * MIB
PAGES = range(160)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path, shared_memory: Path) -> SmallStore:
    memory = request.param == "memory"
    return SmallStore((shared_memory if memory else tmp_path) / "store", memory, SIZE)


def of(store: SmallStore, size: int) -> SmallStore:
    return replace(store, capacity=size)


def fill(store: SmallStore) -> set[int]:
    """Pages that are there once it is closed."""
    with store.opened() as tier:
        for start in range(0, len(PAGES), 10):
            put(tier, PAGES[start : start + 10], [b""] * 10)
        return here(tier, PAGES)


def require_sound(tier: SlabTier, store: SmallStore) -> None:
    found = get(tier, PAGES)  # checked to the byte
    assert {i for i, lookup in enumerate(found) if lookup is Lookup.HIT} == here(tier, PAGES)
    assert set(found) <= {Lookup.HIT, Lookup.MISS}
    assert tier.check().ok
    assert tier.stats().bytes <= tier.capacity == store.capacity
    assert store.allocated() <= store.capacity


@pytest.mark.parametrize("size", [SIZE + 1, SIZE + MIB, 3 * SIZE])
def test_a_larger_store_has_all_it_had_and_room_for_more(store: SmallStore, size: int) -> None:
    before = fill(store)
    larger = of(store, size)
    with larger.opened() as tier:
        assert here(tier, PAGES) == before
        require_sound(tier, larger)
        put(tier, PAGES, [b""] * len(PAGES))
        require_sound(tier, larger)
        if size == 3 * SIZE:
            assert here(tier, PAGES) == set(PAGES)


@pytest.mark.parametrize("size", [SIZE - MIB, SIZE // 2, SIZE // 4])
def test_a_smaller_store_has_what_fits_and_keeps_its_limit_at_once(
    store: SmallStore, size: int
) -> None:
    before = fill(store)
    smaller = of(store, size)
    with smaller.opened() as tier:
        after = here(tier, PAGES)
        assert after <= before
        assert after
        assert size > SIZE // 2 or after < before
        require_sound(tier, smaller)
        put(tier, PAGES, [b""] * len(PAGES))
        require_sound(tier, smaller)


def test_down_and_up_again_loses_no_more_than_the_way_down(store: SmallStore) -> None:
    fill(store)
    with of(store, SIZE // 4).opened() as tier:
        left = here(tier, PAGES)
    with store.opened() as tier:
        assert here(tier, PAGES) == left
        require_sound(tier, store)
        put(tier, PAGES, [b""] * len(PAGES))
        require_sound(tier, store)


def test_the_same_size_changes_nothing(store: SmallStore) -> None:
    before = fill(store)
    sizes = {file.name: file.stat().st_size for file in store.directory.iterdir()}
    with store.opened() as tier:
        assert here(tier, PAGES) == before
        require_sound(tier, store)
    assert {file.name: file.stat().st_size for file in store.directory.iterdir()} == sizes


def test_pins_and_quotas_outlive_a_resize(store: SmallStore) -> None:
    from lmcache_sglang.testing.small_store import OWN_NAMESPACE, key_of

    with store.opened() as tier:
        put(tier, [0, 1, 2], [b""] * 3)
        tier.pin([key_of(0)], 3600.0)
        tier.set_quota(OWN_NAMESPACE, MIB)
    larger = of(store, 2 * SIZE)
    with larger.opened() as tier:
        own = [number for number in range(1000) if number % 4 != 3]
        for number in own[3:]:
            put(tier, [number], [b""])
        assert here(tier, [0]) == {0}  # although the oldest
        assert len(here(tier, own)) < len(own) // 2
        assert tier.stats().bytes <= 2 * MIB  # far below what the store has room for


def test_a_store_that_cannot_grow_is_refused_and_keeps_its_pages(
    store: SmallStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = fill(store)
    whole = {file.name: file.stat().st_size for file in store.directory.iterdir()}

    def full(handle: int, size: int, file: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in (files.REGION, files.CONTROL):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match="No space") as caught:
            patch.setattr(files, "_reserve", full)
            of(store, 2 * SIZE).open()
        assert caught.value.setting == "disk.size"
        assert (store.directory / name).stat().st_size == whole[name]
    with store.opened() as tier:
        assert here(tier, PAGES) == before
        require_sound(tier, store)
    assert "was shortened" not in caplog.text


def test_a_size_below_one_slab_of_an_old_store_is_refused_with_one_that_does(
    store: SmallStore,
) -> None:
    before = fill(store)
    with pytest.raises(ConfigError, match="smallest store takes") as caught:
        of(store, 400_000).open()
    enough = int(caught.value.problem.split("takes ")[1].split(";")[0])
    with store.opened() as tier:
        assert here(tier, PAGES) == before
    with of(store, enough).opened() as tier:
        require_sound(tier, of(store, enough))


@pytest.mark.parametrize("empty", [True, False])
def test_only_an_empty_store_takes_the_slabs_of_its_new_size(
    store: SmallStore, empty: bool
) -> None:
    """Slabs bound the size of a page, and a start that was refused for it leaves an empty store."""
    with store.opened() as tier:
        before = tier.head.slab_bytes
        if not empty:
            put(tier, [1])
    with of(store, 8 * SIZE).opened() as tier:
        assert tier.head.slab_bytes == (8 * before if empty else before)
        assert here(tier, [1]) == (set() if empty else {1})
        put(tier, PAGES, [b""] * len(PAGES))
        require_sound(tier, of(store, 8 * SIZE))


def test_processes_that_disagree_keep_the_size_of_the_first(
    tiers: TwoTiers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is mapped; both must see it alike."""
    tiers.but(upper_bytes=16 * MIB, lower_bytes=16 * MIB).open().close()
    other = Job(keep_open, tiers.but(upper_bytes=16 * MIB, lower_bytes=16 * MIB), tmp_path / "here")
    until((tmp_path / "here").exists)
    with closing(tiers.open()) as chain:  # asks for more
        assert all(stats.capacity <= 16 * MIB for stats in chain.stats())
        assert put_pages(chain, some_keys(40)) == [True] * 40
    assert "is open in another process" in caplog.text
    assert "cpu.size" in caplog.text and "disk.size" in caplog.text
    other.kill()
    with closing(tiers.open()) as chain:  # the first of them now
        assert [stats.capacity for stats in chain.stats()] == [64 * MIB] * 2
        assert chain.exists(some_keys(40)) == [True] * 40
