"""Damaged files: recomputed, counted, healed; or refused at start, and never touched."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.storage.slab import files
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.engine import (
    PAGE_SIZE,
    Answer,
    Setup,
    ask,
    disk_tier,
    memory_tier,
    prompt,
    server,
    whole_pages,
)
from lmcache_sglang.testing.server import ServerFailed

FIRST = prompt(1)
PAGES = len(FIRST) // PAGE_SIZE
POOL = ("--max-total-tokens", "2048")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", args=POOL)


@pytest.fixture(scope="module")
def cold(model: Path, folder: Path, setup: Setup) -> Answer:
    with server(model, setup, folder / "cold.log") as engine:
        return ask(engine, FIRST)


def test_flipped_bits_in_memory_are_served_from_the_disk(
    model: Path, folder: Path, setup: Setup, cold: Answer
) -> None:
    flip_a_bit_in_every_page(setup.memory / files.REGION)
    with server(model, setup, folder / "memory.log") as engine:
        answer = ask(engine, FIRST)
        log = engine.log
    assert answer.tokens == cold.tokens
    assert answer.storage == whole_pages(FIRST)
    assert "cpu tier: corrupt: a page's bytes did not match its checksum" in log
    with closing(memory_tier(setup)) as tier:
        require_healed(tier)


def test_flipped_bits_on_the_disk_are_recomputed_counted_and_healed(
    model: Path, folder: Path, setup: Setup, cold: Answer
) -> None:
    setup.forget_memory()
    flip_a_bit_in_every_page(setup.store / files.REGION)
    with server(model, setup, folder / "damaged.log") as engine:
        damaged = ask(engine, FIRST)
        log = engine.log
    assert damaged.tokens == cold.tokens
    assert damaged.storage == 0
    assert "disk tier: corrupt: a page's bytes did not match its checksum" in log
    setup.forget_memory()
    with server(model, setup, folder / "healed.log") as engine:
        healed = ask(engine, FIRST)
    assert healed.tokens == cold.tokens
    assert healed.storage == whole_pages(FIRST)
    with closing(disk_tier(setup)) as tier:
        require_healed(tier)


def test_an_index_of_garbage_stops_the_start_and_stays_as_it_was(
    model: Path, folder: Path, setup: Setup, cold: Answer
) -> None:
    """The last test that uses this store."""
    index = setup.store / files.INDEX
    index.write_bytes(random.Random(1).randbytes(1 << 20))
    before = index.read_bytes()
    with pytest.raises(
        ServerFailed, match=r"path: .*index (belongs to another program|is damaged)"
    ):
        server(model, setup, folder / "garbage.log").start()
    assert index.read_bytes() == before


def test_the_first_versions_store_stops_the_start_and_stays_as_it_was(
    model: Path, folder: Path
) -> None:
    setup = Setup(folder / "first-version", args=POOL)
    setup.store.mkdir()
    file = setup.store / "pages.lmdb"
    file.write_bytes(b"pages of the first version")
    with pytest.raises(ServerFailed, match=r"path: .*pages\.lmdb was written in format 1"):
        server(model, setup, folder / "first-version.log").start()
    assert file.read_bytes() == b"pages of the first version"


def require_healed(tier: SlabTier) -> None:
    """All that was read. Three pages were not: the prompt's last, the answer's, and SGLang's own."""
    report = tier.check()
    assert report.pages >= whole_pages(FIRST) // PAGE_SIZE
    assert len(report.corrupt) <= 3
    assert not report.problems


def flip_a_bit_in_every_page(region: Path) -> None:
    """In the middle of each slot that holds something: slots of this model are whole multiples of 4 KiB."""
    data = bytearray(region.read_bytes())
    blocks = [at for at in range(0, len(data), 4096) if any(data[at : at + 4096])]
    assert len(blocks) >= PAGES
    for at in blocks:
        data[at + 2048] ^= 1
    with region.open("r+b") as file:  # in place: its space is allocated
        file.write(data)
