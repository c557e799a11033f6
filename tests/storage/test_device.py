"""The slot file: every shape of page goes out and comes back whole, and trouble stays with its page."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from lmcache_sglang.storage import _native

BLOCK = 4096
KIB, MIB = 1 << 10, 1 << 20
GUARD = 0xA5
SOON = 5.0  # far longer than what is in flight takes, far shorter than a hang


class Memory:
    """An engine's memory: pages are taken from it anywhere, and what lies between them is guarded."""

    def __init__(self, size: int) -> None:
        self._bytes = mmap.mmap(-1, size)
        self._bytes.write(bytes([GUARD]) * size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
        self._end = 0
        self._taken: list[tuple[int, int]] = []

    def take(self, size: int, misaligned: int) -> Segment:
        begin = -(-self._end // BLOCK) * BLOCK + BLOCK + misaligned
        self._end = begin + size
        assert self._end + BLOCK <= len(self._bytes)
        self._taken.append((begin, size))
        return Segment(self, begin, size)

    def address(self, begin: int) -> int:
        return self._address + begin

    def read(self, begin: int, size: int) -> bytes:
        return self._bytes[begin : begin + size]

    def write(self, begin: int, content: bytes) -> None:
        self._bytes[begin : begin + len(content)] = content

    def guarded(self) -> bool:
        end = 0
        for begin, size in self._taken:
            if self._bytes[end:begin].count(GUARD) != begin - end:
                return False
            end = begin + size
        return self._bytes[end:].count(GUARD) == len(self._bytes) - end


@dataclass(frozen=True)
class Segment:
    memory: Memory
    begin: int
    size: int

    @property
    def address(self) -> int:
        return self.memory.address(self.begin)


@dataclass(frozen=True)
class Page:
    offset: int
    segments: Sequence[Segment]
    seed: int

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def asked(self) -> tuple[int, list[int], list[int], int]:
        addresses = [segment.address for segment in self.segments]
        return self.offset, addresses, [segment.size for segment in self.segments], self.seed

    @property
    def content(self) -> bytes:
        return b"".join(s.memory.read(s.begin, s.size) for s in self.segments)

    def fill(self, content: bytes) -> None:
        for segment in self.segments:
            segment.memory.write(segment.begin, content[: segment.size])
            content = content[segment.size :]


Layout = Callable[[int], list[tuple[int, int]]]  # bytes of a page -> (misalignment, size) a segment


def one(misaligned: int) -> Layout:
    return lambda size: [(misaligned, size)]


def halves(size: int) -> list[tuple[int, int]]:
    half = size // 2 // BLOCK * BLOCK
    return [(0, half), (0, size - half)] if half else [(0, size)]


def odd(size: int) -> list[tuple[int, int]]:
    parts = [(0, 7), (3, 4099), (1, 70_001), (512, 0)]
    while size < sum(part for _, part in parts):
        parts.pop(0)
    return [*parts, (5, size - sum(part for _, part in parts))]


def sectors(size: int) -> list[tuple[int, int]]:
    """More segments than one call of the kernel takes, where the page is large."""
    pieces = [(0, 512)] * min(size // 512, 1500)
    left = size - 512 * len(pieces)
    return [*pieces, (0, left)] if left else pieces


LAYOUTS = {
    "aligned": one(0),
    "by 512": one(512),
    "by 1": one(1),
    "halves": halves,
    "odd": odd,
    "sectors": sectors,
}
SIZES = (1, 511, 512, 513, 4095, 4096, 4097, 12_288, 65_537, MIB + 3, 2 * MIB, 2 * MIB + 1, 9 * MIB)


def memory_for(sizes: Sequence[int], layout: Layout) -> Memory:
    need = sum(size + 3 * BLOCK for page in sizes for _, size in layout(page))
    return Memory(need + 4 * BLOCK)


def pages_at(offsets: Sequence[int], sizes: Sequence[int], layout: Layout) -> list[Page]:
    memory = memory_for(sizes, layout)
    return [
        Page(offset, [memory.take(part, shift) for shift, part in layout(size)], seed=1000 + i)
        for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
    ]


def filled(pages: Sequence[Page], seed: int = 7) -> list[bytes]:
    source = random.Random(seed)
    contents = [source.randbytes(page.size) for page in pages]
    for page, content in zip(pages, contents, strict=True):
        page.fill(content)
    return contents


def side_by_side(sizes: Sequence[int], gap: int = 0) -> list[int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // BLOCK) * BLOCK + gap
    return offsets


def asked(pages: Sequence[Page]) -> list[tuple[int, list[int], list[int], int]]:
    return [page.asked for page in pages]


def sums(pages: Sequence[Page], contents: Sequence[bytes]) -> list[tuple[int, int]]:
    return [
        (0, xxhash.xxh3_64_intdigest(content, page.seed))
        for page, content in zip(pages, contents, strict=True)
    ]


def guarded(pages: Sequence[Page]) -> bool:
    return all(segment.memory.guarded() for page in pages for segment in page.segments[:1])


@dataclass(frozen=True)
class Place:
    """Where slot files are made, and how they are opened."""

    folder: Path
    engine: str
    direct: bool
    path: str = "straight"

    def file(self, size: int) -> Path:
        path = self.folder / "slots"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        return path

    def open(self, path: Path, depth: int = 8) -> _native.Device:
        try:
            device = _native.Device(str(path), depth, self.engine, self.direct, self.path)
        except OSError as error:
            if self.engine == "io_uring" and error.errno in (errno.ENOSYS, errno.EPERM):
                pytest.skip("no io_uring here")
            raise
        assert device.engine == self.engine
        return device

    def device(self, size: int, depth: int = 8) -> _native.Device:
        return self.open(self.file(size), depth)


@pytest.fixture(params=["threads", "io_uring"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path, engine: str) -> Place:
    return Place(tmp_path, engine, direct=True)


@pytest.fixture(params=["straight", "through buffers", "buffered"])
def either(request: pytest.FixtureRequest, tmp_path: Path, engine: str) -> Place:
    path = "buffers" if request.param == "through buffers" else "straight"
    return Place(tmp_path, engine, direct=request.param != "buffered", path=path)


class Hook:
    """Counts the steps, and answers as it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()
        self.answer: Callable[[int, str, int, int], int] = lambda n, name, offset, size: 0

    def __call__(self, name: str, offset: int, size: int) -> int:
        with self._lock:
            self.steps.append((name, offset, size))
            n = len(self.steps)
        return self.answer(n, name, offset, size)


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    _native.set_step_hook(hook)
    yield hook
    _native.set_step_hook(None)


# Whole pages of every shape


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pages_of_every_size_and_layout_come_back(either: Place, layout: Layout) -> None:
    offsets = side_by_side(SIZES)
    device = either.device(offsets[-1] + 9 * MIB)
    out, back = pages_at(offsets, SIZES, layout), pages_at(offsets, SIZES, layout)
    contents = filled(out)
    assert device.write(asked(out)) == sums(out, contents)
    assert device.flush() == 0
    assert device.read(asked(back)) == sums(back, contents)
    assert [page.content for page in back] == contents
    assert guarded(out) and guarded(back)


def test_a_page_may_come_back_in_other_segments(either: Place) -> None:
    sizes = (70_001 + 4099 + 8, 3 * MIB + 1)
    offsets = side_by_side(sizes)
    device = either.device(4 * MIB)
    out = pages_at(offsets, sizes, one(0))
    contents = filled(out)
    device.write(asked(out))
    for layout in LAYOUTS.values():
        back = pages_at(offsets, sizes, layout)
        assert device.read(asked(back)) == sums(back, contents)
        assert [page.content for page in back] == contents
        assert guarded(back)


def test_what_lies_behind_a_page_in_its_slot_is_zeroed(either: Place) -> None:
    path = either.file(3 * BLOCK)
    path.write_bytes(b"\xff" * 3 * BLOCK)
    pages = pages_at([BLOCK], [700], one(0))
    (content,) = filled(pages)
    either.open(path).write(asked(pages))
    assert path.read_bytes() == b"\xff" * BLOCK + content.ljust(BLOCK, b"\0") + b"\xff" * BLOCK


def test_a_page_without_bytes_has_its_checksum(place: Place) -> None:
    empty = [Page(0, [], seed=5).asked]
    device = place.device(BLOCK)
    assert device.write(empty) == device.read(empty) == [(0, xxhash.xxh3_64_intdigest(b"", 5))]
    assert device.read([]) == []


# Joining and splitting


def test_neighbours_move_together_and_gaps_part_them(place: Place, hook: Hook) -> None:
    sizes = [16 * KIB] * 4 + [10_000] * 4
    offsets = side_by_side(sizes)
    offsets = offsets[:2] + [offset + BLOCK for offset in offsets[2:]]
    device = place.device(MIB)
    out, back = pages_at(offsets, sizes, one(0)), pages_at(offsets, sizes, halves)
    contents = filled(out)
    hook.steps.clear()
    assert device.write(asked(out)) == sums(out, contents)
    assert sorted(hook.steps) == [
        ("write", 0, 32 * KIB),
        ("write", 32 * KIB + BLOCK, 32 * KIB + 4 * 12 * KIB),
    ]
    assert device.read(asked(back)) == sums(back, contents)


def test_a_large_page_is_split_and_no_request_is_too_long(place: Place, hook: Hook) -> None:
    sizes = [9 * MIB + 5, 700 * KIB, 9 * MIB]
    offsets = side_by_side(sizes)
    device = place.device(20 * MIB)
    pages = pages_at(offsets, sizes, one(0))
    contents = filled(pages)
    hook.steps.clear()
    assert device.write(asked(pages)) == sums(pages, contents)
    assert sum(size for _, _, size in hook.steps) == sum(-(-s // BLOCK) * BLOCK for s in sizes)
    assert max(size for _, _, size in hook.steps) <= 2 * MIB
    assert len(hook.steps) > 9


def test_pieces_that_come_in_backwards_are_hashed_in_order(place: Place, hook: Hook) -> None:
    pages = pages_at([0], [6 * MIB], odd)
    device = place.device(6 * MIB)
    contents = filled(pages)
    device.write(asked(pages))

    def first_pieces_last(n: int, name: str, offset: int, size: int) -> int:
        time.sleep(0.02 * (6 * MIB - offset) / MIB)
        return 0

    hook.answer = first_pieces_last
    back = pages_at([0], [6 * MIB], odd)
    assert device.read(asked(back)) == sums(back, contents)
    assert back[0].content == contents[0]


# Files that are not as they should be


def test_a_file_system_in_memory_is_read_and_written_buffered(engine: str) -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no shared memory here")
    path = folder / f"lmcache-test-device-{os.getpid()}"
    try:
        path.write_bytes(bytes(9 * MIB))
        device = Place(folder, engine, direct=True).open(path)
        assert not device.direct and "tmpfs" in device.why_not_direct
        pages = pages_at([0], [9 * MIB - 3], odd)
        contents = filled(pages)
        assert device.write(asked(pages)) == sums(pages, contents)
        assert device.flush() == 0
        assert device.read(asked(pages)) == sums(pages, contents)
    finally:
        path.unlink(missing_ok=True)


def test_direct_io_may_be_declined(tmp_path: Path) -> None:
    device = Place(tmp_path, "threads", direct=False).device(BLOCK)
    assert not device.direct and device.why_not_direct == "not asked for"


def test_a_small_file_is_served_by_threads(tmp_path: Path) -> None:
    path = Place(tmp_path, "auto", direct=True).file(MIB)
    assert _native.Device(str(path)).engine == "threads"


def test_a_file_that_was_never_written_gives_nothing_to_measure_by(tmp_path: Path) -> None:
    """Its space is read without the device, and would say how fast that is."""
    path = Place(tmp_path, "auto", direct=True).file(80 * MIB)
    assert _native.Device(str(path)).engine == "threads"


def test_either_engine_may_win_on_a_large_file(tmp_path: Path) -> None:
    path = Place(tmp_path, "auto", direct=True).file(80 * MIB)
    path.write_bytes(bytes(80 * MIB))
    begin = time.monotonic()
    device = _native.Device(str(path))
    assert time.monotonic() - begin < SOON
    assert device.engine in ("threads", "io_uring")
    assert device.bytes == 80 * MIB
    back = pages_at([79 * MIB], [MIB], one(0))
    assert device.read(asked(back)) == sums(back, [bytes(MIB)])


def test_the_path_is_measured_on_what_was_written(tmp_path: Path) -> None:
    device = Place(tmp_path, "threads", direct=True, path="auto").device(80 * MIB)
    memory = Memory(81 * MIB)
    page = Page(0, [memory.take(80 * MIB, 0)], seed=1)
    page.fill(random.Random(3).randbytes(80 * MIB))
    assert not device.through_buffers
    whole = device.write([page.asked])
    for _ in range(3):
        assert device.read([page.asked]) == whole
    assert device.through_buffers in (False, True)
    assert _native.Device(str(tmp_path / "slots"), path="buffers").through_buffers
    assert not _native.Device(str(tmp_path / "slots"), path="straight").through_buffers


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _native.Device(str(tmp_path / "none"))


@pytest.mark.parametrize("left", [0, 3 * 16 * KIB, 3 * 16 * KIB + 700, 3 * 16 * KIB + 8 * KIB])
def test_pages_behind_the_end_of_a_shortened_file_fail_alone(either: Place, left: int) -> None:
    sizes = [16 * KIB] * 6
    offsets = side_by_side(sizes)
    path = either.file(MIB)
    device = either.open(path)
    out, back = pages_at(offsets, sizes, one(0)), pages_at(offsets, sizes, one(0))
    contents = filled(out)
    device.write(asked(out))
    os.truncate(path, left)
    whole = left // (16 * KIB)
    expected = sums(back, contents)[:whole] + [(errno.EIO, 0)] * (6 - whole)
    assert device.read(asked(back)) == expected
    assert [page.content for page in back[:whole]] == contents[:whole]
    assert guarded(back)


def test_a_page_whose_padding_the_file_lacks_is_whole(either: Place) -> None:
    path = either.file(2 * BLOCK)
    device = either.open(path)
    pages = pages_at([0], [BLOCK + 600], one(0))
    contents = filled(pages)
    device.write(asked(pages))
    os.truncate(path, BLOCK + 600)
    assert device.read(asked(pages)) == sums(pages, contents)


def test_a_large_page_cut_off_by_the_end_of_the_file_fails(either: Place) -> None:
    path = either.file(9 * MIB)
    device = either.open(path)
    os.truncate(path, 5 * MIB + 1)
    pages = pages_at([0], [9 * MIB], one(0))
    assert device.read(asked(pages)) == [(errno.EIO, 0)]
    assert guarded(pages)


# Injected trouble


def failing_at(nth: int, error: int) -> Callable[[int, str, int, int], int]:
    return lambda n, name, offset, size: error * (n == nth)


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_the_nth_step_fails_its_page_and_no_other(
    place: Place, hook: Hook, kind: str, error: int
) -> None:
    sizes = [16 * KIB] * 8
    offsets = side_by_side(sizes, gap=BLOCK)
    device = place.device(MIB)
    pages = pages_at(offsets, sizes, one(0))
    contents = filled(pages)
    device.write(asked(pages))
    for nth in (1, 4, 8):
        hook.steps.clear()
        hook.answer = failing_at(nth, error)
        outcomes = getattr(device, kind)(asked(pages))
        bad = offsets.index(hook.steps[nth - 1][1])
        expected = sums(pages, contents)
        expected[bad] = (error, 0)
        assert outcomes == expected


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_bad_page_does_not_fail_its_neighbours(place: Place, hook: Hook, kind: str) -> None:
    sizes = [16 * KIB, 10_000, 16 * KIB, 9_999]
    offsets = side_by_side(sizes)
    device = place.device(MIB)
    pages = pages_at(offsets, sizes, one(0))
    contents = filled(pages)
    device.write(asked(pages))
    bad = offsets[1]
    hook.answer = lambda n, name, offset, size: errno.EIO * (offset <= bad < offset + size)
    expected = sums(pages, contents)
    expected[1] = (errno.EIO, 0)
    assert getattr(device, kind)(asked(pages)) == expected


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_failed_piece_fails_its_page(place: Place, hook: Hook, kind: str) -> None:
    sizes = [9 * MIB, 9 * MIB]
    offsets = side_by_side(sizes)
    device = place.device(18 * MIB)
    pages = pages_at(offsets, sizes, odd)
    contents = filled(pages)
    device.write(asked(pages))
    hook.answer = lambda n, name, offset, size: errno.EIO * (offset <= 5 * MIB < offset + size)
    assert getattr(device, kind)(asked(pages)) == [(errno.EIO, 0), sums(pages, contents)[1]]
    assert guarded(pages)


def test_a_flush_may_fail(place: Place, hook: Hook) -> None:
    device = place.device(BLOCK)
    hook.answer = lambda n, name, offset, size: errno.EIO
    assert device.flush() == errno.EIO
    assert hook.steps == [("flush", 0, 0)]


def test_an_exception_in_the_hook_is_told_and_fails_the_step(
    place: Place, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: told.append(about.exc_type))

    def broken(n: int, name: str, offset: int, size: int) -> int:
        raise RuntimeError("broken")

    hook.answer = broken
    device = place.device(BLOCK)
    assert device.read(asked(pages_at([0], [BLOCK], one(0)))) == [(errno.EIO, 0)]
    _native.set_step_hook(lambda *about: "no number")  # type: ignore[arg-type]
    assert device.flush() == errno.EIO
    assert told == [RuntimeError, TypeError]


# Time


def slow(seconds: float) -> Callable[[int, str, int, int], int]:
    def answer(n: int, name: str, offset: int, size: int) -> int:
        time.sleep(seconds)
        return 0

    return answer


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_deadline_ends_a_call_on_a_slow_device(place: Place, hook: Hook, kind: str) -> None:
    sizes = [16 * KIB] * 200
    offsets = side_by_side(sizes, gap=BLOCK)
    device = place.device(8 * MIB)
    pages = pages_at(offsets, sizes, one(0))
    expected = sums(pages, filled(pages))
    device.write(asked(pages))
    hook.steps.clear()
    hook.answer = slow(0.05)
    begin = time.monotonic()
    outcomes = getattr(device, kind)(asked(pages), timeout=0.2)
    assert time.monotonic() - begin < 1.5
    done = {offset for _, offset, _ in hook.steps}
    assert 0 < len(done) < 200
    for page, outcome, whole in zip(pages, outcomes, expected, strict=True):
        assert outcome == (whole if page.offset in done else (errno.ECANCELED, 0))


def test_a_deadline_in_a_large_page_gives_it_up(place: Place, hook: Hook) -> None:
    device = place.device(64 * MIB)
    hook.answer = slow(0.1)
    pages = pages_at([0], [64 * MIB], one(0))
    assert device.read(asked(pages), timeout=0.15) == [(errno.ECANCELED, 0)]


def test_a_deadline_that_has_passed_begins_nothing(place: Place, hook: Hook) -> None:
    device = place.device(MIB)
    pages = pages_at([0, 64 * KIB], [16 * KIB] * 2, one(0))
    assert device.write(asked(pages), timeout=0) == [(errno.ECANCELED, 0)] * 2
    assert hook.steps == []


def test_a_call_can_be_cancelled(place: Place, hook: Hook) -> None:
    sizes = [16 * KIB] * 200
    device = place.device(8 * MIB)
    pages = pages_at(side_by_side(sizes, gap=BLOCK), sizes, one(0))
    cancel = _native.Cancel()
    hook.answer = slow(0.05)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(device.read, asked(pages), None, cancel)
        time.sleep(0.1)
        cancel.set()
        outcomes = call.result(SOON)
    assert outcomes.count((errno.ECANCELED, 0)) > 100
    assert outcomes.count((errno.ECANCELED, 0)) < 200


def test_a_call_behind_a_busy_one_keeps_its_deadline(place: Place, hook: Hook) -> None:
    device = place.device(8 * MIB, 2)
    sizes = [16 * KIB] * 40
    offsets = side_by_side(sizes, gap=BLOCK)
    busy, late = pages_at(offsets, sizes, one(0)), pages_at(offsets, sizes, one(0))
    hook.answer = slow(0.1)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(device.read, asked(busy))
        time.sleep(0.05)
        begin = time.monotonic()
        outcomes = device.read(asked(late), timeout=0.2)
        assert time.monotonic() - begin < 1.0
        assert (errno.ECANCELED, 0) in outcomes
        assert all(error == 0 for error, _ in call.result(SOON))


# Many at once


def test_a_short_call_does_not_wait_for_a_long_one(place: Place, hook: Hook) -> None:
    device = place.device(8 * MIB, 4)
    sizes = [16 * KIB] * 200
    pages = pages_at(side_by_side(sizes, gap=BLOCK), sizes, one(0))
    hook.answer = slow(0.02)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(device.read, asked(pages))
        time.sleep(0.05)
        assert device.read(asked(pages[:1]))[0][0] == 0
        assert not long.done()
        assert all(error == 0 for error, _ in long.result(SOON))


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_threads_share_a_device(either: Place, depth: int) -> None:
    sizes = [16 * KIB, 10_001, 700 * KIB, 3 * MIB + 1, 512]
    region = 4 * MIB
    device = either.device(4 * region, depth)

    def play(player: int) -> None:
        offsets = [player * region + offset for offset in side_by_side(sizes)]
        for turn, layout in enumerate(LAYOUTS.values()):
            out, back = pages_at(offsets, sizes, layout), pages_at(offsets, sizes, layout)
            contents = filled(out, seed=100 * player + turn)
            assert device.write(asked(out)) == sums(out, contents)
            assert device.read(asked(back)) == sums(back, contents)
            assert [page.content for page in back] == contents
            assert guarded(back)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(play, player) for player in range(4)]:
            done.result(60)


def test_bad_requests_are_refused_before_anything_moves(place: Place) -> None:
    device = place.device(BLOCK)
    with pytest.raises(ValueError, match="block"):
        device.read([(7, [], [], 0)])
    with pytest.raises(ValueError, match="one size"):
        device.read([(0, [1], [], 0)])
    with pytest.raises(ValueError, match="engine"):
        _native.Device("none", engine="magic")
    with pytest.raises(ValueError, match="path"):
        _native.Device("none", path="magic")
