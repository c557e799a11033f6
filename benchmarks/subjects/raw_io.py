"""Direct I/O on one preallocated file: the limit of every tier on disk, as fio would measure it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.subjects.base import Batch, Options, Subject, arena
from benchmarks.subjects.native import Raw


class RawIo(Subject):
    setup: ClassVar[str] = (
        "O_DIRECT by io_uring (as fio's ioengine=io_uring with that iodepth), requests of a page but 1 "
        "MiB at most, on a file whose blocks were all written before; no index, no checksum"
    )
    durable: ClassVar[str] = "one fdatasync after the last page"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._raw = Raw()
        self._depth = options.threads
        self._path = options.directory / f"raw-{options.rank}"
        self._slots: dict[bytes, range] = {}
        self._used = 0
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        self._write_all_blocks()

    def _write_all_blocks(self) -> None:
        """Before it is measured: a block written for the first time costs its file system more."""
        pages, page_bytes = self.options.pages, self.options.page_bytes
        os.posix_fallocate(self._file, 0, pages * page_bytes)
        self._raw.move(self._file, arena(pages, page_bytes), range(pages), self._depth, write=True)
        os.fsync(self._file)

    def version(self) -> str:
        return f"Linux {platform.release()}"

    def prepare(self, batch: Batch) -> None:
        self._slots[batch.keys[0]] = range(self._used, self._used + len(batch))
        self._used += len(batch)

    def put(self, batch: Batch) -> None:
        self._raw.move(
            self._file, batch.source, self._slots[batch.keys[0]], self._depth, write=True
        )

    def sync(self, batches: Sequence[Batch]) -> None:
        os.fdatasync(self._file)

    def get(self, batch: Batch) -> None:
        self._raw.move(
            self._file, batch.target, self._slots[batch.keys[0]], self._depth, write=False
        )

    def exists(self, batch: Batch) -> int:
        return len(batch) if batch.keys[0] in self._slots else 0

    def forget(self, batches: Sequence[Batch]) -> None:
        self._slots.clear()
        self._used = 0

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink()
