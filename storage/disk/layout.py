"""What lies in a store directory, and what lies in its LMDB file.

    <path>/pages.lmdb         the LMDB file (one file, no subdirectory)
    <path>/pages.lmdb-lock    LMDB's own reader table and writer lock
    <path>/pages.lmdb-in-use  locked shared by every process that has the store open
    <path>/pages.lmdb-writing locked by the process that writes, before LMDB's own lock
    <path>/pages.lmdb-new     a smaller copy in the making, when the limit was lowered

Four tables, all numbers little-endian but for the order table's keys:

    meta    b"magic" -> b"lmcache-sglang pages"    b"format" -> u32
            b"used"  -> u64, bytes counted         b"next"   -> u64, next sequence number
    index   page key (48 bytes) -> sequence u64, length u64, checksum u64
    order   sequence u64, big-endian -> page key   (smallest first out)
    pages   page key -> the page's bytes

`index` alone answers `exists`, so that a lookup never touches a page's bytes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..base import KEY_BYTES
from .probe import Expected

FILE = "pages.lmdb"
LOCK = "pages.lmdb-in-use"
TURN = "pages.lmdb-writing"
NEW = "pages.lmdb-new"

MAGIC = b"lmcache-sglang pages"
FORMAT = 1
TABLES = (b"meta", b"index", b"order", b"pages")

_ENTRY = struct.Struct("<QQQ")
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_SEQUENCE = struct.Struct(">Q")

EXPECTED = Expected(
    magic=MAGIC.decode(),
    format=FORMAT,
    tables=[name.decode() for name in TABLES],
    lengths={"index": (KEY_BYTES, _ENTRY.size), "order": (_SEQUENCE.size, KEY_BYTES)},
    entry=_ENTRY.format,
)

_LMDB_HEADER = 16  # of a run of overflow pages
_TREE_BYTES = 512  # of one record in index, order and the key of pages, at half-full tree pages


class Entry(NamedTuple):
    """What the index says of a page."""

    sequence: int
    length: int
    checksum: int

    def pack(self) -> bytes:
        return _ENTRY.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Entry:
        """A damaged entry reads as one of length 0, which no page has."""
        return cls(*_ENTRY.unpack(data)) if len(data) == _ENTRY.size else cls(0, 0, 0)


def pack_u64(value: int) -> bytes:
    return _U64.pack(value)


def unpack_u64(data: bytes | memoryview) -> int:
    value: int = _U64.unpack(data)[0]
    return value


def pack_format(value: int) -> bytes:
    return _U32.pack(value)


def pack_sequence(value: int) -> bytes:
    return _SEQUENCE.pack(value)


def cost(length: int, lmdb_page: int) -> int:
    """Bytes of the file that a page of `length` bytes counts for, with LMDB pages of `lmdb_page`."""
    overflow = -(-(length + _LMDB_HEADER) // lmdb_page) * lmdb_page
    return overflow + _TREE_BYTES
