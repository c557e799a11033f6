"""The other processes of tests of the peers' directory, to run as a `store_process.Job`."""

from __future__ import annotations

import resource
import signal
import time
from itertools import count
from pathlib import Path

from ..errors import TierError
from ..storage.peers import tags as sets
from ..storage.peers.directory import Directory, DirectoryView, PeerRecord
from .tier_suite import a_key
from .waiting import wait_until

ROOMY = 64 << 20
CLOCK = 63  # the peer whose epoch says how much was written
PATIENT = 600.0  # seconds without a beat
STEP = 1000  # pages of one put
NEVER = range(-200, 0)  # numbers of pages that nobody puts


def keys_of(numbers: range) -> list[bytes]:
    return [a_key(number) for number in numbers]


def record_of(number: int) -> PeerRecord:
    """Every field tells the number, and no two fields have the same bytes."""
    return PeerRecord(
        name=f"n{number}" * 3,
        address=f"tcp://{number}" * (1 + number % 8),
        public_key=f"{number:040}".encode(),
        state=number % 251,
        version=number % 65_521,
        epoch=number,
    )


def write_records_for_ever(path: Path) -> None:
    directory = Directory.create(path, ROOMY)
    for number in count(1):
        directory.beat()
        directory.set_record(0, record_of(number))


def read_records(path: Path, seconds: float) -> int:
    """How many different ones. Raises: AssertionError, for one of two writes, or an older one."""
    view, end, last, different = DirectoryView(path, PATIENT), time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        seen = view.record(0)
        assert seen == record_of(seen.epoch), "torn"
        assert seen.epoch >= last, "an older one"
        different += seen.epoch != last
        last = seen.epoch
    return different


def write_pages(path: Path, pages: int, seen: Path) -> None:
    """Put pages by and by, telling how many in the record of CLOCK; then wait to be killed.

    Args:
        seen: a file that says that someone reads: the second half waits for it.
    """
    directory = Directory.create(path, ROOMY)
    directory.believe(0)
    for first in range(0, pages, STEP):
        if first >= pages // 2:
            wait_until(seen.exists)
        directory.put(0, sets.tags_of(keys_of(range(first, first + STEP))))
        directory.set_record(CLOCK, PeerRecord(name="clock", epoch=first + STEP))
        directory.beat()
    signal.pause()


def read_pages(path: Path, pages: int, seen: Path) -> int:
    """Look all pages up that were told to be written, until all are; how many looks it took.

    Args:
        seen: the file to make once there is something to read.

    Raises: AssertionError, for a page that is not found, or found and never written.
    """
    view, never, looks, told = DirectoryView(path, PATIENT), keys_of(NEVER), 0, 0
    keys = keys_of(range(pages))
    while told < pages:
        if view.agent == 0:
            view.refresh()
        told = view.record(CLOCK).epoch
        assert all(view.exists(keys[:told])), "a page is lost"
        assert not any(view.exists(never)), "a page is invented"
        looks += 1
        if told:
            seen.touch()
    return looks


def put_with_small_files(path: Path, pages: int, most_bytes: int) -> tuple[int, int, int]:
    """Where no file may be larger than that: pages left out, found, and wrongly missed."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    directory = Directory.create(path, ROOMY)
    directory.believe(0)
    keys = keys_of(range(pages))
    left_out = directory.put(0, sets.tags_of(keys))
    found = sum(DirectoryView(path).exists(keys))
    directory.close()
    return left_out, found, pages - left_out - found


def create_with_small_files(path: Path, most_bytes: int) -> str:
    """Why it cannot be created, and what it left."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    try:
        Directory.create(path, ROOMY)
    except TierError as error:
        return error.reason.value + "".join(sorted(file.name for file in path.parent.iterdir()))
    return "created"
