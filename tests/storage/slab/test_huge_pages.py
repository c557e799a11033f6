"""Huge pages are asked for only where the kernel would give them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lmcache_sglang.storage.slab.huge_pages import asked_for


@pytest.mark.parametrize("chosen", ["always", "within_size", "advise"])
def test_a_kernel_that_gives_them_is_asked(tmp_path: Path, chosen: str) -> None:
    switch = tmp_path / "shmem_enabled"
    kinds = ["always", "within_size", "advise", "never"]
    switch.write_text(" ".join(f"[{kind}]" if kind == chosen else kind for kind in kinds))
    assert asked_for(True, switch)
    assert not asked_for(False, switch)


@pytest.mark.parametrize("content", ["always within_size advise [never] deny force\n", None])
def test_one_that_does_not_is_named_in_the_log(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    switch = tmp_path / "shmem_enabled"
    if content:
        switch.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert not asked_for(True, switch)
    assert "write `advise` into it" in caplog.text
