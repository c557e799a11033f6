"""How long a read may take: what SGLang's prefetch policy says, and no longer than SGLang waits for it.

SGLang reads a prefix in batches on one thread and looks between them whether the request still waits. Here a
batch, too, begins nothing more once SGLang has given the prefix up, or has waited its whole budget for it:

    timeout         SGLang's own budget, by SGLang's own clock, for all batches and pools of the prefix
                    together: prefetch_timeout_base + tokens x prefetch_timeout_per_ki_token;
                    none for what is read once the KV is there, which SGLang waits for
    best_effort     until SGLang gives it up, when the request's turn comes
    wait_complete   as long as it takes

and each call no longer than the tier's own limit. What a device has begun cannot be taken back: the memory it
writes to is SGLang's. While such a read is overdue, nothing more is promised (storage/overdue.py). Lookups and
writes have no budget of SGLang's, and the tier's own limit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from ..storage.base import NO_LIMITS, Cancel, Limits


class Prefetch(Protocol):
    """What is used of SGLang's `PrefetchOperation`."""

    handle: Any
    hash_value: list[str]  # of the pages to read
    stats_requested_tokens: int

    def is_terminated(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Reading:
    cache: Any  # SGLang's tree, while its budget counts; None where nobody watches it
    operation: Prefetch
    cancel: Cancel


# Where SGLang's tree keeps its policy.
_OF_A_TREE = (
    "prefetch_stop_policy",
    "prefetch_timeout_base",
    "prefetch_timeout_per_page",
    "_storage_prefetch_wait",
    "page_size",
)
_CANCEL = "lmcache_cancel"  # attribute of an operation that is being read
_here = threading.local()
# Of each controller the tree that has its policy. The tree holds the controller, so neither is held here.
_caches: WeakKeyDictionary[Any, ref[Any]] = WeakKeyDictionary()


def current() -> Limits:
    """For the next call of the read that this thread is in."""
    reading: _Reading | None = getattr(_here, "reading", None)
    if reading is None:
        return NO_LIMITS
    seconds = left(reading.cache, reading.operation)
    return (
        Limits(None, reading.cancel) if seconds is None else Limits.within(seconds, reading.cancel)
    )


def watch(controller: Any, cache: Any) -> None:
    """From now on a controller's reads follow the policy of this tree. Both are SGLang's.

    Raises: AttributeError: another SGLang's tree, that keeps its policy elsewhere.
    """
    if missing := [name for name in _OF_A_TREE if not hasattr(cache, name)]:
        raise AttributeError(
            f"lmcache: SGLang's {type(cache).__name__} has no {', '.join(missing)}: reads do not follow its "
            "prefetch policy, and take as long as a tier lets them"
        )
    _caches[controller] = ref(cache)


@contextmanager
def reading(controller: Any, operation: Prefetch) -> Iterator[None]:
    """While this thread reads for an operation, `current` says what its limits are."""
    cancel = Cancel()
    setattr(operation, _CANCEL, cancel)
    if operation.is_terminated():  # before there was anything to set
        cancel.set()
    _here.reading = _Reading(_policy_of(controller), operation, cancel)
    try:
        yield
    finally:
        _here.reading = None


def kv_is_here() -> None:
    """Of the read that this thread is in: what is left of it (a window, a state) has no budget any more.

    Without it the KV is of no use, so SGLang does not let its own run out then either.
    """
    reading: _Reading | None = getattr(_here, "reading", None)
    if reading is not None:
        _here.reading = replace(reading, cache=None)


def give_up(operation: Prefetch) -> None:
    """SGLang waits no longer. Costs its scheduler's thread a microsecond."""
    cancel: Cancel | None = getattr(operation, _CANCEL, None)
    if cancel is not None:
        cancel.set()


def _policy_of(controller: Any) -> Any:
    """The tree that has its policy; None where nobody watches it, or the tree is gone."""
    cache = _caches.get(controller)
    return None if cache is None else cache()


def left(cache: Any, operation: Prefetch) -> float | None:
    """What is left of SGLang's budget for a prefix, in seconds; None where its policy has none.

    The budget is by all that was asked for. SGLang's clock starts when the request is first held up, so before
    that nothing is spent: a read for a request that is far back in the queue may take longer.
    """
    if cache is None or cache.prefetch_stop_policy != "timeout":
        return None
    wait = cache._storage_prefetch_wait.get(operation.handle)
    if wait is not None and wait.timer.running:
        return max(0.0, float(wait.timeout_s - wait.timer.elapsed()))
    pages = max(operation.stats_requested_tokens // cache.page_size, len(operation.hash_value))
    return float(cache.prefetch_timeout_base + pages * cache.prefetch_timeout_per_page)
