"""What all processes of a store must do alike is as the first of them was told."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage.slab import files
from lmcache_sglang.storage.slab.settings import Eviction, SlabSettings
from lmcache_sglang.testing.small_store import SmallStore, put
from lmcache_sglang.testing.store_process import run

CAPACITY = 1 << 20
VERSION_AT = 8  # of the control block (csrc/control.hpp)


def fill_a_little(store: SmallStore, start: int) -> bool:
    """What another process does, with settings of its own; whether the store is sound to it."""
    with store.opened() as tier:
        for number in range(start, start + 40):
            put(tier, [number])
        return tier.check().ok


@pytest.mark.parametrize("others", ["sieve", "lru"])
def test_processes_with_different_policies_keep_one_set_of_lists(
    shared_memory: Path, others: Eviction
) -> None:
    store = SmallStore(shared_memory / "store", True, CAPACITY, SlabSettings(eviction="s3-fifo"))
    other = replace(store, settings=SlabSettings(eviction=others))
    with store.opened() as tier:
        for start in range(0, 400, 80):
            for number in range(start, start + 40):
                put(tier, [number])
            assert run(fill_a_little, other, start + 40)
        assert tier.check().ok


def what_opening_tells(store: SmallStore) -> list[str]:
    """What another process logs, as warnings, when it opens the store."""
    told = BufferingHandler(100)
    told.setLevel(logging.WARNING)
    logging.getLogger().addHandler(told)
    with store.opened():
        return [record.getMessage() for record in told.buffer]


def test_who_comes_second_is_told_what_holds(shared_memory: Path) -> None:
    store = SmallStore(shared_memory / "store", False, CAPACITY, SlabSettings(eviction="lru"))
    other = replace(store, settings=SlabSettings(eviction="sieve", durable=False))
    with store.opened():
        assert run(what_opening_tells, store) == []
        eviction, durability = run(what_opening_tells, other)
    assert "eviction asked for here is sieve" in eviction and "was told lru" in eviction
    assert "durability asked for here is ordered" in durability and "was told durable" in durability


def test_another_version_on_a_live_store_is_refused_and_told_what_to_do(
    shared_memory: Path,
) -> None:
    store = SmallStore(shared_memory / "store", True, CAPACITY)
    with store.opened() as tier:
        put(tier, range(4))
        control = store.directory / files.CONTROL
        content = bytearray(control.read_bytes())
        content[VERSION_AT] += 1
        with control.open("r+b") as file:
            file.write(content[: VERSION_AT + 1])
        message = run(why_refused, store)
        assert "stop the engines of the other version first" in message


def test_one_process_too_many_is_told_so(shared_memory: Path) -> None:
    """Each holds the lock of a byte; here the test holds all but the one of this process."""
    store = SmallStore(shared_memory / "store", True, CAPACITY)
    with store.opened(), (store.directory / files.OWNERS).open("r+b") as owners:
        others = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 2, 254, 0)
        fcntl.fcntl(owners, fcntl.F_OFD_SETLK, others)
        assert "255 processes have the store open" in run(why_refused, store)


def why_refused(store: SmallStore) -> str:
    with pytest.raises(ConfigError) as caught:
        store.open()
    return str(caught.value)
