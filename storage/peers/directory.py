"""Which peers hold a page, answered from memory: no process is asked, and none is waited for.

One process of a node, its agent, hears from the peers what they hold and writes it into a `Directory`: two
files in shared memory, a small head and a table. Every engine process maps them through a `DirectoryView`.
There are no locks between processes; the agent may die at any instruction.

The table (csrc/tag_table.hpp) has a word of 8 bytes for each page of each peer: the upper 58 bits of the
page's tag and 6 bits of the peer's number, which is why a node has at most 64 peers. It is between 35 % and
70 % full, so a page of a peer takes 11 to 23 bytes; 64 peers with a million pages each take 1 GiB.

It is not the page's key that a word holds, so a lookup may find a page that nobody has. Of N words a lookup
compares those of its tag's neighbourhood only, but all 58 bits of them, so the chance is N / 2^58: with 64
million words 2.2e-10, or one false hit in half a day of 100,000 lookups a second. What it costs is one
request to a peer, which answers that it has no such page. Words of 4 bytes would have left 26 bits for the
tag, and a false hit for nearly every lookup; a filter that forgets pages, as a peer's eviction demands,
would not be smaller for 64 peers.

What a reader may believe:

- A word that it sees was written for that page and that peer. One that is being moved to a larger table may
  be missed, never invented.
- Words count only while their peer is *believed*: one bit a peer, looked at once a call. `forget` doubts
  the peer first, so nothing of it is answered from then on, however long the erasing takes.
- Nothing counts once the agent has not beaten for `silent_seconds`, has closed the directory, or has been
  replaced by another. A directory is never carried over a restart: an agent makes its own anew.
- What found no room is left out, counted, and simply not found.

Homes of tags in the table are salted with a number that no peer knows, so none can make lookups slow by
what it announces.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ...errors import Reason, TierError
from .. import _native

PEERS_MOST = 64
EVERYBODY = (1 << PEERS_MOST) - 1
NAME_BYTES = 64
ADDRESS_BYTES = 256
KEY_BYTES = 40  # a CURVE key in Z85

WORD_BYTES = 8
HEADS_BYTES = 1 << 20  # more than all that is not words

LEAST_BYTES = 2 << 20  # of the smallest table, its copy and the head
SILENT_SECONDS = 5.0

_WHO = "peers' directory"


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What an engine process must know of a peer to ask it for pages.

    Attributes:
        name: at most 64 bytes of UTF-8.
        address: at most 256 bytes of UTF-8.
        public_key: 40 characters of Z85, or empty.
        state: its meaning is the agent's; one byte.
        version: of the protocol that was agreed on.
        epoch: of what the peer holds: another one means that all of it was told anew.
        rtt_us: how long a round trip takes, in microseconds.
        load: bytes queued for it.
    """

    name: str = ""
    address: str = ""
    public_key: bytes = b""
    state: int = 0
    version: int = 0
    epoch: int = 0
    rtt_us: int = 0
    load: int = 0


NO_RECORD = PeerRecord()  # no peer has an empty name


@dataclass(frozen=True, slots=True)
class DirectoryStats:
    """Attributes:
    words: that the table has.
    live: in use.
    erased: of no use until the table is made anew, which it is before it grows for them.
    bytes: of both files.
    generation: 1, and one more each time that the table was made anew.
    left_out: pages that found no room, of all puts together.
    """

    words: int
    live: int
    erased: int
    bytes: int
    generation: int
    left_out: int


class Standing(Enum):
    """Whether there is a directory to believe; but for READY, no peer holds anything."""

    READY = "ready"
    ABSENT = "absent"  # there is none
    FOREIGN = "foreign"  # what is there is no directory of this version, or cannot be opened
    CLOSED = "closed"  # its agent has ended, or another one has taken its place
    SILENT = "silent"  # its agent has not been heard of for too long


# In the order of the native side's codes (peer_directory.hpp).
_STANDINGS = (
    Standing.READY,
    Standing.ABSENT,
    Standing.FOREIGN,
    Standing.CLOSED,
    Standing.SILENT,
)


@contextmanager
def _failures() -> Iterator[None]:
    """Raises: TierError, for what the native side raises."""
    try:
        yield
    except _native.StoreFailure as failure:
        reason, detail = failure.args
        raise TierError(_WHO, Reason(reason), detail) from failure


