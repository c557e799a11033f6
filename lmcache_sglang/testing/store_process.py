"""Processes of their own over a store: to share it with, to stop, and to lose.

    job = Job(crash_script.run, store, 7)  # forked from a warm process, in about two milliseconds
    job.signal(SIGSTOP)
    job.kill()

A job is a function of a module of this package; what it returns comes back by `result`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

import pytest

from .small_store import probe_in_a_fork

SECONDS = 120.0  # after which a job counts as hung

_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload([__name__])

P = ParamSpec("P")
T = TypeVar("T")


class Died(Exception):
    """A job was ended by a signal."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class Job(Generic[T]):
    """A function that runs in a process of its own."""

    def __init__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        self._answers, give = _warm.Pipe(duplex=False)
        work = (give, function, args, kwargs)
        self._process = _warm.Process(target=_work, args=work, daemon=True)
        self._process.start()
        give.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def result(self, seconds: float = SECONDS) -> T:
        """What the function returned. Raises: Died; AssertionError, for all that it raised."""
        hung = not self._answers.poll(seconds)
        if hung:
            self.kill()
            raise AssertionError(f"a job did not end within {seconds:.0f} s")
        try:
            kind, value = self._answers.recv()
        except EOFError:
            self._process.join()
            exitcode = self._process.exitcode
            assert exitcode is not None and exitcode < 0, f"a job ended with status {exitcode}"
            raise Died(-exitcode) from None
        finally:
            self._answers.close()
        self._process.join()
        assert kind == "returned", value
        result: T = value
        return result

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, and return when it is gone."""
        self._process.kill()
        self._process.join()

    def wait_until_stopped(self) -> None:
        """Return when a signal has stopped it."""
        deadline = time.monotonic() + SECONDS
        while "T" not in _state_of(self.pid):
            assert time.monotonic() < deadline, "it does not stop"
            if self._answers.poll(0.001):
                pytest.fail(f"it ended instead: {self.result()}")


def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a process of its own. Raises: Died."""
    return Job(function, *args, **kwargs).result()


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _work(
    give: Connection, function: Callable[..., object], args: list[object], kwargs: dict[str, object]
) -> None:
    probe_in_a_fork()
    try:
        answer = ("returned", function(*args, **kwargs))
    except BaseException:  # noqa: BLE001 - the test reports it
        answer = ("raised", traceback.format_exc())
    give.send(answer)
