"""The file that says what a store is: `store.json`, read before anything else is touched."""

from __future__ import annotations

import os
import secrets
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from ...errors import ConfigError
from .plan import Plan

FILE = "store.json"
FORMAT = 2  # 1 was one LMDB file, pages.lmdb, with the pages as its values
_OLD_FILE = "pages.lmdb"


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    format: of all files of the store; a change of any of them is a new number.
    id: of this store, 16 bytes as hexadecimal digits.
    written_by: the version of the package that made it.
    """

    magic: str = "lmcache-sglang slabs"
    format: int = FORMAT
    id: str
    written_by: str
    slab_bytes: int
    slabs: int
    ghosts: int

    @classmethod
    def new(cls, plan: Plan) -> Head:
        return cls(
            id=secrets.token_hex(16),
            written_by=_own_version(),
            slab_bytes=plan.slab_bytes,
            slabs=plan.slabs,
            ghosts=plan.ghosts,
        )

    def resized(self, plan: Plan) -> Head:
        return msgspec.structs.replace(self, slabs=plan.slabs, ghosts=plan.ghosts)

    @property
    def plan(self) -> Plan:
        slots = min(self.slab_bytes // 4096, 16384)
        return Plan(self.slab_bytes, slots, self.slabs, self.ghosts)


class _Mark(msgspec.Struct):
    """What every format has had and will have."""

    magic: str
    format: int


def read(directory: Path, setting: str) -> Head | None:
    """The head of the store in a directory; None when there is no store. Changes nothing.

    Raises:
        ConfigError: there is something that is not a store of this format.
    """
    file = directory / FILE
    if (directory / _OLD_FILE).exists():
        raise ConfigError(setting, _other_format(directory / _OLD_FILE, 1))
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(setting, f"cannot read {file}: {error.strerror}") from error
    try:
        mark = msgspec.json.decode(text, type=_Mark)
        if mark.magic != "lmcache-sglang slabs":
            raise ConfigError(
                setting, f"{file} belongs to another program; give a directory of our own"
            )
        if mark.format != FORMAT:
            raise ConfigError(setting, _other_format(file, mark.format))
        head = msgspec.json.decode(text, type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(setting, _damaged(file, str(error))) from error
    if not _sane(head):
        raise ConfigError(setting, _damaged(file, "its numbers cannot be those of a store"))
    return head


def write(directory: Path, head: Head) -> None:
    """Put the head in place, whole or not at all. Raises: OSError."""
    new = directory / f"{FILE}.new"
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(head), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(directory / FILE)
    sync(directory)


def sync(path: Path) -> None:
    """Put a file, or the names in a directory, on the medium. Raises: OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sane(head: Head) -> bool:
    slab = head.slab_bytes
    power_of_two = slab > 0 and slab & (slab - 1) == 0
    return (
        power_of_two
        and 4096 <= slab <= 1 << 40
        and 0 < head.slabs < 1 << 32
        and 0 < head.ghosts < 1 << 32
        and len(head.id) == 32
        and set(head.id) <= set("0123456789abcdef")
    )


def _other_format(file: Path, number: int) -> str:
    return (
        f"{file} was written in format {number}, this version reads format {FORMAT}; use the version "
        "that wrote it, another directory, or delete it if its pages are of no more use"
    )


def _damaged(file: Path, why: str) -> str:
    return (
        f"{file} is damaged ({why}); nothing was changed: move the directory away or delete it, and the "
        "next start makes a new store"
    )


def _own_version() -> str:
    try:
        return version("lmcache-sglang")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
