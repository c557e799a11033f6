"""store.json: what it must say, and that nothing is changed by looking at it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage.slab import head
from lmcache_sglang.storage.slab.head import FORMAT, Head
from lmcache_sglang.storage.slab.plan import Plan

PLAN = Plan.of(64 << 20)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    head.write(tmp_path, Head.new(PLAN))
    return tmp_path / head.FILE


def refusal(folder: Path) -> str:
    """The message for a head that is refused; it names the setting, and the file stays as it was."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ConfigError) as caught:
        head.read(folder, "cpu.path")
    assert caught.value.setting == "cpu.path"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    return caught.value.problem


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert head.read(tmp_path, "path") is None
    new = Head.new(PLAN)
    head.write(tmp_path, new)
    assert head.read(tmp_path, "path") == new
    assert new.plan == PLAN
    assert [file.name for file in tmp_path.iterdir()] == [head.FILE]


def test_it_says_who_made_the_store(written: Path) -> None:
    content = json.loads(written.read_bytes())
    assert content["written_by"] == version("lmcache-sglang")
    assert content["format"] == FORMAT


def test_no_two_stores_have_one_id() -> None:
    assert len({Head.new(PLAN).id for _ in range(100)}) == 100


def test_a_resized_store_is_the_same_store() -> None:
    before, wanted = Head.new(PLAN), Plan.of(128 << 20, PLAN.slab_bytes)
    after = before.resized(wanted)
    assert (after.id, after.plan) == (before.id, wanted)


def test_a_write_that_ends_in_the_middle_leaves_the_head_that_was(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = head.read(written.parent, "path")

    def fail(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "fsync", fail)
        head.write(written.parent, Head.new(PLAN))
    assert head.read(written.parent, "path") == before
    after = Head.new(PLAN)
    head.write(written.parent, after)
    assert head.read(written.parent, "path") == after


@pytest.mark.parametrize("number", [0, FORMAT - 1, FORMAT + 1, 10**6, -1])
def test_another_format_is_refused_by_its_number(written: Path, number: int) -> None:
    """Of a later version nothing but the mark may be readable."""
    mark = {"magic": json.loads(written.read_bytes())["magic"], "format": number, "all": "new"}
    written.write_text(json.dumps(mark))
    said = refusal(written.parent)
    assert f"format {number}, this version reads format {FORMAT}" in said
    assert "another directory" in said


@pytest.mark.parametrize("with_head", [False, True])
def test_a_store_of_the_first_version_is_refused_by_its_number(
    tmp_path: Path, with_head: bool
) -> None:
    if with_head:
        head.write(tmp_path, Head.new(PLAN))
    (tmp_path / "pages.lmdb").write_bytes(b"pages of the first version")
    assert "pages.lmdb was written in format 1" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"magic": "a shop", "format": 2}',
        '{"magic": "", "format": 2, "id": "x"}',
    ],
)
def test_another_programs_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / head.FILE).write_text(text)
    assert "belongs to another program" in refusal(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\0" * len(text),
        lambda text: b"\xff" + text[1:],
        lambda text: b"[1, 2]",
        lambda text: text + b"}",
        lambda text: text.replace(b'"format"', b'"fromat"'),
    ],
)
def test_what_is_no_head_any_more_is_refused_as_damaged(
    written: Path, damage: Callable[[bytes], bytes]
) -> None:
    written.write_bytes(damage(written.read_bytes()))
    said = refusal(written.parent)
    assert "is damaged" in said
    assert "nothing was changed" in said


@pytest.mark.parametrize(
    "changed",
    [
        {"slab_bytes": 0},
        {"slab_bytes": 5000},
        {"slab_bytes": -4096},
        {"slab_bytes": 2048},
        {"slab_bytes": 1 << 41},
        {"slab_bytes": "4096"},
        {"slab_bytes": 1e300},
        {"slabs": 0},
        {"slabs": -1},
        {"slabs": 1 << 32},
        {"ghosts": 0},
        {"ghosts": 1 << 32},
        {"id": "abc"},
        {"id": "z" * 32},
        {"id": None},
        {"written_by": 7},
    ],
    ids=str,
)
def test_numbers_that_no_store_has_are_refused(written: Path, changed: dict[str, Any]) -> None:
    """They would size maps and files."""
    written.write_text(json.dumps(json.loads(written.read_bytes()) | changed))
    assert "is damaged" in refusal(written.parent)


def test_a_head_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    (tmp_path / head.FILE).mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*store\.json: Is a directory"):
        head.read(tmp_path, "path")
