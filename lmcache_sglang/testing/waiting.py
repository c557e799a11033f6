"""Calls that are to wait for something."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

SECONDS = 10.0


def returns_only_after(call: Callable[[], object], let_go: Callable[[], None]) -> object:
    """Its answer, given on another thread. Raises: AssertionError: it did not wait. TimeoutError: it waits for more."""
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(call)
        assert not wait([asked], 0.1).done
        let_go()
        return asked.result(SECONDS)
