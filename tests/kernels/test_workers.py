"""Threads that share a batch: every job once, nobody waits for anybody's other batch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Barrier, Event, Thread, get_ident
from time import sleep

import pytest

from lmcache_sglang.kernels._native import Workers

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_every_job_runs_once(threads: int, count: int) -> None:
    workers, ran = Workers(threads), Counter[int]()
    for _ in range(20):
        workers.run(count, lambda i: ran.update([i]))
    assert ran == Counter(dict.fromkeys(range(count), 20))


def test_one_thread_is_the_callers() -> None:
    idents: set[int] = set()
    Workers(1).run(50, lambda _: idents.add(get_ident()))
    assert idents == {get_ident()}


@pytest.mark.parametrize("threads", [2, 4])
def test_as_many_jobs_run_at_a_time_as_there_are_threads(threads: int) -> None:
    together = Barrier(threads)  # each job waits for the others, so none may wait in a queue
    Workers(threads).run(threads, lambda _: together.wait(timeout=30))


def test_a_long_job_holds_up_no_other() -> None:
    """Jobs are handed out one by one: those left go to whichever thread is free."""
    rest = Barrier(2)
    done: list[int] = []

    def job(i: int) -> None:
        if i == 0:
            rest.wait(timeout=30)
        done.append(i)
        if i == 99:
            rest.wait(timeout=30)

    Workers(2).run(100, job)
    assert sorted(done) == list(range(100))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_reaches_the_caller_and_starts_no_more_jobs(threads: int) -> None:
    workers, ran = Workers(threads), list[int]()

    def job(i: int) -> None:
        ran.append(i)
        raise KeyError(i)

    for _ in range(20):
        ran.clear()
        with pytest.raises(KeyError):
            workers.run(1000, job)
        assert 1 <= len(ran) <= threads
    workers.run(10, ran.append)  # the threads outlive it


def test_one_failure_ends_the_work_of_all_threads() -> None:
    ran: list[int] = []
    helped = Event()

    def job(i: int) -> None:
        if i == 0:
            helped.wait(timeout=30)
            raise KeyError(i)
        helped.set()
        sleep(0.001)
        ran.append(i)

    with pytest.raises(KeyError):
        Workers(3).run(1000, job)
    assert len(ran) < 500


def test_many_callers_share_the_threads() -> None:
    workers, ran = Workers(3), Counter[int]()

    def call(caller: int) -> None:
        for _ in range(50):
            workers.run(7, lambda _: ran.update([caller]))

    callers = [Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert ran == Counter(dict.fromkeys(range(6), 350))


def test_a_caller_goes_on_while_another_holds_every_thread() -> None:
    workers = Workers(2)
    held, release = Barrier(3), Barrier(3)

    def hold(_: int) -> None:
        held.wait(timeout=30)
        release.wait(timeout=30)

    holder = Thread(target=workers.run, args=(2, hold))
    holder.start()
    held.wait(timeout=30)
    ran: list[int] = []
    workers.run(5, ran.append)
    assert sorted(ran) == list(range(5))
    release.wait(timeout=30)
    holder.join()


def test_a_job_may_bring_a_batch_of_its_own() -> None:
    workers, ran = Workers(2), Counter[int]()
    workers.run(4, lambda _: workers.run(4, lambda i: ran.update([i])))
    assert ran == Counter(dict.fromkeys(range(4), 4))


FORKS = """
import os, sys
from array import array
from lmcache_sglang.kernels.copy_plan import CopyPlan, copy_pages
from lmcache_sglang.kernels.layout import PageLayout, Plane

def rows(memory):
    at, size = memory.buffer_info()
    return PageLayout((Plane((at,), 0, 1024, 0, 1024),), 1, size // 1024, 1, 1, ((at, size),))

src, dst = array("B", bytes(range(256)) * 8192), array("B", bytes(2 << 20))
copy_pages(CopyPlan(range(2048), range(2048)), rows(src), rows(dst), threads=3)
if os.fork():
    status = os.waitstatus_to_exitcode(os.wait()[1])
else:
    src.reverse()
    copy_pages(CopyPlan(range(2048), range(2048)), rows(src), rows(dst), threads=3)
    for threads in range(4, 9):  # so that the parent's pool is no longer kept
        copy_pages(CopyPlan([0], [0]), rows(src), rows(dst), threads=threads)
    status = 0
sys.exit(status or dst != src)
"""


def test_a_forked_child_copies_and_ends_as_others_do() -> None:
    """It has its parent's pool of threads, but none of the threads."""
    for _ in range(5):
        subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
def test_the_thread_sanitizer_sees_no_race(tmp_path: Path) -> None:
    program = tmp_path / "workers"
    source = Path(__file__).with_name("workers_under_tsan.cpp")
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, source, "-o", program], check=True)
    done = subprocess.run([program], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
