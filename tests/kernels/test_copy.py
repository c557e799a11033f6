"""Copying and hashing in one pass: every length and alignment, on every vector unit."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

import pytest
import xxhash

from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.pages import PageSegments, gather

LINE = 64
BLOCK = 4096
STREAM_FROM = 16 << 10  # copies of this length on go past the caches
LENGTHS = [
    *(0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 239, 240, 241, 255, 256, 257),
    *(edge + n for edge in (1024, BLOCK, 2 * BLOCK, STREAM_FROM) for n in (-65, -64, -1, 0, 1, 64)),
    *(edge + n for edge in (64 << 10, 256 << 10) for n in (-1, 0, 1)),
    *((2 << 20) + n for n in (-63, 0, 63)),
]
GUARD = 3 * LINE


class Place:
    """Room for some bytes, so many bytes into a cache line, and guard bytes before and behind.

    Places one after another differ in their guards, or bytes copied from guard to guard would not show.
    """

    _guards = itertools.cycle(range(256))

    def __init__(self, size: int, into_line: int) -> None:
        self._guard = bytes([next(self._guards)])
        self._block = bytearray(self._guard * (size + 2 * GUARD + LINE))
        base = _native.address_of(self._block, True)
        self._start = GUARD + (into_line - base - GUARD) % LINE
        self.room = memoryview(self._block)[self._start : self._start + size]
        self.address = base + self._start

    def guards_hold(self) -> bool:
        around = self._block[: self._start] + self._block[self._start + len(self.room) :]
        return around == self._guard * len(around)


def checksum(key: bytes, data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data, xxhash.xxh3_64_intdigest(key))


def in_two(address: int, size: int, cut: int) -> PageSegments:
    return PageSegments([address, address + cut], [cut, size - cut], 2)


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("length", LENGTHS)
def test_a_page_arrives_whole_with_its_checksum(length: int) -> None:
    choose = random.Random(length)
    data = choose.randbytes(length)
    source, target = Place(length, choose.randrange(LINE)), Place(length, choose.randrange(LINE))
    source.room[:] = data
    cut = choose.randint(0, length)

    gathered = gather([b"k"], in_two(source.address, length, cut), [target.room])
    assert gathered == [checksum(b"k", data)]
    assert target.room == data and target.guards_hold() and source.room == data

    target.room[:] = bytes(length)
    page = in_two(target.address, length, cut)
    delivered = _native.scatter_page(b"k", source.room, page.addresses, page.sizes)
    assert delivered == checksum(b"k", data)
    assert target.room == data and target.guards_hold() and source.room == data


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("length", [100, 3 * BLOCK + 100, STREAM_FROM + 100])
@pytest.mark.parametrize("into_line", range(LINE))
def test_no_alignment_matters(length: int, into_line: int) -> None:
    data = random.Random(length).randbytes(length)
    for source_into, target_into in ((0, into_line), (into_line, 0), (into_line, into_line)):
        source, target = Place(length, source_into), Place(length, target_into)
        source.room[:] = data
        page = PageSegments([source.address], [length], 1)
        assert gather([b"k"], page, [target.room]) == [checksum(b"k", data)]
        assert target.room == data and target.guards_hold()


@pytest.mark.usefixtures("simd")
def test_many_small_segments_of_a_page_that_streams() -> None:
    choose = random.Random(0)
    places = [Place(choose.randint(0, 200), choose.randrange(LINE)) for _ in range(400)]
    record = choose.randbytes(sum(len(place.room) for place in places))
    assert len(record) > STREAM_FROM
    addresses = [place.address for place in places]
    sizes = [len(place.room) for place in places]
    assert _native.scatter_page(b"k", record, addresses, sizes) == checksum(b"k", record)
    assert b"".join(place.room for place in places) == record
    assert all(place.guards_hold() for place in places)
    again = bytearray(len(record))
    pages = PageSegments(addresses, sizes, len(sizes))
    assert gather([b"k"], pages, [again]) == [checksum(b"k", record)]
    assert again == record


@contextmanager
def changing(place: Place) -> Iterator[None]:
    """Another thread fills the place with ever other bytes."""
    started, stop = Event(), Event()

    def change() -> None:
        byte = 0
        while not stop.is_set():
            byte = (byte + 1) % 256
            ctypes.memset(place.address, byte, len(place.room))
            started.set()

    other = Thread(target=change)
    other.start()
    started.wait()
    yield
    stop.set()
    other.join()


@pytest.mark.usefixtures("simd")
@pytest.mark.parametrize("length", [STREAM_FROM - 1, 1 << 20])
def test_the_checksum_is_that_of_the_bytes_written_while_the_source_changes(length: int) -> None:
    source, target = Place(length, 0), Place(length, 7)
    page = PageSegments([source.address], [length], 1)
    torn, end = 0, monotonic() + 60
    with changing(source):
        while torn < 10:
            sums = gather([b"k"], page, [target.room])
            written = bytes(target.room)
            assert sums == [checksum(b"k", written)]
            torn += written != written[:1] * length
            assert monotonic() < end, "the source never changed while it was read"
