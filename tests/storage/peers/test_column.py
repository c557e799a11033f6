"""A peer's place in the directory, as its link writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.storage.peers.column import DirectoryColumn
from lmcache_sglang.storage.peers.directory import LEAST_BYTES, Directory
from lmcache_sglang.storage.peers.tags import tags_of
from lmcache_sglang.testing.tier_suite import some_keys


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with closing(Directory.create(tmp_path / "directory", LEAST_BYTES)) as made:
        yield made


def test_no_peer_takes_the_room_of_the_others(directory: Directory) -> None:
    column = DirectoryColumn(directory, 3, most=10)
    tags = tags_of(some_keys(25))
    column.put(tags[:64])
    column.put(tags[64:])
    assert directory.pages(3) == 10
    column.drop(tags[:16])
    column.put(tags[-40:])
    assert directory.pages(3) == 10
    column.forget()
    assert directory.pages(3) == 0
