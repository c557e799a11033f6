"""On record beside a store: which kinds of page it was ever given.

A file a namespace, named by the namespace's digest and holding the text that the digest is of, so that a file
that was changed proves itself wrong. A namespace is a digest, and nothing else in a store says what it stands
for; readers of another topology need to know whose pages to look for.

    <tier>/namespaces/<32 hex digits>.json
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock

import msgspec

from .identity import VERSION, ModelIdentity, PageIdentity, digest, text_of
from .kind import Kind

logger = logging.getLogger(__name__)

FOLDER = "namespaces"
LOOK_EVERY_SECONDS = 1.0  # for news
_SETTLED_NS = (
    1_000_000_000  # a folder changed more recently may change again within its clock's tick
)


class _Record(msgspec.Struct):
    version: int
    model: ModelIdentity
    page: PageIdentity


_RECORD = msgspec.json.Decoder(_Record)


class Namespaces:
    """The records of one store.

    Args:
        tiers: the directories of its tiers; each has them all.
    """

    def __init__(self, tiers: Iterable[Path]) -> None:
        self._folders = [tier / FOLDER for tier in tiers]
        self._lock = (
            Lock()
        )  # a slower reader must not put older records beside a newer sight of the folders
        self._seen: list[int] = []
        self._look_again = float("-inf")
        self._kinds: dict[bytes, Kind] = {}

    def add(self, kind: Kind) -> None:
        """Put a kind of page on record. One that cannot be is found by its own topology only, and that is logged."""
        text = text_of(kind.model, kind.page)
        for folder in self._folders:
            try:
                _write(folder, kind.namespace, text)
            except OSError as error:
                logger.warning(
                    "lmcache: %s cannot be written (%s): engines of another topology will not find "
                    "the pages of this one",
                    folder,
                    error,
                )

    def refreshed(self) -> bool:
        """Read what others have put on record since the last call; whether there was anything.

        Costs a stat a tier when there was not.
        """
        with self._lock:
            seen = [_changed_at(folder) for folder in self._folders]
            if seen == self._seen:
                return False
            settled = time.time_ns() - max(seen, default=0) > _SETTLED_NS
            self._seen = seen if settled else []
            kinds = {kind.namespace: kind for folder in self._folders for kind in _read(folder)}
            changed = kinds.keys() != self._kinds.keys()
            self._kinds = kinds
            return changed

    def news(self) -> bool:
        """As `refreshed`, and false without a look within a second of the last one.

        For what asks at each miss: a look asks the file system, and a thread that does has to wait for the GIL again.
        """
        now = time.monotonic()
        if now < self._look_again:
            return False
        self._look_again = now + LOOK_EVERY_SECONDS
        return self.refreshed()

    def kinds(self) -> list[Kind]:
        """As of the last `refreshed` or `news`."""
        return list(self._kinds.values())


def _write(folder: Path, namespace: bytes, text: bytes) -> None:
    file = folder / f"{namespace.hex()}.json"
    if file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(dir=folder, prefix=f".{namespace.hex()}.")
    try:
        os.fchmod(handle, 0o644)  # engines of other users may share the store
        with os.fdopen(handle, "wb") as record:
            record.write(text)
        Path(new).replace(file)
    finally:
        Path(new).unlink(missing_ok=True)


def _read(folder: Path) -> Iterator[Kind]:
    for file in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):  # gone since, not ours to read, or no record
            yield _kind(file)


def _kind(file: Path) -> Kind:
    """Raises: ValueError for what is no record of this version."""
    text = file.read_bytes()
    namespace = bytes.fromhex(file.stem)
    if digest(text) != namespace:
        raise ValueError(f"{file} is not what its name says")
    record = _RECORD.decode(text)
    if record.version != VERSION:
        raise ValueError(f"{file} is of version {record.version}")
    return Kind(namespace, record.model, record.page)


def _changed_at(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:  # it is not there yet, or not ours to read: there is nothing to learn
        return 0
