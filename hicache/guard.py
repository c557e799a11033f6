"""The last line before SGLang: what nobody foresaw costs hits, not requests.

A tier's failures are misses before they get here (storage/chain.py). What is left is a mistake of this package's
own, or memory that ran out. SGLang 0.5.23 catches it and goes on; its versions before ended the thread, and every
later request hung. It is counted, and logged with its traceback, once a minute for each kind.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ..storage.seldom import Seldom

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Counts(Protocol):
    """Who is told of it."""

    def failed(self, call: str) -> None: ...


S = TypeVar("S", bound=Counts)
Call = Callable[Concatenate[S, P], T]

_seldom = Seldom()


def guarded(nothing: Call[S, P, T]) -> Callable[[Call[S, P, T]], Call[S, P, T]]:
    """A decorator of a backend's calls. Args: nothing: makes the answer of one that moved nothing."""

    def decorate(call: Call[S, P, T]) -> Call[S, P, T]:
        def guard(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return call(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001  # every kind: see above
                _report(call.__name__, error)
                self.failed(call.__name__)
                return nothing(self, *args, **kwargs)

        functools.update_wrapper(guard, call)
        return guard

    return decorate


def harmless(hook: Callable[P, R]) -> Callable[P, R | None]:
    """A decorator of hooks that only look on, most of them on SGLang's scheduler's thread: one that fails is logged,
    and answers None, by which SGLang's registry leaves everything as it is."""

    def guard(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return hook(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # every kind: see above
            _report(hook.__name__, error)
            return None

    functools.update_wrapper(guard, hook)
    return guard


def _report(call: str, error: Exception) -> None:
    if not _seldom.due((call, type(error))):
        return
    logger.error(
        "lmcache: %s failed, and nothing was done by it. Please report this", call, exc_info=error
    )
