"""How a node's engines tell its agent what they put: datagrams, so that neither ever waits for the other.

What is lost, because the agent is busy or not there, it finds when it looks through the index next.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..base import KEY_BYTES

FILE = "told"
KEYS_MOST = 1024  # of one datagram


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for the path that fits into a socket's address, which has room for 107 bytes only."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Told:
    """The agent's side. Args: folder: of the directory. Raises: OSError."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with _short(self._path) as name:
            self._socket.bind(name)
        self._path.chmod(0o600)

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> list[list[bytes]]:
        """What came: of each datagram its keys; none: look at once, something was cleared."""
        taken: list[list[bytes]] = []
        while len(taken) < KEYS_MOST:
            try:
                datagram = self._socket.recv(KEYS_MOST * KEY_BYTES + 1)
            except BlockingIOError:
                break
            if len(datagram) % KEY_BYTES == 0:
                taken.append(
                    [datagram[at : at + KEY_BYTES] for at in range(0, len(datagram), KEY_BYTES)]
                )
        return taken

    def close(self) -> None:
        """The name stays: it may be another agent's by now."""
        self._socket.close()


class Teller:
    """An engine's side. Threads may share it. Args: folder: of the directory, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.untold = 0  # datagrams that the agent did not get

    def tell(self, keys: Sequence[bytes]) -> None:
        """These are here now; none: something was cleared. Costs one system call for a thousand keys."""
        try:
            with _short(self._path) as name:
                for at in range(0, len(keys) or 1, KEYS_MOST):
                    self._socket.sendto(b"".join(keys[at : at + KEYS_MOST]), name)
        except OSError:  # it is not there, or has no room: it will look by itself
            self.untold += 1

    def close(self) -> None:
        self._socket.close()
