"""What a subject is: a store, or a limit of the machine, that the harness drives.

A subject lives in a worker process of its own (benchmarks/worker.py), under the Python of its own
environment, so this file needs nothing but numpy. Only `put`, `sync`, `exists` and `get` are timed. What
an engine hands to a store (key strings, tensors, lists of addresses) is made in `prepare`, which is not.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.uint8]
FLUSHERS = 8  # threads that sync a peer's files: as many as raw direct I/O has requests in flight


class SubjectError(Exception):
    """The subject did not do what it was asked: a page refused, missed, or not to be opened."""


@dataclass(frozen=True)
class Options:
    """How a worker opens its subject."""

    directory: Path  # its own, on the file system to be measured
    page_bytes: int
    pages: int  # the most that are put at one time, by this worker
    workers: int  # that share the directory
    rank: int  # of this worker among them
    threads: int  # of the caller
    service: dict[str, str]  # what `serve` of the first worker returned


@dataclass(frozen=True)
class Service:
    """Server processes of a subject."""

    address: dict[str, str]  # what a worker needs to reach them
    processes: list[subprocess.Popen[bytes]]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Batch:
    """Pages to put, with the place where `get` is to bring them."""

    keys: list[bytes]  # 32 bytes each, as SGLang's page hashes are
    source: Rows  # one page a row
    target: Rows

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, begin: int, end: int) -> Batch:
        return Batch(self.keys[begin:end], self.source[begin:end], self.target[begin:end])


def arena(pages: int, page_bytes: int) -> Rows:
    """Memory as SGLang's host pool has it by default: anonymous, shared, touched."""
    memory = mmap.mmap(-1, pages * page_bytes)
    rows = np.frombuffer(memory, dtype=np.uint8).reshape(pages, page_bytes)
    rows.fill(0)
    return rows


def addresses(rows: Rows) -> list[int]:
    """Where each row begins."""
    first, step = rows.ctypes.data, rows.strides[0]
    return [first + i * step for i in range(len(rows))]


class Subject(ABC):
    """One store under measurement. `options` and `setup` are what the report says about it."""

    setup: ClassVar[str]  # how it is tuned, in a sentence
    durable: ClassVar[str]  # who makes its writes durable

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    def serve(cls, options: Options) -> Service:
        """Start what its workers share. Called in the first of them, before any is made."""
        return Service({}, [])

    @abstractmethod
    def version(self) -> str: ...

    def prepare(self, batch: Batch) -> None:  # noqa: B027 - most have nothing to prepare
        """Make what the engine would hand over with this batch."""

    @abstractmethod
    def put(self, batch: Batch) -> None:
        """Raises SubjectError unless each page was taken."""

    def sync(self, batches: Sequence[Batch]) -> None:  # noqa: B027 - a store may sync in `put`
        """Make what was put durable, if `put` did not."""

    @abstractmethod
    def exists(self, batch: Batch) -> int:
        """How many pages of the batch are here, counted from its first one."""

    @abstractmethod
    def get(self, batch: Batch) -> None:
        """Bring each page to its row of `target`; raises SubjectError unless all came."""

    def blank(self, batch: Batch) -> None:
        """Before a `get`, not timed: what is to come back must not be there already."""
        batch.target.fill(0)

    def deliver(self, batch: Batch) -> None:  # noqa: B027 - most do in `get`
        """After a `get`, not timed: bring the pages to `target`."""

    def drop_cache(self) -> None:  # noqa: B027 - memory has none
        """Make the next `get` a cold one."""

    def data_files(self) -> list[Path]:
        """Those with pages in them, of which nothing may be in the page cache before a cold `get`."""
        return [path for path in self.options.directory.rglob("*") if path.is_file()]

    @abstractmethod
    def forget(self, batches: Sequence[Batch]) -> None:
        """Remove the pages, so that rounds do not pile up."""

    @abstractmethod
    def close(self) -> None: ...


class InThreads(Subject):
    """A subject called from several threads at once, each with its part of a batch."""

    def __init__(self, inner: Subject, threads: int) -> None:
        super().__init__(inner.options)
        self.inner = inner
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._parts: dict[bytes, list[Batch]] = {}

    def version(self) -> str:
        return self.inner.version()

    def prepare(self, batch: Batch) -> None:
        cuts = [len(batch) * i // self._threads for i in range(self._threads + 1)]
        parts = [batch.part(cuts[i], cuts[i + 1]) for i in range(self._threads)]
        self._parts[batch.keys[0]] = parts
        for part in parts:
            self.inner.prepare(part)

    def put(self, batch: Batch) -> None:
        list(self._pool.map(self.inner.put, self._parts[batch.keys[0]]))

    def get(self, batch: Batch) -> None:
        list(self._pool.map(self.inner.get, self._parts[batch.keys[0]]))

    def exists(self, batch: Batch) -> int:
        return sum(self.inner.exists(part) for part in self._parts[batch.keys[0]])

    def sync(self, batches: Sequence[Batch]) -> None:
        self.inner.sync(self._flat(batches))

    def blank(self, batch: Batch) -> None:
        for part in self._parts[batch.keys[0]]:
            self.inner.blank(part)

    def deliver(self, batch: Batch) -> None:
        for part in self._parts[batch.keys[0]]:
            self.inner.deliver(part)

    def drop_cache(self) -> None:
        self.inner.drop_cache()

    def data_files(self) -> list[Path]:
        return self.inner.data_files()

    def forget(self, batches: Sequence[Batch]) -> None:
        self.inner.forget(self._flat(batches))
        for batch in batches:
            self._parts.pop(batch.keys[0], None)

    def close(self) -> None:
        self._pool.shutdown()
        self.inner.close()

    def _flat(self, batches: Sequence[Batch]) -> list[Batch]:
        return [part for batch in batches for part in self._parts[batch.keys[0]]]


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_files(paths: Iterable[Path], directories: Iterable[Path]) -> None:
    """fsync files and then the directories that name them, several at a time."""
    with ThreadPoolExecutor(FLUSHERS) as pool:
        list(pool.map(_sync_file, paths))
    for directory in directories:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def drop_files(paths: Iterable[Path]) -> None:
    """Take files out of the page cache. Needs no root; leaves out pages that are mapped or dirty."""
    with ThreadPoolExecutor(FLUSHERS) as pool:
        list(pool.map(_drop_file, paths))


def _drop_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently")
    )


def cached_bytes(paths: Iterable[Path]) -> int | None:
    """Bytes of files in the page cache; None where the kernel is older than 6.5."""
    libc = ctypes.CDLL(None, use_errno=True)
    cachestat = 451  # the same number on every architecture
    whole, total = _Range(0, 0), 0
    for path in paths:
        stat = _CacheStat()
        with path.open("rb") as file:
            if libc.syscall(cachestat, file.fileno(), ctypes.byref(whole), ctypes.byref(stat), 0):
                return None
        total += int(stat.cache) * mmap.PAGESIZE
    return total
