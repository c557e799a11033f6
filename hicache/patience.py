"""How long a read may take: what SGLang's prefetch policy says, and no longer than SGLang waits for it.

SGLang reads a prefix in batches on one thread and looks between them whether the request still waits. Here a
batch, too, begins nothing more once SGLang has given the prefix up, or has waited its whole budget for it:

    timeout         SGLang's own budget, for all batches and pools of the prefix together:
                    prefetch_timeout_base + tokens x prefetch_timeout_per_ki_token
    best_effort     until SGLang gives it up, when the request's turn comes
    wait_complete   as long as it takes

and each call no longer than the tier's own limit. What a device has begun cannot be taken back: the memory it
writes to is SGLang's. While such a read is overdue, nothing more is promised (storage/overdue.py). Lookups and
writes have no budget of SGLang's, and the tier's own limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from ..storage.base import NO_LIMITS, Cancel, Limits


class Prefetch(Protocol):
    """What is used of SGLang's `PrefetchOperation`."""

    hash_value: list[str]

    def is_terminated(self) -> bool: ...


_CANCEL = "lmcache_cancel"  # attribute of an operation that is being read
_here = threading.local()
_caches: WeakKeyDictionary[Any, Any] = (
    WeakKeyDictionary()
)  # controller -> the tree that has its policy


def current() -> Limits:
    """For the next call of the read that this thread is in."""
    cancel: Cancel | None = getattr(_here, "cancel", None)
    if cancel is None:
        return NO_LIMITS
    left = None if _here.until is None else max(0.0, _here.until - time.monotonic())
    return Limits(left, cancel)


def watch(controller: Any, cache: Any) -> None:
    """From now on a controller's reads follow the policy of this tree. Both are SGLang's."""
    _caches[controller] = cache


@contextmanager
def reading(controller: Any, operation: Prefetch) -> Iterator[None]:
    """While this thread reads for an operation, `current` says what its limits are."""
    cancel = Cancel()
    setattr(operation, _CANCEL, cancel)
    if operation.is_terminated():  # before there was anything to set
        cancel.set()
    budget = seconds(_caches.get(controller), len(operation.hash_value))
    _here.until = None if budget is None else time.monotonic() + budget
    _here.cancel = cancel
    try:
        yield
    finally:
        _here.cancel = None


def give_up(operation: Prefetch) -> None:
    """SGLang waits no longer. Costs its scheduler's thread a microsecond."""
    cancel: Cancel | None = getattr(operation, _CANCEL, None)
    if cancel is not None:
        cancel.set()


def seconds(cache: Any, pages: int) -> float | None:
    """SGLang's budget for a prefix of so many pages; None where its policy has none.

    SGLang's clock starts when the request could first have run, ours when the read begins, so ours never ends
    a read that SGLang still waits for.
    """
    if getattr(cache, "prefetch_stop_policy", "") != "timeout":
        return None
    return float(cache.prefetch_timeout_base + pages * cache.prefetch_timeout_per_page)
