"""The record of what a store was given: others find it, and nothing that was changed is believed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from lmcache_sglang.hicache import namespaces as module
from lmcache_sglang.hicache.identity import VERSION, digest
from lmcache_sglang.hicache.kind import Kind
from lmcache_sglang.hicache.namespaces import FOLDER, Namespaces
from tests.hicache.test_tiling import kind

LEFT, RIGHT = kind((0, 4)), kind((4, 8))


def only_file(tier: Path) -> Path:
    (file,) = (tier / FOLDER).iterdir()
    return file


def found(tier: Path) -> set[bytes]:
    records = Namespaces([tier])
    records.refreshed()
    return {each.namespace for each in records.kinds()}


def settle(tier: Path) -> None:
    """As if the folder had changed long ago."""
    past = time.time() - 60
    os.utime(tier / FOLDER, (past, past))


def test_what_one_adds_another_reads(tmp_path: Path) -> None:
    Namespaces([tmp_path]).add(LEFT)
    reader = Namespaces([tmp_path])
    assert reader.refreshed()
    assert reader.kinds() == [LEFT]


def test_each_tier_has_the_records_of_all(tmp_path: Path) -> None:
    tiers = [tmp_path / "memory", tmp_path / "disk"]
    writer = Namespaces(tiers)
    writer.add(LEFT)
    shutil.rmtree(tiers[0])
    assert found(tiers[1]) == {LEFT.namespace}
    Namespaces(tiers[:1]).add(RIGHT)
    both = Namespaces(tiers)
    assert both.refreshed()
    assert {each.namespace for each in both.kinds()} == {LEFT.namespace, RIGHT.namespace}


def test_a_reader_is_told_of_changes_only(tmp_path: Path) -> None:
    records = Namespaces([tmp_path])
    assert not records.refreshed()
    records.add(LEFT)
    assert records.refreshed()
    assert not records.refreshed()
    records.add(RIGHT)
    assert records.refreshed()


def test_a_folder_at_rest_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Namespaces([tmp_path])
    records.add(LEFT)
    settle(tmp_path)
    assert records.refreshed()
    monkeypatch.setattr(module, "_read", lambda _: pytest.fail("read again"))
    assert not records.refreshed()


def test_two_changes_within_a_tick_of_the_clock_are_both_seen(tmp_path: Path) -> None:
    records = Namespaces([tmp_path])
    records.add(LEFT)
    now = time.time_ns()
    os.utime(tmp_path / FOLDER, ns=(now, now))
    assert records.refreshed()
    records.add(RIGHT)
    os.utime(tmp_path / FOLDER, ns=(now, now))
    assert records.refreshed()


def test_a_record_that_was_changed_is_none(tmp_path: Path) -> None:
    Namespaces([tmp_path]).add(LEFT)
    file = only_file(tmp_path)
    text = file.read_bytes()
    file.write_bytes(text.replace(b'"page_size":4', b'"page_size":8'))
    assert file.read_bytes() != text
    assert found(tmp_path) == set()


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    Namespaces([tmp_path]).add(LEFT)
    folder = tmp_path / FOLDER
    (folder / "notes.txt").write_text("mine")
    (folder / "notes.json").write_text("{}")
    for text in (b"{}", b"\xff\xfe", b"", b'{"version": "one"}'):
        (folder / f"{digest(text).hex()}.json").write_bytes(text)
    assert found(tmp_path) == {LEFT.namespace}


def test_a_record_of_another_version_is_passed_over(tmp_path: Path) -> None:
    Namespaces([tmp_path]).add(LEFT)
    record = msgspec.json.decode(only_file(tmp_path).read_bytes())
    text = msgspec.json.encode(record | {"version": VERSION + 1}, order="sorted")
    (tmp_path / FOLDER / f"{digest(text).hex()}.json").write_bytes(text)
    assert found(tmp_path) == {LEFT.namespace}


def test_a_store_that_cannot_be_written_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FOLDER).write_text("a file in the way")
    Namespaces([tmp_path]).add(LEFT)
    assert "engines of another topology will not find" in caplog.text


def test_a_record_stays_as_it_was_first_written(tmp_path: Path) -> None:
    records = Namespaces([tmp_path])
    records.add(LEFT)
    before = only_file(tmp_path).stat()
    records.add(LEFT)
    assert only_file(tmp_path).stat().st_ino == before.st_ino


def test_a_record_says_the_same_after_reading(tmp_path: Path) -> None:
    odd = kind(slices={"dcp_rank": 1}, shape={"row_bytes": "96"})
    Namespaces([tmp_path]).add(odd)
    reader = Namespaces([tmp_path])
    reader.refreshed()
    assert reader.kinds() == [odd]
    assert isinstance(reader.kinds()[0], Kind)
