"""How long a read may take: what SGLang's prefetch policy says, and no longer than SGLang waits for it.

SGLang reads a prefix in batches on one thread and looks between them whether the request still waits. A batch
that a slow disk holds up would hold up the prefixes of all other requests behind it, so a read here also ends
within a batch: when SGLang gives it up, and at the latest after the time that SGLang would wait for the whole.

    timeout         SGLang's own budget: prefetch_timeout_base + tokens x prefetch_timeout_per_ki_token
    best_effort     until SGLang gives it up, when the request's turn comes
    wait_complete   the tier's own limit, so that a stalled disk ends as a miss
"""

from __future__ import annotations

import threading
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
    """Of the read that this thread is in."""
    limits: Limits = getattr(_here, "limits", NO_LIMITS)
    return limits


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
    _here.limits = Limits(seconds(_caches.get(controller), len(operation.hash_value)), cancel)
    try:
        yield
    finally:
        _here.limits = NO_LIMITS


def give_up(operation: Prefetch) -> None:
    """SGLang waits no longer. Costs its scheduler's thread a microsecond."""
    cancel: Cancel | None = getattr(operation, _CANCEL, None)
    if cancel is not None:
        cancel.set()


def seconds(cache: Any, pages: int) -> float | None:
    """SGLang's budget for a prefix of so many pages; None where its policy has none, as `Limits` has it.

    SGLang's clock starts when the request could first have run, ours when the read begins, so ours never ends
    a read that SGLang still waits for.
    """
    if getattr(cache, "prefetch_stop_policy", "") != "timeout":
        return None
    return float(cache.prefetch_timeout_base + pages * cache.prefetch_timeout_per_page)
