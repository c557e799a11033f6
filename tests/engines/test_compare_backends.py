"""A row of each table of docs/sglang.md: what SGLang's file backend gives back, this one gives back too."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.compare_backends import TABLES, all_same
from lmcache_sglang.testing.engine import Setup


@pytest.mark.parametrize(("table", "number"), [("modes", 2), ("families", 1)])
def test_both_backends_give_the_same_back(table: str, number: int, folder: Path) -> None:
    """write_back with page_head, by best_effort and then told to wait; and sliding windows."""
    case = TABLES[table].cases[number]
    file = case.run(Setup(folder / "file", backend="file"), folder)
    ours = case.run(Setup(folder / "lmcache"), folder)
    assert all_same(file, ours)
    assert ours.restored >= file.restored > 0
