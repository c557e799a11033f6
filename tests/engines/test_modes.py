"""Every mode of HiCache that SGLang offers: a cold engine, then another one from the disk alone.

Elsewhere: layer_first in test_attach.py; cache, write_through and wait_complete in all other files; timeout with
SGLang's own budget in test_restart.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Setup, whole_pages
from lmcache_sglang.testing.modes import FIRST, MODES, ONCE, Mode, run


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_restart_restores_what_the_mode_promises(model: Path, folder: Path, mode: Mode) -> None:
    seen = run(model, Setup(folder / str(mode)), mode, folder)
    assert [answer.storage for answer in seen.cold.values()] == [0, 0]
    assert seen.same
    found = seen.later or seen.warm
    assert found["first"].storage == whole_pages(FIRST, mode.page_size)
    kept = whole_pages(ONCE, mode.page_size) if mode.keeps_once else 0
    assert found["once"].storage == kept
    assert "Traceback" not in seen.log
