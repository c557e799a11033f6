"""Whom a node knows, and whom it lets in: static, from seeds, from a DNS name, and by hearsay.

A node is known by its address. It may be connected to when its key is allowed; who is told of by others is asked for
that as anybody. Nobody keeps a list for all: each node tells whom it is linked to, and so all find all that they allow.

Hearsay may be wrong, or a lie. It never changes what the file says nor a node that was reached; a node that was not
reached yields its place after `TRIED_SECONDS`, or sooner to one whose key fewer of them have. So one liar with one key
fills the room that nobody else asks for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from .messages import NODES_MOST, NodeRecord

HEARSAY_SECONDS = 600.0  # that a node which others told of may be away before it is forgotten
TRIED_SECONDS = 60.0  # that it may be away before another one may have its place
SKIPPED_MOST = 2 * NODES_MOST
_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


class Source(IntEnum):
    """How a node came to be known; the lower wins."""

    CONFIGURED = 0  # a peer or a seed in the file, or under the DNS name
    HEARSAY = 1  # it connected here, or others told of it


@dataclass(frozen=True, slots=True)
class Known:
    """A node to link to.

    Attributes:
        node: its name as far as it is known; it says its own in `Hello`.
        key: Z85; empty where nothing is encrypted.
    """

    address: str
    key: str = ""
    node: str = ""
    source: Source = Source.CONFIGURED


@dataclass(slots=True)
class _Told:
    """A node by hearsay. Attributes: seen_at: last there was a link to it; or when it was told of."""

    known: Known
    seen_at: float
    reached: bool = False


class Membership:
    """The nodes to link to. No socket, no clock of its own.

    Args:
        own: addresses of this node.
        own_key: its public key; empty where nothing is encrypted.
        allowed: public keys that may be linked to and may connect; without encryption nobody is asked for one.
        most: how many nodes.
    """

    def __init__(
        self, own: Iterable[str], own_key: str, allowed: frozenset[str], most: int
    ) -> None:
        self._own = frozenset(own)
        self._own_key = own_key
        self._allowed = allowed
        self._most = most
        self._configured: dict[str, Known] = {}
        self._told: dict[str, _Told] = {}
        self._skipped: dict[str, float] = {}  # since when
        self.turned_away = 0  # told of, and not taken: no room, no address, or not allowed

    def configure(self, known: Iterable[Known], allowed: frozenset[str], most: int) -> None:
        """What the file says now. Others stay known as far as they are still allowed."""
        self._allowed, self._most = allowed, most
        self._configured = {each.address: each for each in known if each.address not in self._own}
        self._told = {
            address: each
            for address, each in self._told.items()
            if self.allows(each.known.key) and address not in self._configured
        }

    def allows(self, key: str) -> bool:
        return key in self._allowed if self._own_key else not key

    def told(self, node: str, address: str, key: str, now: float) -> None:
        """Somebody says that there is a node, or it said so itself."""
        here = self._told.get(address)
        if (here is not None and here.known.key == key) or self._is_settled(address):
            return
        if not is_address(address) or not self.allows(key) or not self._has_place(here, key, now):
            self.turned_away += 1
            return
        self._told[address] = _Told(Known(address, key, node, Source.HEARSAY), now)

    def _is_settled(self, address: str) -> bool:
        """Whether hearsay says nothing new of it. Who is reached nowhere says an empty one."""
        is_ours = not address or address in self._own
        return is_ours or address in self._configured or address in self._skipped

    def _has_place(self, here: _Told | None, key: str, now: float) -> bool:
        """Args: here: who is known under the address, with another key."""
        if here is not None:
            return now - here.seen_at > TRIED_SECONDS
        return len(self) < self._most or self._make_room(key, now)

    def _make_room(self, key: str, now: float) -> bool:
        """Forget somebody for a node of this key, if that is fair."""
        old = [a for a, each in self._told.items() if now - each.seen_at > TRIED_SECONDS]
        if not old:
            counts = Counter(each.known.key for each in self._told.values() if not each.reached)
            most = max(counts, key=counts.__getitem__, default=key)
            if counts[most] <= counts[key] + 1:
                return False
            old = [a for a, e in self._told.items() if e.known.key == most and not e.reached]
        del self._told[min(old, key=lambda address: self._told[address].seen_at)]
        return True

    def seen(self, address: str, now: float) -> None:
        """There is a link to it."""
        if address in self._told:
            self._told[address].seen_at, self._told[address].reached = now, True

    def skip(self, address: str, now: float) -> None:
        """It leads back here, or to a node that is linked to under another address."""
        self._told.pop(address, None)
        if len(self._skipped) >= SKIPPED_MOST:
            del self._skipped[min(self._skipped, key=self._skipped.__getitem__)]
        self._skipped[address] = now

    def expire(self, now: float) -> None:
        """Forget what nobody could confirm for long."""
        for address, since in list(self._skipped.items()):
            if now - since > HEARSAY_SECONDS:
                del self._skipped[address]
        for address, each in list(self._told.items()):
            if now - each.seen_at > HEARSAY_SECONDS:
                del self._told[address]

    def __iter__(self) -> Iterator[Known]:
        configured = [e for e in self._configured.values() if e.address not in self._skipped]
        told = [each.known for each in self._told.values()]
        yield from (configured + told)[: self._most]

    def __len__(self) -> int:
        return len(self._configured) + len(self._told)


def is_address(address: str) -> bool:
    """Whether it can be one of a node elsewhere: a host by name or number, and a port."""
    match = _ADDRESS.fullmatch(address)
    return match is not None and 0 < int(match[2]) < 1 << 16


def records(known: Iterable[Known], here: NodeRecord) -> list[NodeRecord]:
    """Those that others are told of: this node, if it can be reached, and those that it is linked to."""
    own = [here] if here.address else []
    others = [NodeRecord(each.node, each.address, each.key) for each in known if each.node]
    return (own + others)[:NODES_MOST]
