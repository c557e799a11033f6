"""A stretch of the way between two nodes that a test can watch: it passes TCP on, and counts.

with Relay(("127.0.0.1", port)) as relay:
    ...  # others connect to relay.address
    relay.wait_for(1 << 20)
"""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from threading import Condition, Thread
from types import TracebackType
from typing import Self

PIECE = 1 << 16


class Relay:
    """Connections to `address` are passed on to the one that it is made for. Threads are as many as connections, twice."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._server = socket.create_server(("127.0.0.1", 0))
        self._back = 0  # bytes that came from there
        self._changed = Condition()
        self._undo = ExitStack()
        self._undo.callback(self._server.close)
        self._undo.callback(self._shut, self._server)
        Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.getsockname()
        return host, port

    @property
    def back(self) -> int:
        """Bytes that came back so far, of all connections."""
        return self._back

    def wait_for(self, back: int, seconds: float = 60.0) -> None:
        """Return when so many bytes have come back. Raises: TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._back >= back, seconds):
                raise TimeoutError(f"{self._back} bytes came back in {seconds:.0f} s, not {back}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:  # the block has ended
                return
            try:
                there = socket.create_connection(self._to)
            except OSError:  # nobody is there: what TCP says of that is a reset
                here.close()
                continue
            for end in (here, there):
                self._undo.callback(self._shut, end)
            Thread(target=self._pass, args=(here, there, False), daemon=True).start()
            Thread(target=self._pass, args=(there, here, True), daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, counts: bool) -> None:
        with suppress(OSError), source:  # whichever side ends first, the other is told
            while piece := source.recv(PIECE):
                if counts:
                    with self._changed:
                        self._back += len(piece)
                        self._changed.notify_all()
                to.sendall(piece)
        self._shut(to)

    def _shut(self, end: socket.socket) -> None:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
