"""Damaged files: recomputed, counted, healed; or refused at start, and never touched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Answer, Setup, ask, prompt, server, whole_pages
from lmcache_sglang.testing.server import ServerFailed

FIRST = prompt(1)
PAGES = len(FIRST) // 16
POOL = ("--max-total-tokens", "2048")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", args=POOL)


@pytest.fixture(scope="module")
def cold(model: Path, folder: Path, setup: Setup) -> Answer:
    with server(model, setup, folder / "cold.log") as engine:
        return ask(engine, FIRST)


def test_a_flipped_bit_is_recomputed_counted_and_healed(
    model: Path, folder: Path, setup: Setup, cold: Answer
) -> None:
    file = setup.store / "pages.lmdb"
    flip_a_bit_in_every_page(file)
    with server(model, setup, folder / "damaged.log") as engine:
        damaged = ask(engine, FIRST)
        log = engine.log
    assert damaged.tokens == cold.tokens
    assert damaged.storage == 0
    assert "disk tier: corrupt: a page's bytes did not match its checksum" in log
    with server(model, setup, folder / "healed.log") as engine:
        healed = ask(engine, FIRST)
    assert healed.tokens == cold.tokens
    assert healed.storage >= 0.95 * whole_pages(FIRST)


def test_a_file_of_garbage_stops_the_start_and_stays_as_it_was(model: Path, folder: Path) -> None:
    setup = Setup(folder / "garbage", args=POOL)
    setup.store.mkdir()
    file = setup.store / "pages.lmdb"
    file.write_bytes(random.Random(1).randbytes(1 << 20))
    before = file.read_bytes()
    with pytest.raises(ServerFailed, match=r"path: .*pages\.lmdb belongs to another program"):
        server(model, setup, folder / "garbage.log").start()
    assert file.read_bytes() == before


def flip_a_bit_in_every_page(file: Path) -> None:
    """In the middle of each run of LMDB pages that holds one of ours, found by its size.

    LMDB marks the first page of such a run with flag 0x04 and the run's length (mdb.c, MDB_page).
    """
    data = bytearray(file.read_bytes())
    found = 0
    for at in range(0, len(data), 4096):
        flags = int.from_bytes(data[at + 10 : at + 12], "little")
        run = int.from_bytes(data[at + 12 : at + 16], "little")
        if (
            flags == 0x04
            and 2 <= run <= 64
            and int.from_bytes(data[at : at + 8], "little") * 4096 == at
        ):
            data[at + run * 2048] ^= 1
            found += 1
    assert found >= PAGES
    file.write_bytes(data)
