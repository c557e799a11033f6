"""Whether this process still runs the weights that its model's files hold.

SGLang can replace weights while it serves. What it computes from then on belongs to no file that a
fingerprint could be taken of, so its pages get a namespace of their own, which ends with the process.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4
from weakref import WeakMethod

_epoch = ""
_listeners: list[WeakMethod[Callable[[], None]]] = []


def epoch() -> str:
    """ "" while the weights are those of the files; after that, something nobody else has."""
    return _epoch


def replaced() -> None:
    """The weights are not what they were. Call it before a replacement and again after it."""
    global _epoch
    _epoch = uuid4().hex
    for listener in list(_listeners):
        listen = listener()
        if listen is None:
            _listeners.remove(listener)
        else:
            listen()


def on_replaced(listener: Callable[[], None]) -> None:
    """Call a bound method at each replacement, for as long as its object lives."""
    _listeners.append(WeakMethod(listener))
