"""A store that fits into a megabyte or two: opened, saved, put back and looked into, many times a second."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from ..storage.base import NAMESPACE_BYTES, Lookup, Stored
from ..storage.slab import opening, probe
from ..storage.slab.opening import Place
from ..storage.slab.settings import SlabSettings
from ..storage.slab.tier import SlabTier
from .tier_suite import OTHER_NAMESPACE, EngineMemory, a_key, bytes_of, read_pages

SIZES = [100, 4096, 4097, 9000, 20_000, 65_536, 1500, 30_000]  # of one block, of several, of a slab
OWN_NAMESPACE = b"\0" * NAMESPACE_BYTES


def key_of(number: int) -> bytes:
    """Numbers with a remainder of 3 by 4 are of another namespace."""
    return a_key(number, OTHER_NAMESPACE if number % 4 == 3 else OWN_NAMESPACE)


def page_of(number: int) -> tuple[bytes, bytes]:
    """The key and the bytes of a page."""
    key = key_of(number)
    return key, bytes_of(key, SIZES[number % len(SIZES)])


def put(
    tier: SlabTier, numbers: Sequence[int], parents: Sequence[bytes] | None = None
) -> list[Stored]:
    pages = [page_of(number) for number in numbers]
    memory = EngineMemory([content for _, content in pages])
    return tier.put([key for key, _ in pages], memory.segments, None, parents)


def get(tier: SlabTier, numbers: Sequence[int]) -> list[Lookup]:
    """Checked: a hit is the page of that number."""
    return read_pages(tier, [page_of(number) for number in numbers])


def here(tier: SlabTier, numbers: Iterable[int]) -> set[int]:
    listed = list(numbers)
    found = tier.exists([key_of(number) for number in listed])
    return {number for number, is_here in zip(listed, found, strict=True) if is_here}


@dataclass(frozen=True, slots=True)
class SmallStore:
    """Where a store lies and how it is opened; in any process."""

    directory: Path
    memory: bool
    capacity: int
    settings: SlabSettings = field(default_factory=SlabSettings)

    def open(self) -> SlabTier:
        return SlabTier(Place(self.directory, self.memory), self.capacity, self.settings)

    @contextmanager
    def opened(self) -> Iterator[SlabTier]:
        tier = self.open()
        try:
            yield tier
        finally:
            tier.close()

    def elsewhere(self, directory: Path) -> Self:
        return replace(self, directory=directory)

    def save(self) -> dict[str, bytes]:
        """All its files; while nobody has it open."""
        return {file.name: file.read_bytes() for file in self.directory.iterdir()}

    def restore(self, saved: dict[str, bytes]) -> None:
        self.directory.mkdir(exist_ok=True)
        for file in self.directory.iterdir():
            if file.name not in saved:
                file.unlink()
        for name, content in saved.items():
            write_file(self.directory / name, content)

    def allocated(self) -> int:
        """Bytes of the medium that its files take; also while another process renames or removes some."""
        taken = 0
        for file in list(self.directory.iterdir()):
            with suppress(FileNotFoundError):
                taken += file.stat().st_blocks * 512
        return taken


def write_file(path: Path, content: bytes) -> None:
    """As `Path.write_bytes`, but the space that the file has is used again: that is much faster."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(file, content, 0)
        os.ftruncate(file, len(content))
    finally:
        os.close(file)


def probe_in_a_fork() -> None:
    """From here on this process, which must have no threads when it opens a store, looks at an index from
    a fork of itself: the same look without the start of an interpreter."""
    opening._probe = _probe_in_fork


def _probe_in_fork(
    task: str, index: Path, argument: str, keep: Sequence[int] = ()
) -> dict[str, str]:
    assert task == "look", "no test of these makes a store smaller"
    answer, give = os.pipe()
    child = os.fork()
    if not child:
        verdict = "ours"
        try:
            verdict = probe.inspect(str(index), opening.EXPECTED)["state"]
        except BaseException:  # noqa: BLE001 - as a script that ends with a traceback
            verdict = "damaged"
        os.write(give, verdict.encode())
        os._exit(0)
    os.close(give)
    state = os.read(answer, 100).decode()
    os.close(answer)
    os.waitpid(child, 0)
    return probe.verdict(state or "damaged")
