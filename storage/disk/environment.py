"""Opening the LMDB file of a store directory, safely, and the transactions on it.

The first process to open a store has it alone for a moment (an exclusive lock on a file beside it): it looks at
the file in a child process (probe.py), makes or resizes it, and writes the map size down. Every later
one opens it with that same map size, since LMDB processes must agree on it. The locks are the kernel's,
so a killed process leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import lmdb

from ...errors import ConfigError, Reason, TierError
from ..gate import Gate
from . import layout, probe
from .turn import Turn

logger = logging.getLogger(__name__)

MAX_READERS = 1024  # LMDB's default of 126 is short for many ranks with several threads each
SETUP_SECONDS = (
    600.0  # longest wait for another process that is making the store, or making it smaller
)
PROBE_SECONDS = 60.0  # longest look at a file
OPEN_SECONDS = 60.0  # the same, for the one write of opening
WRITE_SECONDS = 5.0  # longest wait for another writer's transaction
CLOSE_SECONDS = 10.0  # longest wait at close for operations in flight
FULL_BYTES = 1 << 20  # a file system with less room than this is full
REWRITE_BYTES = 64 << 20  # room for deleting from a file that is larger than it should be
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Tables:
    """The handles of the four tables."""

    meta: lmdb._Database
    index: lmdb._Database
    order: lmdb._Database
    pages: lmdb._Database


class Environment:
    """One LMDB file, opened once by this process.

    Args:
        path: the store directory; made when it is not there.
        size: bytes the file may have at most.

    Raises:
        ConfigError: the directory cannot be used; names ``path`` or ``disk.size``. Nothing that was
            there has been changed.
    """

    def __init__(self, path: Path, size: int, *, name: str = "disk") -> None:
        self.name = name
        self.path = path
        self.file = path / layout.FILE
        _make_directory(path)
        self._in_use = _open_lock(path / layout.LOCK)
        self._gate = Gate(name)
        self._closing = Lock()
        self._closed = False
        with ExitStack() as undo:
            undo.callback(os.close, self._in_use)
            self.alone = _lock(self._in_use, path)
            if self.alone:
                _require_ours(self.file)
                self.map_size = max(_page_aligned(size), self._room_to_shrink())
            else:
                self.map_size = _read_map_size(self._in_use, self.file)
            self._turn = Turn(name, path / layout.TURN)
            undo.callback(self._turn.close)
            self._env, self.tables = self._make()
            undo.pop_all()
        self.page = int(self._env.stat()["psize"])

    def _room_to_shrink(self) -> int:
        """What an existing file may need until `resize`, to delete from it."""
        used = self.file.stat().st_size if self.file.exists() else 0
        return used + REWRITE_BYTES if used else 0

    def share(self) -> None:
        """Let other processes open the store; until then the first one has it alone."""
        if self.alone:
            _write_map_size(self._in_use, self.map_size)
            fcntl.flock(self._in_use, fcntl.LOCK_SH)
            self.alone = False

    def resize(self, size: int) -> None:
        """Give the file a new largest size, and make it as small as its content if it is larger.

        For the process that has the store alone, with no operation in flight. The old file stays until
        the new one is whole.
        """
        self.map_size = _page_aligned(size)
        if self.file.stat().st_size > size:
            self._rewrite()
        else:
            with self._translated():
                self._env.set_mapsize(self.map_size)

    def _rewrite(self) -> None:
        copy = self.path / layout.NEW
        copy.unlink(missing_ok=True)
        try:
            with self._translated():
                self._env.copy(str(copy), compact=True)
        except TierError:
            copy.unlink(missing_ok=True)
            raise
        self._env.close()
        _sync(copy)  # whole on the disk, before it takes the other one's name
        copy.replace(self.file)
        _sync(self.path)
        self._env, self.tables = self._make()

    def _make(self) -> tuple[lmdb.Environment, Tables]:
        try:
            env = lmdb.open(
                str(self.file),
                subdir=False,
                map_size=self.map_size,
                max_dbs=len(layout.TABLES),
                max_readers=MAX_READERS,
                readahead=True,  # a page is one long run: 0.5-1.4 against 0.05 GB/s cold
                meminit=False,
            )
            env.reader_check()
            with self._turn.taken(OPEN_SECONDS), env.begin(write=True) as txn:
                meta = env.open_db(b"meta", txn=txn)
                txn.put(b"magic", layout.MAGIC, db=meta)
                txn.put(b"format", layout.pack_format(layout.FORMAT), db=meta)
                rest = [env.open_db(name, txn=txn) for name in layout.TABLES[1:]]
        except (lmdb.MapFullError, lmdb.MemoryError, OverflowError) as error:
            raise ConfigError(
                "disk.size", f"{self.map_size} bytes cannot be mapped for {self.file}: {error}"
            ) from error
        except lmdb.Error as error:
            raise ConfigError("path", _why_not(self.file, error)) from error
        except TierError as error:
            raise ConfigError("path", f"cannot open {self.file}: {error.detail}") from error
        return env, Tables(meta, *rest)

    @contextmanager
    def read(self) -> Iterator[lmdb.Transaction]:
        """A read transaction; values are memory of the file, valid inside only."""
        with self._gate.passing(), self._translated(), self._env.begin(buffers=True) as txn:
            yield txn

    @contextmanager
    def write(self) -> Iterator[lmdb.Transaction]:
        """A write transaction, committed and synced at the end, undone on an exception.

        Raises `TierError`, BUSY when another writer does not finish in time.
        """
        with (
            self._gate.passing(),
            self._turn.taken(WRITE_SECONDS),
            self._translated(),
            self._env.begin(write=True) as txn,
        ):
            yield txn

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (lmdb.MapFullError, lmdb.DiskError) as error:
            raise TierError(self.name, Reason.FULL, str(error)) from error
        except (
            lmdb.CorruptedError,
            lmdb.PageNotFoundError,
            lmdb.InvalidError,
            struct.error,  # a number of ours that is not as long as it was written
        ) as error:
            raise TierError(self.name, Reason.CORRUPT, str(error)) from error
        except lmdb.PanicError as error:
            # LMDB refuses everything after it failed to write its header.
            self._gate.shut(f"LMDB gave up on {self.file}; it is used again after a restart")
            raise TierError(self.name, Reason.IO, str(error)) from error
        except lmdb.Error as error:
            # LMDB calls a write that was cut short by a full disk an input/output error
            reason = Reason.FULL if self._disk_is_full() else Reason.IO
            raise TierError(self.name, reason, str(error)) from error

    def _disk_is_full(self) -> bool:
        try:
            return shutil.disk_usage(self.path).free < FULL_BYTES
        except OSError:  # the directory is gone, say
            return False

    def reap_readers(self) -> int:
        """Free the reader slots of processes that were killed; they would make the file grow."""
        with self._gate.passing(), self._translated():
            return int(self._env.reader_check())

    def close(self) -> None:
        """Wait for operations in flight and let go of the file. Idempotent."""
        self._gate.shut("it was closed")
        with self._closing:
            if self._closed:
                return
            self._closed = True
        if self._gate.wait_empty(CLOSE_SECONDS):
            self._env.close()
            self._turn.close()
            os.close(self._in_use)
        else:  # to close it under a reader would be a crash; the kernel closes both with the process
            logger.warning("%s is still being read; left open", self.file)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError("path", f"{path} is a file; give a directory") from error
    except OSError as error:
        raise ConfigError("path", f"cannot make the directory {path}: {error.strerror}") from error


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            "path", f"cannot write in {path.parent}: {error.strerror}; give one you own"
        ) from error


def _lock(lock: int, path: Path) -> bool:
    """Take the lock exclusively if nobody has the store open (True), else shared (False)."""
    deadline = time.monotonic() + SETUP_SECONDS
    while True:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                return kind == fcntl.LOCK_EX
            except BlockingIOError:
                continue  # exclusive: others have it open; shared: another one is making it
        if time.monotonic() > deadline:
            raise ConfigError("path", f"another process has been making {path} for too long")
        time.sleep(_POLL_SECONDS)  # the kernel offers no wait for a file lock with a deadline


def _require_ours(file: Path) -> None:
    """Raise unless the file is new or a sound one of ours. Changes nothing."""
    if not file.exists() or file.stat().st_size == 0:
        return
    found = _probe(file)
    if found["state"] != "ours":
        raise ConfigError("path", _refusal(file, found))


def _refusal(file: Path, found: dict[str, str]) -> str:
    match found["state"]:
        case "foreign":
            return f"{file} belongs to another program; give a directory of our own"
        case "version":
            return (
                f"{file} was written in format {found['detail']}, this version reads format "
                f"{layout.FORMAT}; use the version that wrote it, or another directory"
            )
    return (
        f"{file} is damaged ({found['detail']}); nothing was deleted: move it away or delete it, "
        "and the next start makes a new one"
    )


def _probe(file: Path) -> dict[str, str]:
    command = [sys.executable, "-I", probe.__file__, str(file), json.dumps(layout.EXPECTED)]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except OSError as error:
        raise ConfigError(
            "path", f"cannot start {sys.executable} to look at {file}: {error.strerror}"
        ) from error
    except subprocess.TimeoutExpired:
        return probe.verdict("damaged", f"it could not be read in {PROBE_SECONDS:.0f} s")
    if done.returncode < 0:
        return probe.verdict("damaged", f"reading it ends a process with signal {-done.returncode}")
    if done.returncode > 0:
        return probe.verdict("damaged", done.stderr.strip().rpartition("\n")[2])
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def _page_aligned(size: int) -> int:
    return size // os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PAGE_SIZE")


def _write_map_size(lock: int, map_size: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(map_size).encode(), 0)


def _read_map_size(lock: int, file: Path) -> int:
    text = os.pread(lock, 32, 0)
    if not text.isdigit():
        raise ConfigError(
            "path", f"{file} is open in another process that did not finish making it"
        )
    return int(text)


def _why_not(file: Path, error: lmdb.Error) -> str:
    if "already open in this process" in str(error):
        return f"{file} is already open in this process; close that store first"
    return f"cannot open {file}: {error}"
