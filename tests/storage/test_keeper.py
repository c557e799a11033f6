"""The node's background work: one process does it, and another goes on where that one died."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage import keeper as keeper_module
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.storage.keeper import Keeper
from lmcache_sglang.testing.engine import until
from lmcache_sglang.testing.injection import Failing, injected
from lmcache_sglang.testing.store_process import Job, run
from lmcache_sglang.testing.tier_suite import some_keys
from lmcache_sglang.testing.two_tiers import (
    SOON,
    TwoTiers,
    get,
    is_locked,
    keep_open,
    put,
    put_and_close,
    put_and_flush,
    put_and_hang_in_a_flush,
)

KEYS = some_keys(30)


def keeper_of(chain: Chain) -> Keeper:
    assert chain._keeper is not None
    return chain._keeper


def elected(chain: Chain) -> bool:
    return keeper_of(chain).elected.wait(SOON)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A file by which a job says that it is where it is to be."""
    return tmp_path / "here"


# Who does it.


def test_one_process_is_elected_and_another_when_that_one_is_killed(
    tiers: TwoTiers, here: Path
) -> None:
    first = Job(keep_open, tiers, here)
    until(here.exists)
    until(lambda: is_locked(lock_of(tiers)))
    with closing(tiers.open()) as chain:
        time.sleep(2.5 * keeper_module.LOOK_SECONDS)  # it has looked, and more than once
        assert not keeper_of(chain).elected.is_set()
        first.kill()
        assert elected(chain)


def test_a_child_of_a_dead_process_does_not_keep_the_work_from_the_others(
    tiers: TwoTiers, here: Path, tmp_path: Path
) -> None:
    """A fork has the parent's files open, and would hold a lock of flock's kind."""
    child = tmp_path / "child"
    first = Job(keep_open, tiers, here, child)
    until(here.exists)
    first.kill()
    try:
        with closing(tiers.open()) as chain:
            assert elected(chain)
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_closing_hands_the_work_over(tiers: TwoTiers, here: Path) -> None:
    first = tiers.open()
    assert elected(first)
    other = Job(put_and_flush, tiers, KEYS)
    assert other.result() is True  # done by the first, for the other
    assert is_locked_by_us(first)
    first.close()
    assert not is_locked(lock_of(tiers))


def test_a_process_without_the_lower_tier_does_not_take_the_work_from_who_has_it(
    tiers: TwoTiers, here: Path
) -> None:
    """It would never spill, and while it lives nobody else would."""
    alone = Job(keep_open, tiers.but(disk=None), here)
    until(here.exists)
    with closing(tiers.open()) as chain:
        put(chain, KEYS)
        assert chain.flush(SOON)
        assert chain.tiers[1].exists(KEYS) == [True] * 30
    alone.kill()


def lock_of(tiers: TwoTiers) -> Path:
    assert tiers.memory is not None
    return tiers.memory / "keeper"


def is_locked_by_us(chain: Chain) -> bool:
    return keeper_of(chain).elected.is_set() and keeper_of(chain).alive


# What a dead process leaves.


def test_a_page_on_its_way_to_the_disk_outlives_the_process_and_gets_there(
    tiers: TwoTiers, here: Path
) -> None:
    writer = Job(put_and_hang_in_a_flush, tiers, KEYS, here)
    until(here.exists)
    writer.kill()
    with closing(tiers.but(memory=None).open()) as disk_alone:
        assert not any(disk_alone.exists(KEYS))  # or the rest would prove nothing
    with closing(tiers.open()) as chain:
        assert chain.exists(KEYS) == [True] * 30
        assert get(chain, KEYS) == [True] * 30
        assert chain.flush(SOON)
        assert chain.tiers[1].exists(KEYS) == [True] * 30
    assert tiers.memory is not None
    shutil.rmtree(tiers.memory)
    with closing(tiers.open()) as chain:
        assert get(chain, KEYS) == [True] * 30
        assert all(report.ok for report in chain.check().values())


