"""A TCP socket and nothing else: the limit of everything that brings pages over TCP.

The getter sends the numbers of the pages that it wants; the holder sends their bytes, one page after the other, from
the memory that they lie in, and they are received in the memory where they are wanted. One connection.
"""

from __future__ import annotations

import platform
import socket
import struct
import threading
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import xxhash

from benchmarks.subjects.base import Batch, Options, Rows, SubjectError, arena
from benchmarks.subjects.sharing import Getter, Holder

BUFFER = (
    256 << 10
)  # bytes, of each socket; the fastest of 128 KiB to 4 MiB and the kernel's own choice
RECEIVED = 2 << 20  # bytes of one call at most, which returns when all of them are here
COUNT = struct.Struct("<I")


def _tune(connection: socket.socket) -> None:
    """Before it is connected, or listens: the window is agreed at the start."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)


def _receive(connection: socket.socket, into: memoryview) -> None:
    """Fill it."""
    while into:
        count = connection.recv_into(into, min(len(into), RECEIVED), socket.MSG_WAITALL)
        if not count:
            raise SubjectError("the holder hung up")
        into = into[count:]


class RawHolder(Holder):
    """Pages in one piece of memory, by number."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._rows = arena(options.pages, options.page_bytes)
        self._held = 0
        self._listening = socket.socket()
        _tune(self._listening)
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def address(self) -> dict[str, str]:
        return {"port": str(self._listening.getsockname()[1])}

    def hold(self, keys: Sequence[bytes], rows: Rows) -> None:
        self._rows[self._held : self._held + len(rows)] = rows
        self._held += len(rows)

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        connection = self._listening.accept()[0]
        pages = [row.data for row in self._rows]
        count = bytearray(COUNT.size)
        with connection:
            while connection.recv_into(count, len(count), socket.MSG_WAITALL):
                wanted = bytearray(COUNT.unpack(count)[0] * 4)
                _receive(connection, memoryview(wanted))
                for page in np.frombuffer(wanted, dtype=np.uint32):
                    connection.sendall(pages[page])


class RawTcp(Getter):
    setup: ClassVar[str] = (
        f"one connection, sendall and recv_into with MSG_WAITALL, TCP_NODELAY, socket buffers of {BUFFER >> 10} KiB; no index, "
        "no checksum"
    )
    holder: ClassVar[type[Holder]] = RawHolder

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._connection = socket.socket()
        _tune(self._connection)
        self._connection.connect(("127.0.0.1", int(options.service["port"])))
        self._numbers: dict[bytes, int] = {}
        self._requests: dict[bytes, bytes] = {}

    def version(self) -> str:
        return f"Python {platform.python_version()}, {platform.system()} {platform.release()}"

    def prepare(self, batch: Batch) -> None:
        for key in batch.keys:
            self._numbers[key] = len(self._numbers)
        numbers = [self._numbers[key] for key in batch.keys]
        request = COUNT.pack(len(numbers)) + np.array(numbers, dtype=np.uint32).tobytes()
        self._requests[batch.keys[0]] = request

    def get(self, batch: Batch) -> None:
        self._connection.sendall(self._requests[batch.keys[0]])
        _receive(self._connection, batch.target.reshape(-1).data)

    def close(self) -> None:
        self._connection.close()
        super().close()


class RawTcpHashed(RawTcp):
    """As ours has to: no page counts before its checksum is known."""

    setup: ClassVar[str] = (
        "the same; the thread that receives hashes every page with XXH3-64, after each 2 MiB or page"
    )

    def get(self, batch: Batch) -> None:
        self._connection.sendall(self._requests[batch.keys[0]])
        together = max(1, RECEIVED // self.options.page_bytes)
        for first in range(0, len(batch), together):
            rows = batch.target[first : first + together]
            _receive(self._connection, rows.reshape(-1).data)
            for row in rows:
                xxhash.xxh3_64_intdigest(row.data)
