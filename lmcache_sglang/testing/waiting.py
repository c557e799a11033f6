"""Calls that are to wait for something."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

SECONDS = 10.0
LOOK_SECONDS = 0.005


def returns_only_after(call: Callable[[], object], let_go: Callable[[], None]) -> object:
    """Its answer, given on another thread. Raises: AssertionError: it did not wait. TimeoutError: it waits for more."""
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(call)
        assert not wait([asked], 0.1).done
        let_go()
        return asked.result(SECONDS)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another process does, or time alone. Raises: AssertionError, when it does not come about."""
    end, never = time.monotonic() + SECONDS, Event()
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        never.wait(LOOK_SECONDS)
