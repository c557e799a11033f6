"""What a node has, told piece by piece: the side that tells, and the side that follows.

Neither has a socket or a clock: messages go in and come out (node.py moves them). A subscriber costs the teller
at most `UNHEARD` messages on their way, however often it asks anew; one that falls behind the log is told the whole
again. Wholes that are being told are kept, at most `WHOLES` for all subscribers together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from .messages import TAG_BYTES, TAGS_MOST, UNHEARD, Heard, Subscribe, Summary

LOG_TAGS = 1 << 18  # that the log of changes holds; a whole of so many pages takes no longer
CHANGE_TAGS = 16  # that a change counts for beside its own: what Python takes for it
WHOLES = 4
WHOLE_CHANGES = 64  # that a whole is old before a newcomer is told another one
PIECE = TAGS_MOST * TAG_BYTES


@dataclass(frozen=True, slots=True)
class _Change:
    sequence: int  # of the state after it
    added: bytes
    removed: bytes

    @property
    def weight(self) -> int:
        """What it takes of the log."""
        return (len(self.added) + len(self.removed)) // TAG_BYTES + CHANGE_TAGS


@dataclass(frozen=True, slots=True)
class _Whole:
    """All that there was in a state."""

    sequence: int
    tags: bytes


class Published:
    """What this node shares, as of a number that grows with every change of it.

    Args:
        epoch: nothing said in another one counts.
        tags: the set, sorted, as bytes.
    """

    def __init__(self, epoch: int, tags: bytes = b"") -> None:
        self.epoch = epoch
        self.sequence = 0
        self.tags = tags
        self._log: deque[_Change] = deque()
        self._logged = 0  # weight of it
        self._wholes: deque[_Whole] = deque(maxlen=WHOLES)

    def change(self, tags: bytes, added: bytes, removed: bytes) -> None:
        """The set is another one now. Args: added, removed: what makes the difference."""
        self.tags = tags
        for more, less in _pieces(added, removed):
            self.sequence += 1
            self._append(_Change(self.sequence, more, less))

    def begin(self, epoch: int, tags: bytes) -> None:
        """Another epoch: subscribers start from nothing."""
        self.epoch, self.sequence, self.tags = epoch, 0, tags
        self._log.clear()
        self._wholes.clear()
        self._logged = 0

    def whole(self) -> _Whole:
        """All there is, or was a few changes ago: subscribers that come together share one."""
        if not (self._wholes and self._is_fresh(self._wholes[-1])):
            self._wholes.append(_Whole(self.sequence, self.tags))
        return self._wholes[-1]

    def _is_fresh(self, whole: _Whole) -> bool:
        changes = self.sequence - whole.sequence
        return changes <= WHOLE_CHANGES and self.knows(self.epoch, whole.sequence)

    def keeps(self, whole: _Whole) -> bool:
        """Whether it may be told further, and be followed by the changes since."""
        return whole in self._wholes and self.knows(self.epoch, whole.sequence)

    def after(self, sequence: int) -> _Change:
        """The change after a state that `knows` says yes of, and that is not the last."""
        return self._log[len(self._log) - (self.sequence - sequence)]

    def knows(self, epoch: int, sequence: int) -> bool:
        """Whether the log goes back to that state."""
        return epoch == self.epoch and 0 <= self.sequence - sequence <= len(self._log)

    def _append(self, change: _Change) -> None:
        self._log.append(change)
        self._logged += change.weight
        while self._logged > LOG_TAGS:
            self._logged -= self._log.popleft().weight


def _pieces(added: bytes, removed: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Pairs that fit into a message each. What goes is said first, as it misleads."""
    for at in range(0, len(removed), PIECE):
        yield b"", removed[at : at + PIECE]
    for at in range(0, len(added), PIECE):
        yield added[at : at + PIECE], b""


