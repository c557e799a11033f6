"""memcpy: the limit of every tier in memory. No index, no checksum, no allocation."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.subjects.base import Batch, Options, Rows, Subject, arena
from benchmarks.subjects.native import Raw


class Memcpy(Subject):
    setup: ClassVar[str] = "glibc's memcpy page by page into touched memory; no index, no checksum"
    durable: ClassVar[str] = "in memory"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._raw = Raw()
        self._store = arena(options.pages, options.page_bytes)
        self._used = 0
        self._slots: dict[bytes, int] = {}  # of the first key of each batch

    def version(self) -> str:
        return " ".join(platform.libc_ver())

    def prepare(self, batch: Batch) -> None:
        self._slots[batch.keys[0]] = self._used
        self._used += len(batch)

    def put(self, batch: Batch) -> None:
        self._raw.copy(self._rows(batch), batch.source, self.options.threads)

    def get(self, batch: Batch) -> None:
        self._raw.copy(batch.target, self._rows(batch), self.options.threads)

    def exists(self, batch: Batch) -> int:
        return len(batch) if batch.keys[0] in self._slots else 0

    def forget(self, batches: Sequence[Batch]) -> None:
        self._slots.clear()
        self._used = 0

    def close(self) -> None:
        self._slots.clear()

    def _rows(self, batch: Batch) -> Rows:
        first = self._slots[batch.keys[0]]
        return self._store[first : first + len(batch)]
