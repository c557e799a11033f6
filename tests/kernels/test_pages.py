"""Pages between an engine's memory and records: the right bytes, whole or not at all, nothing beside."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from threading import Event, Thread

import pytest

from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.pages import PageSegments, checksums, gather, place, scatter
from lmcache_sglang.testing.tier_suite import EngineMemory

SIZES = [*(1 << bits for bits in range(16)), 3, 5, 7, 241, 1023, 4097, 32_771]
KEYS = [f"key {i}".encode() for i in range(len(SIZES))]
CONTENTS = [random.Random(size).randbytes(size) for size in SIZES]


@pytest.mark.parametrize("per_page", range(1, 10))
def test_gather_loses_and_moves_no_byte(per_page: int) -> None:
    memory = EngineMemory(CONTENTS, per_page)
    records = [bytearray(size) for size in SIZES]
    sums = gather(KEYS, memory.segments, records)
    assert records == CONTENTS
    assert sums == checksums(KEYS, CONTENTS)
    assert [memory.page(i) for i in range(len(memory.segments))] == CONTENTS


@pytest.mark.parametrize("per_page", range(1, 10))
def test_scatter_writes_the_pages_and_nothing_beside_them(per_page: int) -> None:
    memory = EngineMemory.blank(SIZES, per_page)
    assert scatter(KEYS, CONTENTS, checksums(KEYS, CONTENTS), memory.segments) == [True] * len(KEYS)
    assert [memory.page(i) for i in range(len(KEYS))] == CONTENTS
    assert memory.guards_hold()


def test_gather_writes_nothing_beside_its_record() -> None:
    block = bytearray(b"\xa5" * 300)
    gather([b"k"], EngineMemory([b"x" * 100], 3).segments, [memoryview(block)[77:177]])
    assert block == b"\xa5" * 77 + b"x" * 100 + b"\xa5" * 123


def one_bit_off(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0x80])


DAMAGE: dict[str, Callable[[bytes, bytes, int], tuple[bytes, bytes, int]]] = {
    "a bit of the record": lambda key, data, checksum: (key, one_bit_off(data), checksum),
    "a bit of the checksum": lambda key, data, checksum: (key, data, checksum ^ 1),
    "the key": lambda key, data, checksum: (one_bit_off(key), data, checksum),
    "a record too short": lambda key, data, checksum: (key, data[:-1], checksum),
    "a record too long": lambda key, data, checksum: (key, data + b"\0", checksum),
    "no record": lambda key, data, checksum: (key, b"", checksum),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_a_page_that_does_not_verify_is_not_written(what: str, size: int) -> None:
    keys = [b"before", b"damaged", b"after"]
    contents = [random.Random(i).randbytes(size) for i in range(3)]
    sums = checksums(keys, contents)
    key, record, checksum = DAMAGE[what](keys[1], contents[1], sums[1])
    memory = EngineMemory.blank([size] * 3, 2)
    whole = scatter(
        [keys[0], key, keys[2]],
        [contents[0], record, contents[2]],
        [sums[0], checksum, sums[2]],
        memory.segments,
    )
    assert whole == [True, False, True]
    assert memory.is_blank(1)
    assert [memory.page(0), memory.page(2)] == [contents[0], contents[2]]
    assert memory.guards_hold()


def test_a_record_of_the_right_sum_and_another_length_is_not_written() -> None:
    """The checksum alone would pass it."""
    longer = b"x" * 200
    memory = EngineMemory.blank([100])
    assert scatter([b"k"], [longer], checksums([b"k"], [longer]), memory.segments) == [False]
    assert memory.is_blank(0) and memory.guards_hold()


@pytest.mark.parametrize(
    ("keys", "records", "sums"), [(1, 2, 2), (3, 2, 2), (2, 1, 2), (2, 3, 2), (2, 2, 1), (2, 2, 3)]
)
def test_unequal_counts_copy_nothing(keys: int, records: int, sums: int) -> None:
    memory = EngineMemory.blank([10, 10])
    data = [b"0123456789"] * records
    with pytest.raises(ValueError):
        scatter(
            [b"k"] * keys, data, checksums([b"k"] * sums, [b"0123456789"] * sums), memory.segments
        )
    assert memory.is_blank(0) and memory.is_blank(1)
    if sums == 2:
        buffers = [bytearray(10) for _ in range(records)]
        with pytest.raises(ValueError):
            gather([b"k"] * keys, EngineMemory([b"x" * 10] * 2).segments, buffers)
        assert buffers == [bytearray(10)] * records
    if keys != records:
        with pytest.raises(ValueError):
            checksums([b"k"] * keys, data)


@pytest.mark.parametrize("length", [0, 9, 11])
def test_gather_into_a_record_of_another_length_copies_nothing(length: int) -> None:
    records = [bytearray(10), bytearray(length)]
    with pytest.raises(ValueError, match="length"):
        gather([b"a", b"b"], EngineMemory([b"x" * 10] * 2).segments, records)
    assert records == [bytearray(10), bytearray(length)]


def test_gather_never_writes_to_what_is_read_only() -> None:
    record = bytes(10)
    for target in (record, memoryview(bytearray(10)).toreadonly()):
        with pytest.raises(BufferError):
            gather([b"k"], EngineMemory([b"x" * 10]).segments, [target])
    assert record == bytes(10)
    with pytest.raises(BufferError):
        PageSegments.of_buffers([record], writable=True)


def test_buffers_that_are_refused_are_released() -> None:
    """A buffer that is still held cannot be resized."""
    held = bytearray(10)
    with pytest.raises(BufferError):
        gather([b"a", b"b"], EngineMemory([b"x" * 10] * 2).segments, [held, bytes(10)])
    with pytest.raises(TypeError):
        checksums([b"a", "b"], [held, held])  # type: ignore[list-item]
    held.append(0)


def test_keys_that_are_not_bytes_are_refused() -> None:
    with pytest.raises(TypeError):
        checksums(["text"], [b"data"])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        checksums([bytearray(b"k")], [b"data"])  # type: ignore[list-item]


def test_an_empty_batch_is_no_error() -> None:
    nothing = PageSegments([], [], 1)
    assert gather([], nothing, []) == []
    assert scatter([], [], [], nothing) == []
    assert checksums([], []) == []


def test_segments_that_do_not_make_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 addresses do not divide into pages of 2"):
        PageSegments([1, 2, 3], [1, 1, 1], 2)
    with pytest.raises(ValueError, match="pages of 0"):
        PageSegments([1], [1], 0)
    with pytest.raises(ValueError, match="2 addresses but 1 sizes"):
        PageSegments([1, 2], [1], 1)


def test_select_takes_whole_pages_in_the_given_order() -> None:
    pages = PageSegments([10, 11, 20, 21, 30, 31], [1, 2, 3, 4, 5, 6], 2, owner="whoever")
    chosen = pages.select([2, 0])
    assert (chosen.addresses, chosen.sizes) == ([30, 31, 10, 11], [5, 6, 1, 2])
    assert chosen.owner == "whoever"
    assert chosen.page_bytes() == [11, 3]
    assert pages.select([0, 1, 2]) is pages
    assert pages.select([0, 2, 1]).addresses == [10, 11, 30, 31, 20, 21]
    assert len(pages.select([])) == 0


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """Threads give the GIL away only where they wait, or release it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("no_forced_switches")
@pytest.mark.parametrize("call", ["gather", "scatter", "checksums"])
def test_other_threads_run_while_pages_move(call: str) -> None:
    record = bytearray(32 << 20)
    memory = PageSegments.of_buffers([bytearray(len(record))], writable=True).select([0] * 40)
    keys, records = [b"k"] * 40, [record] * 40
    sums = checksums(keys, records)
    waiting, go = Event(), Event()
    ran: list[str] = []

    def run() -> None:
        waiting.set()
        go.wait()
        ran.append("while the call ran")

    other = Thread(target=run)
    other.start()
    waiting.wait()
    go.set()
    match call:
        case "gather":
            gather(keys, memory, records)
        case "scatter":
            scatter(keys, records, sums, memory)
        case "checksums":
            checksums(keys, records)
    assert ran == ["while the call ran"]
    other.join()


def test_records_are_placed_in_their_pages() -> None:
    record, into = bytes(range(10)), [bytearray(4), bytearray(6)]
    addresses = [_native.address_of(part, True) for part in into]
    place([record], PageSegments(addresses, [4, 6], 2, into))
    assert b"".join(into) == record
    with pytest.raises(ValueError, match="length"):
        place([record[:-1]], PageSegments(addresses, [4, 6], 2, into))
    with pytest.raises(ValueError, match="equally many"):
        place([], PageSegments(addresses, [4, 6], 2, into))
