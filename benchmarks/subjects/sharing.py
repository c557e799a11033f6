"""What a subject of `benchmarks.sharing` is: two processes, of which one gets what the other has.

The *getter* is a `Subject` in a worker like every other. The *holder* is a server process that its `serve` starts
(benchmarks/sharing_holder.py), of the same environment. The harness's pages reach the holder through a file in memory,
once; from then on the holder has them in memory of its own, and `get` is all that is timed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import ClassVar

import numpy as np

from benchmarks.subjects.base import Batch, Options, Rows, Service, Subject, SubjectError
from benchmarks.wire import receive, send

READY_SECONDS = 60
CONTROL = "control"  # of an address: the socket by which the holder is told what to hold


class Holder(ABC):
    """The process that has the pages."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def address(self) -> dict[str, str]:
        """What a getter needs to reach it."""

    @abstractmethod
    def hold(self, keys: Sequence[bytes], rows: Rows) -> None:
        """Have these pages from now on, in memory; `rows` is gone when this returns.

        Raises:
            SubjectError: not each page was taken.
        """

    def close(self) -> None:  # noqa: B027 - most end with their process
        """Serve no more."""


class Getter(Subject):
    """The process that wants them. `prepare` and `get` are a subclass's own."""

    holder: ClassVar[type[Holder]]
    durable: ClassVar[str] = "in memory of another process"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(READY_SECONDS)
        self._control.connect(options.service[CONTROL])
        self._words = self._control.makefile("rw")
        self._speaking = threading.Lock()  # one request at a time, where several threads put

    @classmethod
    def serve(cls, options: Options) -> Service:
        return start(cls.holder, options)

    def put(self, batch: Batch) -> None:
        """Bring the pages to the holder."""
        path = self.options.directory / batch.keys[0].hex()
        batch.source.tofile(path)
        with self._speaking:
            send(self._words, {"pages": str(path), "keys": [key.hex() for key in batch.keys]})
            answer = receive(self._words)
        path.unlink()
        if answer is None:
            raise SubjectError("the holder ended")
        if "error" in answer:
            raise SubjectError(f"the holder: {answer['error']}")

    def exists(self, batch: Batch) -> int:
        raise SubjectError("lookups are not measured between processes")

    def forget(self, batches: Sequence[Batch]) -> None:
        """The holder's pages end with it."""

    def close(self) -> None:
        self._words.close()
        self._control.close()


def start(holder: type[Holder], options: Options) -> Service:
    """A process with a holder, when it can be reached.

    Raises:
        SubjectError: it ended, or was not ready in time.
    """
    reading, writing = os.pipe()
    given = {**asdict(options), "directory": str(options.directory)}
    module = [sys.executable, "-m", "benchmarks.sharing_holder"]
    process = subprocess.Popen(
        [*module, holder.__module__, holder.__name__, json.dumps(given), str(writing)],
        pass_fds=(writing,),
        stdin=subprocess.DEVNULL,
    )
    os.close(writing)
    service = Service({}, [process])
    with os.fdopen(reading) as answers:
        answer = receive(answers)
    if answer is None or "error" in answer:
        service.stop()
        raise SubjectError(f"the holder: {answer['error'] if answer else 'it ended'}")
    service.address.update(answer)
    return service


def held_rows(path: str, pages: int) -> Rows:
    """The pages in a file, one a row, in memory of this process."""
    rows: Rows = np.fromfile(path, dtype=np.uint8).reshape(pages, -1)
    return rows
