"""From settings to tiers: who gets how much, and what a limit that is too small is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.config import Config
from lmcache_sglang.errors import ConfigError
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import KEY_BYTES, Tier
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.disk.tier import USABLE
from lmcache_sglang.store import SPILL_SHARE, open_chain, require_room

MIB = 1 << 20

Opener = Callable[..., Chain]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens a chain by the sizes of its tiers; closes it after the test."""
    chains: list[Chain] = []

    def open_(cpu: object, disk: object, **options: Any) -> Chain:
        settings = {"path": tmp_path / "store", "cpu": {"size": cpu}, "disk": {"size": disk}}
        chains.append(open_chain(Config.of(settings), **options))
        return chains[-1]

    yield open_
    for chain in chains:
        chain.close()


def tier(chain: Chain, name: str) -> Tier:
    return next(tier for tier in chain.tiers if tier.name == name)


def names(chain: Chain) -> list[str]:
    return [tier.name for tier in chain.tiers]


def put_page(chain: Chain, number: int, size: int) -> bool:
    key = number.to_bytes(KEY_BYTES, "big")
    return chain.put([key], PageSegments.of_buffers([bytes(size)])) == [True]


@pytest.mark.parametrize("sharers", [1, 2, 8])
def test_ranks_of_a_node_share_the_memory_they_were_given(opened: Opener, sharers: int) -> None:
    chain = opened("64MiB", 0, sharers=sharers)
    assert tier(chain, "cpu").capacity == 64 * MIB // sharers


@pytest.mark.parametrize("sharers", [1, 4])
def test_pages_on_their_way_down_are_part_of_the_memory_limit(opened: Opener, sharers: int) -> None:
    chain = opened("64MiB", "16MiB", sharers=sharers)
    waiting = int(64 * MIB // sharers * SPILL_SHARE)
    assert tier(chain, "cpu").capacity == 64 * MIB // sharers - waiting


def test_the_disk_is_one_for_all_ranks(opened: Opener) -> None:
    chain = opened("64MiB", "16MiB", sharers=8)
    assert tier(chain, "disk").capacity == int(16 * MIB * USABLE)


def test_no_sharers_is_taken_for_one(opened: Opener) -> None:
    assert tier(opened("64MiB", 0, sharers=0), "cpu").capacity == 64 * MIB


@pytest.mark.parametrize("off", [0, "0", "0GiB"])
def test_a_tier_of_size_nothing_is_off(opened: Opener, off: object, tmp_path: Path) -> None:
    assert names(opened("64MiB", off)) == ["cpu"]
    assert not (tmp_path / "store").exists()
    assert names(opened(off, "16MiB")) == ["disk"]


def test_both_tiers_come_in_order_memory_first(opened: Opener) -> None:
    assert names(opened("64MiB", "16MiB")) == ["cpu", "disk"]


def test_automatic_sizes_open(opened: Opener) -> None:
    chain = opened("auto", "auto")
    assert all(tier.capacity > 0 for tier in chain.tiers)
    require_room(chain, 4096)


@pytest.mark.parametrize(
    ("cpu", "disk", "page", "blamed"),
    [
        (1000, 0, 1001, "cpu.size"),
        (1000, "16MiB", 751, "cpu.size"),  # a quarter is for pages on their way down
        (0, "1MiB", 512 << 10, "disk.size"),
        ("64MiB", "1MiB", 512 << 10, "disk.size"),
        (2 * MIB, "16MiB", MIB, "cpu.size"),  # fits the tier, but never what waits for the disk
    ],
)
def test_a_limit_below_one_page_is_named(
    opened: Opener, cpu: object, disk: object, page: int, blamed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        require_room(opened(cpu, disk), page)
    assert caught.value.setting == blamed
    assert str(page) in str(caught.value)


@pytest.mark.parametrize(
    ("cpu", "disk", "page"),
    [(1000, 0, 1000), (4 * MIB, "16MiB", MIB), (0, "16MiB", MIB), ("64MiB", "16MiB", MIB)],
)
def test_a_limit_that_passes_does_keep_a_page(
    opened: Opener, cpu: object, disk: object, page: int
) -> None:
    chain = opened(cpu, disk)
    require_room(chain, page)
    assert put_page(chain, 1, page)
    assert chain.flush(30.0)
    for each in chain.tiers:
        assert each.stats().pages == 1, each.name
    assert chain.faults.counts() == {}


def test_more_ranks_than_bytes_is_a_limit_too_small_and_not_a_tier_turned_off(
    opened: Opener,
) -> None:
    with pytest.raises(ConfigError) as caught:
        require_room(opened(3, 0, sharers=4), 4096)
    assert caught.value.setting == "cpu.size"


@pytest.mark.parametrize("size", [1, "64KiB"])
def test_a_disk_too_small_for_any_store_is_named_at_the_opening(
    opened: Opener, size: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        opened("64MiB", size)
    assert caught.value.setting == "disk.size"


def test_a_full_disk_does_not_turn_the_tier_off_without_a_word(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An automatic size of a full disk is 0, which a user did not ask for."""
    monkeypatch.setattr("lmcache_sglang.config.DISK_SHARE", 0.0)
    with pytest.raises(ConfigError) as caught:
        opened("64MiB", "auto")
    assert caught.value.setting == "disk.size"


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        open_chain(Config.of({"path": tmp_path / "file", "disk": {"size": "16MiB"}}))
    assert caught.value.setting == "path"
    assert (tmp_path / "file").read_text() == "mine"
