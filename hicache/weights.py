"""Whether this process still runs the weights that its model's files hold, and the name of those that no file holds.

SGLang can replace weights while it serves, and files can be replaced while it serves what was in them. What is
computed by weights that no fingerprint was taken of belongs to nobody else: its pages get a name that no other
engine has, that all ranks of this one have, and that no other weights of this one ever get.

The name is made by the first rank when a backend is made, and is the same on all of them, since ranks read what
one of them stored (latent attention, say). To it come two counts. Updates are collective, so every rank counts the
same. Resets need not be: ranks whose counts differ miss each other's pages until the next update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakMethod

import torch

if TYPE_CHECKING:
    from .identity import Sight

Seen = Mapping[str, "Sight | None"]  # by place; None: nothing could be seen there


@dataclass
class _State:
    engine: str = ""  # of this attachment; "" before the first
    updates: int = 0  # told since then; each is told twice
    resets: int = 0  # since the last of them
    were_replaced: bool = False  # ever, in this process
    loaded: Seen | None = None  # what lay there when the weights had been loaded
    listeners: list[WeakMethod[Callable[[], None]]] = field(default_factory=list)


_state = _State()


def begin(group: Any = None) -> None:
    """A backend is being made: what is temporary gets names that were never used before.

    Collective: all ranks of the group must call it, and get the same.

    Args:
        group: of the ranks that attach together, a torch process group for CPU tensors; None for one rank alone.
    """
    made = torch.frombuffer(bytearray(uuid4().bytes), dtype=torch.uint8)
    if group is not None:
        torch.distributed.broadcast(made, group=group, group_src=0)
    _state.engine = bytes(made.tolist()).hex()
    _state.updates = _state.resets = 0


def temporary() -> str:
    """The name of the weights as they are now, if no file holds them. The same on all ranks, and nowhere else."""
    if not _state.engine:
        begin()
    return f"{_state.engine}.{_state.updates}.{_state.resets}"


def epoch() -> str:
    """ "" while the weights are those that were loaded; after that, `temporary`."""
    return temporary() if _state.were_replaced else ""


def replaced() -> None:
    """The weights are not what they were. Call it before a replacement and again after it, on all ranks."""
    _state.were_replaced = True
    _state.updates += 1
    _state.resets = 0
    _tell()


def emptied() -> None:
    """Nothing that was computed before is on its way to the store any more."""
    if _state.were_replaced:
        _state.resets += 1
        _tell()


def _tell() -> None:
    for listener in list(_state.listeners):
        listen = listener()
        if listen is None:
            _state.listeners.remove(listener)
        else:
            listen()


def on_replaced(listener: Callable[[], None]) -> None:
    """Call a bound method at each replacement, for as long as its object lives."""
    _state.listeners.append(WeakMethod(listener))


def loaded(look: Callable[[], Seen]) -> None:
    """The weights have been loaded: remember what lies where they came from. The first call counts."""
    if _state.loaded is None:
        _state.loaded = {}  # if looking fails, nothing that is seen later is known to be the same
        _state.loaded = look()


def changed(look: Callable[[], Seen]) -> list[str]:
    """The places where other files lie than were loaded, as far as `loaded` was called."""
    if _state.loaded is None:
        return []
    before, now = _state.loaded, look()
    return [place for place, sight in now.items() if place not in before or before[place] != sight]