class Subscription:
    """One subscriber, as the teller sees it.

    Args:
        asked: from where on it wants to be told.
    """

    def __init__(self, published: Published, asked: Subscribe) -> None:
        self._published = published
        self._unheard: deque[Heard] = deque()
        self.again(asked)

    def again(self, asked: Subscribe) -> None:
        """It asks anew. What is on its way to it still counts, or asking would be a way to fill its queue."""
        self._epoch = self._published.epoch
        self._whole: _Whole | None = None  # that is being told, part by part
        self._told = 0  # bytes of the whole that were told
        self._part = 0  # of the whole, the last that was told
        self._sequence = 0  # state that was told last
        self._owes_answer = True  # also where nothing changed, the subscriber is to know so
        if self._published.knows(asked.epoch, asked.sequence):
            self._sequence = asked.sequence
        else:
            self._begin_whole()

    def _begin_whole(self) -> None:
        self._epoch, self._whole = self._published.epoch, self._published.whole()
        self._told, self._part = 0, 0

    @property
    def waiting(self) -> int:
        """Messages on their way."""
        return len(self._unheard)

    def heard(self, answer: Heard) -> bool:
        """Its answer to one of them. Another one than the oldest's says nothing, and returns false."""
        if not self._unheard or answer != self._unheard[0]:
            return False
        self._unheard.popleft()
        return True

    def next(self) -> Iterator[Summary]:
        """What may be told now."""
        self._turn()  # also where nothing may be told: nobody holds on to a whole that is not kept
        while len(self._unheard) < UNHEARD:
            self._turn()
            if self._whole is not None:
                yield self._on_its_way(self._next_part(self._whole))
            elif self._sequence < self._published.sequence:
                yield self._on_its_way(self._next_change())
            elif self._owes_answer:
                self._owes_answer = False
                yield self._on_its_way(self._piece(0, False, b"", b""))
            else:
                return

    def _turn(self) -> None:
        """To the whole, from its first part on, where what was told last is known no more."""
        if self._epoch != self._published.epoch:
            self._begin_whole()
        elif self._whole is None:
            if not self._published.knows(self._epoch, self._sequence):
                self._begin_whole()
        elif not self._published.keeps(self._whole):
            self._begin_whole()

    def _on_its_way(self, summary: Summary) -> Summary:
        self._unheard.append(Heard(summary.epoch, summary.sequence, summary.part))
        return summary

    def _next_part(self, whole: _Whole) -> Summary:
        piece = whole.tags[self._told : self._told + PIECE]
        self._told += len(piece)
        self._part += 1
        self._sequence = whole.sequence
        more = self._told < len(whole.tags)
        if not more:
            self._whole, self._owes_answer = None, False
        return self._piece(self._part, more, piece, b"")

    def _next_change(self) -> Summary:
        change = self._published.after(self._sequence)
        self._sequence, self._owes_answer = change.sequence, False
        return self._piece(0, False, change.added, change.removed)

    def _piece(self, part: int, more: bool, added: bytes, removed: bytes) -> Summary:
        newest = self._published.sequence
        return Summary(self._epoch, self._sequence, part, more, added, removed, newest)


class Following(Enum):
    """What a `Summary` was to who follows."""

    USED = "used"
    # Used, and nothing newer was known: what is held is what the peer had when it said so.
    IN_STEP = "in step"
    PASSED = "passed"  # of what was told before it was asked anew
    LOST = "lost"  # it does not continue what came before: ask anew


class Shelf(Protocol):
    """Where the tags of one peer are put down: the directory.

    A peer may say what it likes: tags that are there already, or not there, in any order and any number. The
    shelf keeps what it has room for; what it does not keep is missed, and found by nobody.
    """

    def put(self, tags: bytes) -> None: ...
    def drop(self, tags: bytes) -> None: ...
    def forget(self) -> None: ...


@dataclass(slots=True)
class Follower:
    """One peer's summary, as it is followed.

    Attributes:
        epoch, sequence: the state that was reached; 0 and 0: none.
    """

    shelf: Shelf
    epoch: int = 0
    sequence: int = 0
    _part: int = 0  # of a whole that is under way, the last that came
    _whole_at: int = 0
    _expects_whole: bool = field(default=True)

    def subscribe(self) -> Subscribe:
        """What to ask for: to go on from the state reached, or everything."""
        self._part = 0
        return Subscribe(0, 0) if self._expects_whole else Subscribe(self.epoch, self.sequence)

    def begin(self, epoch: int) -> None:
        """The peer's epoch, as it says. What is held of another one is forgotten."""
        if epoch != self.epoch:
            self.shelf.forget()
            self.epoch, self.sequence, self._part, self._expects_whole = epoch, 0, 0, True

    def take(self, summary: Summary) -> Following:
        if self._expects_whole and self._part == 0 and summary.part != 1:
            return Following.PASSED
        if summary.epoch != self.epoch or not _are_tags(summary):
            return self._lost()
        if summary.part:
            return self._take_part(summary)
        return self._take_change(summary)

    def _take_change(self, summary: Summary) -> Following:
        says_nothing = not summary.added and not summary.removed
        follows = summary.sequence == self.sequence + 1
        if self._expects_whole or not (
            follows or (says_nothing and summary.sequence == self.sequence)
        ):
            return self._lost()
        self.shelf.drop(summary.removed)
        self.shelf.put(summary.added)
        return self._reached(summary)

    def _take_part(self, summary: Summary) -> Following:
        if summary.part == 1:
            # What it has not been asked for makes this node erase what it holds of the peer, which takes long.
            if self._part or not (self._expects_whole or summary.sequence > self.sequence):
                return self._lost()
            self.shelf.forget()
            self._whole_at, self._expects_whole = summary.sequence, True
        elif summary.part != self._part + 1 or summary.sequence != self._whole_at:
            return self._lost()
        self._part = summary.part
        self.shelf.put(summary.added)
        if summary.more:
            return Following.USED
        self._part, self._expects_whole = 0, False
        return self._reached(summary)

    def _reached(self, summary: Summary) -> Following:
        self.sequence = summary.sequence
        return Following.USED if self.sequence < summary.newest else Following.IN_STEP

    def _lost(self) -> Following:
        self.shelf.forget()
        self.sequence, self._part, self._expects_whole = 0, 0, True
        return Following.LOST


def _are_tags(summary: Summary) -> bool:
    return len(summary.added) % TAG_BYTES == 0 and len(summary.removed) % TAG_BYTES == 0
