"""A peer's place in the directory, as its link writes to it."""

from __future__ import annotations

from .directory import NO_RECORD, Directory, PeerRecord
from .link import Link
from .messages import TAG_BYTES
from .standing import Standing


class DirectoryColumn:
    """Args: number: of the peer's place. most: pages of one peer, so that none takes the room of all others."""

    def __init__(self, directory: Directory, number: int, most: int) -> None:
        self._most = most
        self._directory = directory
        self._number = number
        self._described = NO_RECORD

    def put(self, tags: bytes) -> None:
        room = max(0, self._most - self._directory.pages(self._number))
        self._directory.put(self._number, tags[: room * TAG_BYTES])

    def drop(self, tags: bytes) -> None:
        self._directory.drop(self._number, tags)

    def forget(self) -> None:
        self._directory.forget(self._number)

    def believe(self) -> None:
        self._directory.believe(self._number)

    def doubt(self) -> None:
        self._directory.doubt(self._number)

    def describe(self, link: Link) -> None:
        if link.standing is Standing.NOBODY:
            record = NO_RECORD
        else:
            record = PeerRecord(
                name=link.node,
                address=link.known.address,
                public_key=link.known.key.encode(),
                state=link.standing,
                version=link.version,
                epoch=link.epoch,
            )
        if record != self._described:  # readers look at all of it again
            self._described = record
            self._directory.set_record(self._number, record)
        self._directory.set_pulse(
            self._number, min(int(link.rtt * 1e6), 0xFFFFFFFF), min(link.load, 0xFFFFFFFF)
        )