class Directory:
    """The agent's side. Threads may share it; calls that change the table wait for one another.

    Nothing of it is there yet, and nobody is believed. Peers are numbers from 0 to 63. Tags are `bytes`,
    8 for each one, in any order. Besides what each method says, all raise `ValueError` for what is no
    peer, and those that change the table `TierError` (CLOSED) after `close`.
    """

    def __init__(self, native: _native.PeerDirectory, agent: int, most_words: int) -> None:
        self._native = native
        self.agent = agent
        self.most_words = most_words  # of the largest table

    @classmethod
    def create(cls, path: Path, most_bytes: int) -> Directory:
        """Make one, in place of what is at the path.

        Args:
            path: of the head, in a folder of shared memory that exists. The table lies beside it.
            most_bytes: of all its files at any time. A table takes at most half: it is made anew beside
                itself.

        Raises:
            ValueError: less than LEAST_BYTES.
            TierError: FULL, the medium has no room for the smallest one; IO.
        """
        if most_bytes < LEAST_BYTES:
            raise ValueError(
                f"a directory takes at least {LEAST_BYTES} bytes, and {most_bytes} were given"
            )
        agent = secrets.randbits(63) + 1  # 0: none
        with _failures():
            native = _native.PeerDirectory(
                str(path.absolute()), most_bytes, agent, secrets.randbits(64)
            )
        fits = (most_bytes - HEADS_BYTES) // 2 // WORD_BYTES
        return cls(native, agent, 1 << max(0, fits.bit_length() - 1))

    def put(self, peer: int, tags: bytes) -> int:
        """A peer holds these pages too; how many found no room."""
        with _failures():
            return self._native.put(peer, tags)

    def drop(self, peer: int, tags: bytes) -> int:
        """A peer holds these pages no more; how many were there."""
        with _failures():
            return self._native.drop(peer, tags)

    def forget(self, peer: int) -> None:
        """A peer is doubted at once, and then all its pages are erased; its record stays."""
        with _failures():
            self._native.forget(peer)

    def believe(self, peer: int) -> None:
        """From now on the pages of a peer count."""
        self._native.believe(peer)

    def doubt(self, peer: int) -> None:
        """From now on they do not; they stay, until it is believed again."""
        self._native.doubt(peer)

    @property
    def believed(self) -> int:
        """The peers that count, one bit each."""
        return self._native.believed()

    def set_record(self, peer: int, record: PeerRecord) -> None:
        """Raises: ValueError, for a field that is too long; TypeError, for a number that is too large."""
        self._native.set_record(
            peer,
            record.name.encode(),
            record.address.encode(),
            record.public_key,
            record.state,
            record.version,
            record.epoch,
            record.rtt_us,
            record.load,
        )

    def set_pulse(self, peer: int, rtt_us: int, load: int) -> None:
        """The two fields of a record that change all the time; the rest of it stays."""
        self._native.set_pulse(peer, rtt_us, load)

    def beat(self) -> None:
        """Say that the agent lives. Waits for no other call."""
        self._native.beat()

    def pages(self, peer: int) -> int:
        """How many pages of a peer are here, believed or not."""
        return self._native.pages(peer)

    def stats(self) -> DirectoryStats:
        with _failures():
            return DirectoryStats(**self._native.stats())

    def close(self) -> None:
        """Tell who reads, and remove the files. Idempotent."""
        self._native.close()


class DirectoryView:
    """An engine process's side. Threads may share it; no call waits for the agent, and none fails.

    Args:
        path: of the head, where there need not be one yet.
        silent_seconds: without a beat, after which the agent is taken for dead or hung.
    """

    def __init__(self, path: Path, silent_seconds: float = SILENT_SECONDS) -> None:
        self._native = _native.PeerDirectoryView(str(path.absolute()), int(silent_seconds * 1000))
        self.refresh()

    def refresh(self) -> Standing:
        """Look whether an agent has made another directory. To be called once a second or so.

        It also maps what lookups will touch, which for a table of 1 GiB takes tens of milliseconds the
        first time after the table was made: call it in a thread that nobody waits for.
        """
        return _STANDINGS[self._native.refresh()]

    @property
    def standing(self) -> Standing:
        return _STANDINGS[self._native.standing()]

    def holders(self, keys: Sequence[bytes], among: int = EVERYBODY) -> bytes:
        """Of each page the believed peers that hold it: 8 bytes, little-endian, one bit for each peer.

        Args:
            among: the peers that the caller would ask, one bit each.

        Raises:
            ValueError: what is no key.
        """
        return self._native.holders(list(keys), among)

    def exists(self, keys: Sequence[bytes], among: int = EVERYBODY) -> list[bool]:
        """Whether any of those peers holds each page; else as `holders`, and faster."""
        return self._native.exists(list(keys), among)

    def record(self, peer: int) -> PeerRecord:
        """The last whole one, from whichever time; NO_RECORD: none was written."""
        found = self._native.record(peer)
        if found is None:
            return NO_RECORD
        name, address, key, state, version, epoch, rtt_us, load = found
        return PeerRecord(
            name.decode(errors="replace"),
            address.decode(errors="replace"),
            key,
            state,
            version,
            epoch,
            rtt_us,
            load,
        )

    @property
    def changes(self) -> int:
        """Another number after each change of a record but its `rtt_us` and `load`; 0: no directory."""
        return self._native.changes()

    @property
    def believed(self) -> int:
        """The peers that count, one bit each."""
        return self._native.believed()

    @property
    def agent(self) -> int:
        """Of whom the directory is: a number drawn at random; 0: no directory."""
        return self._native.agent()

    def close(self) -> None:
        """Let go of the files, until the next `refresh`."""
        self._native.close()
