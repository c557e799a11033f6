"""What the CUDA driver is asked, in which order, and with what: on a stand-in for it that runs launches by emulation.

This shows that parameters, tables, streams, contexts and lifetimes are right as far as the driver's interface goes. It
shows nothing of a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from lmcache_sglang.kernels.cuda import build
from lmcache_sglang.kernels.cuda.choice import (
    MOST_RUNS,
    SHORTEST_ALONE,
    SHORTEST_OF_A_BATCH,
    Way,
    blocks_for,
    choose,
)
from lmcache_sglang.kernels.cuda.staging import MOST_KEPT, SMALLEST, Area, Staging

FAKE = Path(__file__).with_name("fake_cuda")
SESSION = FAKE / "session.py"
CHECKS = re.findall(r"^        (\w+),$", SESSION.read_text().split("CHECKS = ")[1], re.MULTILINE)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1, and of cubins."""
    folder = tmp_path_factory.mktemp("driver")
    options = ["-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wl,-soname,libcuda.so.1"]
    library = folder / "libcuda.so.1"
    files = [str(FAKE / "driver.cpp"), "-o", str(library), "-ldl"]
    subprocess.run(["g++", *options, *files], check=True)
    build.cubin_for("sm_90", folder)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_stand_in(check: str, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    command = [sys.executable, str(SESSION), check, str(driver)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_checks_are_run() -> None:
    assert len(CHECKS) == 27


# Which way.


@pytest.mark.parametrize(
    ("bytes_each", "runs", "batched", "way"),
    [
        (SHORTEST_OF_A_BATCH, 1, True, Way.ENGINE),
        (SHORTEST_OF_A_BATCH - 1, 1, True, Way.KERNEL),
        (SHORTEST_OF_A_BATCH, 100, False, Way.KERNEL),
        (SHORTEST_ALONE, 100, False, Way.ENGINE),
        (SHORTEST_ALONE, MOST_RUNS, True, Way.ENGINE),
        (SHORTEST_ALONE, MOST_RUNS + 1, True, Way.KERNEL),
        (0, 0, True, Way.KERNEL),
    ],
)
def test_long_runs_over_a_link_go_to_the_engine(
    bytes_each: int, runs: int, batched: bool, way: Way
) -> None:
    moved = bytes_each * runs
    chosen = choose(converts=False, bytes_moved=moved, runs=runs, over_link=True, batched=batched)
    assert chosen is way


def test_what_is_converted_or_stays_on_the_gpu_goes_to_a_kernel() -> None:
    of_a_long_run = partial(choose, bytes_moved=1 << 30, runs=1, batched=True)
    assert of_a_long_run(converts=True, over_link=True) is Way.KERNEL
    assert of_a_long_run(converts=False, over_link=False) is Way.KERNEL


def test_a_copy_over_a_link_leaves_most_of_a_gpu_to_others() -> None:
    assert blocks_for(over_link=True, sms=132) * 8 < blocks_for(over_link=False, sms=132)
    assert blocks_for(over_link=True, sms=2) == blocks_for(over_link=False, sms=2)


# Memory for tables.


@dataclass
class Event:
    done: bool = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        raise AssertionError("the asking thread would wait for the GPU")


def areas() -> tuple[list[Area], Staging]:
    made: list[Area] = []

    def make(size: int) -> Area:
        made.append(Area(len(made), len(made), size))
        return made[-1]

    return made, Staging(make)


def test_an_area_is_taken_again_only_behind_its_event() -> None:
    made, staging = areas()
    first, event = staging.take(100), Event()
    staging.give(first, event)
    second = staging.take(100)
    assert second is not first
    event.done = True
    assert staging.take(100) is first
    assert len(made) == 2
    assert all(area.size == SMALLEST for area in made)


def test_streams_need_not_pass_in_order() -> None:
    _, staging = areas()
    slow, fast = Event(), Event(done=True)
    staging.give(staging.take(1), slow)
    late = staging.take(1)
    staging.give(late, fast)
    assert staging.take(1) is late


def test_a_larger_one_is_made_where_it_is_needed() -> None:
    _, staging = areas()
    staging.give(staging.take(1), Event(done=True))
    assert staging.take(SMALLEST + 1).size == 2 * SMALLEST


def test_a_large_area_is_left_to_who_needs_it() -> None:
    _, staging = areas()
    large, small = staging.take(8 * SMALLEST), staging.take(1)
    staging.give(large, Event(done=True))
    staging.give(small, Event(done=True))
    assert staging.take(1) is small


def test_nothing_under_way_is_waited_for() -> None:
    """As many areas as are asked for; an event whose `synchronize` were called would have failed."""
    made, staging = areas()
    for _ in range(1000):
        staging.give(staging.take(1), Event())
    assert len(made) == 1000


def test_no_more_is_kept_than_so_many_bytes() -> None:
    made, staging = areas()
    taken = [staging.take(SMALLEST) for _ in range(2 * MOST_KEPT // SMALLEST)]
    for area in taken:
        staging.give(area, Event(done=True))
    before = len(made)
    again = [staging.take(SMALLEST) for _ in taken]
    assert len(made) - before == len(taken) // 2
    assert len({area.host for area in again}) == len(again)
