"""Settings that cannot work stop the start with one clear line; a full disk stops nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Setup, ask, prompt, server, whole_pages
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


def test_a_limit_below_one_page_stops_the_start(model: Path, folder: Path) -> None:
    engine = server(model, Setup(folder / "small", cpu="10KiB", args=POOL), folder / "small.log")
    with pytest.raises(ServerFailed):
        engine.start()
    assert "ConfigError: cpu.size: pages of this model take 32768 bytes" in engine.log


def test_a_full_disk_costs_hits_and_nothing_else(model: Path, folder: Path) -> None:
    """Full at 256 KiB: the kernel refuses every write beyond it, as a full file system would."""
    full = folder / "full-disk-python"
    full.write_text(f'#!/bin/bash\nulimit -f 256\nexec "{sys.executable}" "$@"\n')
    full.chmod(0o755)
    setup = Setup(folder / "full", args=POOL)
    engine = server(model, setup, folder / "full.log", python=str(full))
    engine.start()
    try:
        first = [ask(engine, prompt(seed)).tokens for seed in range(4)]
        engine.post("/flush_cache")
        again = [ask(engine, prompt(seed)) for seed in range(4)]
        assert [answer.tokens for answer in again] == first
        assert again[3].storage >= 0.95 * whole_pages(prompt(3))  # the CPU tier still serves
        assert engine.log.count("disk tier: ") == 1  # one line a minute, not one a page
    finally:
        engine.stop()
