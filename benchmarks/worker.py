"""The process that one subject lives in: `python -m benchmarks.worker MODULE CLASS IN OUT`.

IN and OUT are numbers of open pipes. Each request names a method of `Worker` and its arguments; the answer
is what it returned, or why it failed.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.subjects import cpu_seconds
from benchmarks.subjects.base import (
    Batch,
    InThreads,
    Options,
    Rows,
    Service,
    Subject,
    SubjectError,
    arena,
    cached_bytes,
)
from benchmarks.wire import Message, receive, send

SLEEP_UNTIL = 0.002  # seconds before a common start from which one does not sleep any more


class Worker:
    """The requests."""

    def __init__(self, kind: type[Subject]) -> None:
        self._kind = kind
        self._subject: Subject
        self._service = Service({}, [])
        self._source: Rows
        self._target: Rows
        self._batches: list[Batch] = []

    def serve(self, **options: object) -> Message:
        """Start the subject's server processes, if it has any."""
        self._service = self._kind.serve(_options(options))
        return self._service.address

    def open(self, split: bool, **options: object) -> Message:
        """Open the store. `split`: the caller's threads share out each batch."""
        wanted = _options(options)
        self._source = arena(wanted.pages, wanted.page_bytes)
        self._target = arena(wanted.pages, wanted.page_bytes)
        numbers = np.random.default_rng(wanted.rank + 1)
        for row in self._source:
            row[:] = np.frombuffer(numbers.bytes(wanted.page_bytes), dtype=np.uint8)
        start = time.monotonic()
        self._subject = self._kind(wanted)
        opened = time.monotonic() - start
        version = self._subject.version()
        if split:
            self._subject = InThreads(self._subject, wanted.threads)
        return {
            "seconds": opened,
            "version": version,
            "setup": self._kind.setup,
            "durable": self._kind.durable,
        }

    def begin(self, name: str, batch_pages: int) -> Message:
        """New keys and new bytes; the seconds that making the calls' arguments took."""
        stir = hashlib.sha256(name.encode()).digest()[:8]
        self._source.view(np.uint64)[:] ^= np.frombuffer(stir, dtype=np.uint64)
        pages = range(0, len(self._source), batch_pages)
        self._batches = [self._batch(name, first, batch_pages) for first in pages]
        gc.collect()
        start = time.monotonic()
        for batch in self._batches:
            self._subject.prepare(batch)
        return {"seconds": time.monotonic() - start, "batches": len(self._batches)}

    def _batch(self, name: str, first: int, pages: int) -> Batch:
        source = self._source[first : first + pages]
        keys = [hashlib.sha256(f"{name}/{first + i}".encode()).digest() for i in range(len(source))]
        return Batch(keys, source, self._target[first : first + pages])

    def put(self, at: float) -> Message:
        return self._timed(at, self._subject.put)

    def sync(self, at: float) -> Message:
        _wait_until(at)
        start = time.monotonic()
        self._subject.sync(self._batches)
        return {"start": start, "end": time.monotonic()}

    def exists(self, at: float, repeat: int) -> Message:
        """Look all pages up `repeat` times over; they must be here."""

        def look(batch: Batch) -> None:
            for _ in range(repeat):
                if self._subject.exists(batch) != len(batch):
                    raise SubjectError("exists denied a page that was put")

        return self._timed(at, look)

    def found_first(self) -> Message:
        """Seconds until the store has answered for its first pages."""
        start = time.monotonic()
        self._subject.exists(self._batches[0])
        return {"seconds": time.monotonic() - start}

    def found(self) -> Message:
        """How many pages are here, and how long it took to say so."""
        start = time.monotonic()
        found = sum(self._subject.exists(batch) for batch in self._batches)
        return {"found": found, "seconds": time.monotonic() - start}

    def blank(self) -> Message:
        for batch in self._batches:
            batch.target.fill(0)
            self._subject.blank(batch)
        return {}

    def drop(self) -> Message:
        """Empty the page cache of the store's files; what is left of them there, in bytes."""
        self._subject.drop_cache()
        return {"cached": cached_bytes(self._subject.data_files())}

    def get(self, at: float) -> Message:
        return self._timed(at, self._subject.get)

    def verify(self) -> Message:
        """Compare every byte that came back with what was put."""
        for batch in self._batches:
            self._subject.deliver(batch)
        if not np.array_equal(self._source, self._target):
            wrong = int((self._source != self._target).any(axis=1).sum())
            raise SubjectError(f"WRONG BYTES in {wrong} pages")
        return {}

    def forget(self) -> Message:
        self._subject.forget(self._batches)
        self._batches = []
        return {}

    def spent(self) -> Message:
        """Processor seconds so far: of this process, and of the subject's servers."""
        servers = sum(cpu_seconds.of_tree(each.pid) for each in self._service.processes)
        return {"worker": cpu_seconds.of_process(os.getpid()), "servers": servers}

    def grow(self, medium: str, directory: str, count: int) -> Message:
        from benchmarks import growth  # imports our store, which a peer's environment lacks

        return growth.measure(medium, Path(directory), count)

    def close(self) -> Message:
        self._subject.close()
        return {}

    def stop_service(self) -> None:
        self._service.stop()

    def _timed(self, at: float, call: Callable[[Batch], None]) -> Message:
        _wait_until(at)
        start = time.monotonic()
        for batch in self._batches:
            call(batch)
        return {"start": start, "end": time.monotonic()}


def _options(given: dict[str, object]) -> Options:
    directory = Path(str(given.pop("directory")))
    return Options(directory=directory, **given)  # type: ignore[arg-type]  # JSON has no types


def _wait_until(at: float) -> None:
    """Until a moment of time.monotonic, which is the same clock in every process."""
    time.sleep(max(0.0, at - time.monotonic() - SLEEP_UNTIL))
    while time.monotonic() < at:
        pass


def main() -> int:
    module, name, reading, writing = sys.argv[1:]
    requests, answers = os.fdopen(int(reading), "r"), os.fdopen(int(writing), "w")
    worker: Worker | None = None
    try:
        worker = Worker(getattr(importlib.import_module(module), name))
        send(answers, {"ready": True})
        while (request := receive(requests)) is not None:
            answer = getattr(worker, request.pop("call"))(**request)
            send(answers, {"answer": answer})
    except Exception as error:
        send(answers, {"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        if worker is not None:
            worker.stop_service()
    return 0


if __name__ == "__main__":
    sys.exit(main())
