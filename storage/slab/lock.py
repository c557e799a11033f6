"""Who has a store directory open: this process alone, or with others.

The locks are the kernel's, so a killed process leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from threading import Lock

from ...errors import ConfigError
from . import files

SETUP_SECONDS = 600.0  # longest wait for another process that is making or resizing the store
_POLL_SECONDS = 0.05

_open_here: set[tuple[int, int]] = set()  # device and inode of the directories open in this process
_open_lock = Lock()


class InUse:
    """A directory that this process has open. Raises: ConfigError, also when it has it open already."""

    def __init__(self, directory: Path, setting: str) -> None:
        status = directory.stat()
        self._directory = (status.st_dev, status.st_ino)
        with _open_lock:
            if self._directory in _open_here:
                raise ConfigError(
                    setting, f"{directory} is already open in this process; close that store first"
                )
            _open_here.add(self._directory)
        self._file = -1
        try:
            self._file = _opened(directory / files.IN_USE, setting)
            self.alone = _lock(self._file, directory, setting)
        except ConfigError:
            self.close()
            raise

    @property
    def file(self) -> int:
        """The descriptor that holds the lock: a child that inherits it holds it too, until it ends."""
        return self._file

    def share(self) -> None:
        """Let other processes open the store."""
        fcntl.flock(self._file, fcntl.LOCK_SH)
        self.alone = False

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
        with _open_lock:
            _open_here.discard(self._directory)


def _opened(path: Path, setting: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            setting, f"cannot write in {path.parent}: {error.strerror}; give one you own"
        ) from error


def _lock(file: int, directory: Path, setting: str) -> bool:
    """Exclusively if nobody else has the store open (True), else shared (False)."""
    deadline = time.monotonic() + SETUP_SECONDS
    while True:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                return kind == fcntl.LOCK_EX
            except BlockingIOError:
                continue  # exclusive: others have it open; shared: another one is making it
        if time.monotonic() > deadline:
            raise ConfigError(setting, f"another process has been making {directory} for too long")
        time.sleep(_POLL_SECONDS)  # the kernel offers no wait for a file lock with a deadline
