"""A prefix that comes from the disk later than the engine computes it is computed, once that was measured."""

from __future__ import annotations

from pathlib import Path

from lmcache_sglang.testing.engine import (
    Setup,
    ask,
    flush,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.plugin_folder import make_plugin

FIRST, SECOND = prompt(1), prompt(2)
READ_SECONDS = 5.0  # of a request to the disk, one at a time; to compute a prompt takes tenths
# A tiny model never computes nor reads as much as is asked for before a rate is believed.
SLOW = f"""
from lmcache_sglang.hicache import recompute
from lmcache_sglang.storage import _native
from lmcache_sglang.testing.injection import Slow
recompute.LEAST_TOKENS, recompute.LEAST_BYTES = 400, 400_000
_native.set_step_hook(Slow("read", {READ_SECONDS}))
"""


def test_a_disk_that_is_slower_than_the_engine_is_left_alone(model: Path, folder: Path) -> None:
    setup = Setup(
        folder / "store",
        cpu=0,
        args=["--max-total-tokens", "2048"],
        env=make_plugin(folder / "slow", "lmcache_slow_disk", SLOW),
        more={"disk": {"queue_depth": 1, "engine": "threads"}},
    )
    with server(model, setup, folder / "slow.log") as engine:
        computed = [ask(engine, tokens) for tokens in (FIRST, SECOND)]
        until(lambda: pages_on_disk(setup) >= (len(FIRST) + len(SECOND)) // setup.page_size)
        flush(engine)
        restored, declined = ask(engine, FIRST), ask(engine, SECOND)
        log = engine.log
    assert restored.storage == whole_pages(FIRST)
    assert declined.storage == declined.device == declined.host == 0
    assert [restored.tokens, declined.tokens] == [answer.tokens for answer in computed]
    assert "pages are computed, which takes less than to read them" in log