def test_it_gets_there_without_being_asked(tiers: TwoTiers, here: Path) -> None:
    """Neither a flush nor a put: the keeper finds what waits."""
    writer = Job(put_and_hang_in_a_flush, tiers, KEYS, here)
    until(here.exists)
    writer.kill()
    with closing(tiers.open()) as chain:
        until(lambda: all(chain.tiers[1].exists(KEYS)), SOON)


def test_another_living_process_goes_on_with_what_a_killed_one_was_writing(
    tiers: TwoTiers, here: Path
) -> None:
    writer = Job(put_and_hang_in_a_flush, tiers, KEYS, here)
    until(here.exists)
    with closing(tiers.open()) as chain:  # beside the writer, which has the work
        assert get(chain, KEYS) == [True] * 30
        assert not chain.flush(0.2)
        writer.kill()
        assert chain.flush(SOON)
        assert chain.tiers[1].exists(KEYS) == [True] * 30
        assert chain.faults.counts() == {}


def test_what_a_close_had_no_time_for_is_written_by_the_next_process(tiers: TwoTiers) -> None:
    kept = run(put_and_close, tiers, KEYS, 0.0)
    assert kept == [True] * 30
    with closing(tiers.open()) as chain:
        until(lambda: all(chain.tiers[1].exists(KEYS)), SOON)


# What can go wrong.


def test_a_lock_that_cannot_be_made_is_refused(tiers: TwoTiers) -> None:
    tiers.open().close()
    lock = lock_of(tiers)
    lock.unlink()
    lock.mkdir()
    with pytest.raises(ConfigError, match="keeper") as caught:
        tiers.open()
    assert caught.value.setting == "cpu.path"


def test_an_error_of_the_disk_is_counted_and_tried_again_after_a_pause(tiers: TwoTiers) -> None:
    with closing(tiers.open()) as chain:
        failing = Failing("flush", errno.EIO, times=2)
        with injected(failing):
            put(chain, KEYS)
            assert chain.flush(SOON) or chain.flush(SOON)  # the first may give up after two in vain
        assert failing.seen >= 3
        assert chain.faults.counts() == {"disk.io": 2}
        assert chain.tiers[1].exists(KEYS) == [True] * 30


def test_what_a_disk_did_not_take_is_written_once_it_does(tiers: TwoTiers) -> None:
    """Without a flush, and without another put."""
    with closing(tiers.open()) as chain:
        failing = Failing("flush", errno.EIO)
        with injected(failing):
            put(chain, KEYS)
            until(lambda: failing.seen >= 3)
            assert not any(chain.tiers[1].exists(KEYS))
        until(lambda: all(chain.tiers[1].exists(KEYS)), SOON)
        assert chain.faults.counts().keys() == {"disk.io"}


def test_a_flush_of_a_disk_that_takes_nothing_ends_and_tells_the_truth(tiers: TwoTiers) -> None:
    with closing(tiers.open()) as chain:
        with injected(Failing("flush", errno.ENOSPC)):
            put(chain, KEYS)
            begun = time.monotonic()
            assert not chain.flush(60.0)
            assert time.monotonic() - begun < SOON
        assert chain.flush(SOON)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_ends_the_thread_and_gives_the_work_back(
    tiers: TwoTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no `TierError` is ours; pages stay where they are, and another process may go on."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a mistake")

    with closing(tiers.open()) as chain:
        assert elected(chain)
        monkeypatch.setattr(keeper_of(chain), "_spill_group", fail)
        assert put(chain, KEYS) == [True] * 30
        until(lambda: not keeper_of(chain).alive)
        assert not chain.flush(0.2)  # it would be a lie
        assert get(chain, KEYS) == [True] * 30
        assert run(put_and_flush, tiers, KEYS) is True
        assert chain.tiers[1].exists(KEYS) == [True] * 30
