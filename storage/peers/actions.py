"""What the control side wants done on sockets. It has none itself, so that a test can be its network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .messages import Message


@dataclass(frozen=True, slots=True)
class Open:
    """Connect a link, anew if there is one. Args: key: the other side's; empty: not encrypted."""

    link: int
    address: str
    key: str


@dataclass(frozen=True, slots=True)
class Close:
    """End a link: nothing is heard on it any more. What was said just before may be lost, a `Goodbye` should not
    be: it is given a moment (ZMQ_LINGER)."""

    link: int


@dataclass(frozen=True, slots=True)
class Say:
    """Send on a link of ours."""

    link: int
    message: Message


@dataclass(frozen=True, slots=True)
class Answer:
    """Send to who connected here."""

    route: bytes
    message: Message


Action: TypeAlias = Open | Close | Say | Answer
