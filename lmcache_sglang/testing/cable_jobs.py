"""Two programs for the ends of a cable: functions for store_process.py."""

from __future__ import annotations

import socket
from pathlib import Path

from .cable import plug_in

PORT = 5000
SECONDS = 60.0


def echo(address: str, cable: Path) -> int:
    """Send back what the first who connects says; how many bytes that was."""
    plug_in(address, cable)
    with socket.create_server((address, PORT)) as server:
        server.settimeout(SECONDS)
        connection, _ = server.accept()
    heard = 0
    with connection:
        while said := connection.recv(1 << 16):
            connection.sendall(said)
            heard += len(said)
    return heard


def say(address: str, cable: Path, to: str, words: bytes, seconds: float = SECONDS) -> bytes:
    """Connect, say this, and return what comes back. Raises: OSError: nobody answers in time."""
    plug_in(address, cable)
    connection = _connect(to, seconds)
    with connection:
        connection.settimeout(seconds)
        connection.sendall(words)
        heard = bytearray()
        while len(heard) < len(words):
            heard += connection.recv(1 << 16)
    return bytes(heard)


def _connect(to: str, seconds: float) -> socket.socket:
    """Again while nobody listens there yet: the kernel then refuses at once."""
    while True:
        try:
            return socket.create_connection((to, PORT), seconds)
        except ConnectionRefusedError:
            continue
