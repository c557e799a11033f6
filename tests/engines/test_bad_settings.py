"""Settings that cannot work stop the start with one clear line; a disk that fails later stops nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Setup, ask, pages_on_disk, prompt, server, until
from lmcache_sglang.testing.server import ServerFailed

POOL = ("--max-total-tokens", "2048")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpus": {}}, "cpus: there is no such key; did you mean cpu"),
        ({"disk": {"size": "much"}}, "disk.size: 'much' is no size"),
        ("{not json", "--hicache-storage-backend-extra-config: not JSON"),
    ],
    ids=["unknown key", "bad size", "bad syntax"],
)
def test_a_wrong_setting_stops_the_start_before_the_model_loads(
    model: Path, folder: Path, settings: Mapping[str, object] | str, message: str
) -> None:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    flags = ["--hicache-storage-backend", "lmcache"]
    flags += ["--hicache-storage-backend-extra-config", text]
    setup = Setup(folder / "unused", flag=False, args=[*POOL, *flags])
    engine = server(model, setup, folder / "wrong.log")
    with pytest.raises(ServerFailed):
        engine.start()
    assert message in engine.log
    assert "Load weight" not in engine.log


def test_a_directory_that_cannot_be_made_stops_the_start(model: Path, folder: Path) -> None:
    (folder / "a-file").write_text("the user's own")
    setup = Setup(folder / "a-file" / "store", args=POOL)
    engine = server(model, setup, folder / "unmade.log")
    with pytest.raises(ServerFailed):
        engine.start()
    assert "ConfigError: path: cannot make the directory" in engine.log
    assert (folder / "a-file").read_text() == "the user's own"


@pytest.mark.parametrize(
    ("cpu", "says"),
    [
        ("10KiB", "ConfigError: cpu.size: 10240 bytes; the smallest store takes"),
        ("512KiB", "ConfigError: cpu.size: pages of this model take 131072 bytes"),
    ],
)
def test_a_limit_below_one_page_stops_the_start(
    model: Path, folder: Path, cpu: str, says: str
) -> None:
    setup = Setup(folder / "small", cpu=cpu, args=POOL, page_size=64)
    engine = server(model, setup, folder / "small.log")
    with pytest.raises(ServerFailed):
        engine.start()
    assert says in engine.log


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_medium_without_so_much_room_is_found_at_the_start(
    model: Path, folder: Path, tier: str
) -> None:
    """The kernel refuses a file of that size, as a full file system or a small /dev/shm would."""
    limited = folder / f"limited-python-{tier}"
    limited.write_text(f'#!/bin/bash\nulimit -f 32768\nexec "{sys.executable}" "$@"\n')
    limited.chmod(0o755)
    cpu, disk = ("64MiB" if tier == name else "16MiB" for name in ("cpu", "disk"))
    setup = Setup(folder / f"limited-{tier}", cpu=cpu, disk=disk, args=POOL)
    engine = server(model, setup, folder / f"limited-{tier}.log", python=str(limited))
    with pytest.raises(ServerFailed):
        engine.start()
    assert f"ConfigError: {tier}.size: " in engine.log
    assert "cannot be allocated" in engine.log


def test_a_disk_that_fails_costs_hits_and_nothing_else(model: Path, folder: Path) -> None:
    """Its region is emptied behind the engine's back: reading gives nothing, or another length."""
    setup = Setup(folder / "failing", cpu=0, args=POOL)
    engine = server(model, setup, folder / "failing.log")
    engine.start()
    try:
        first = [ask(engine, prompt(seed)).tokens for seed in range(4)]
        until(lambda: pages_on_disk(setup) >= 4 * (len(prompt(0)) // setup.page_size))
        os.truncate(setup.store / "region", 0)
        engine.post("/flush_cache")
        again = [ask(engine, prompt(seed)) for seed in range(4)]
        assert [answer.tokens for answer in again] == first
        assert [answer.storage for answer in again] == [0] * 4
        assert engine.log.count("disk tier: io") + engine.log.count("disk tier: corrupt") >= 1
        assert engine.log.count("disk tier: io") <= 1  # one line a minute, not one a page
    finally:
        engine.stop()
