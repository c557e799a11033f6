"""Ports of the server processes that some subjects need. Only on 127.0.0.1."""

from __future__ import annotations

import socket
import subprocess
import time

from benchmarks.subjects.base import SubjectError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until a server answers.

    Raises:
        SubjectError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SubjectError(f"the server ended with status {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SubjectError(f"the server did not answer in {seconds:.0f} s")
