"""The files of a store directory: made at their full size, resized, given back.

store.json   what the store is (head.py)
index        LMDB: page key -> entry;  index-lock: LMDB's reader table and writer lock
region       the slots
control      what processes share besides: free slots, lists, the mutex (csrc/control.hpp)
owners       a locked byte for each process that has the store open
in-use       locked shared by each of them, exclusively by who makes or resizes the store
keeper       locked by the process that writes from the upper tier to the lower one
sweeper      locked by the process that does the rest, where there is one tier only
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...errors import ConfigError
from . import head as heads
from .head import Head
from .plan import Plan

logger = logging.getLogger(__name__)

INDEX = "index"
INDEX_LOCK = "index-lock"
INDEX_COPY = "index.new"  # a smaller one in the making
REGION = "region"
CONTROL = "control"
OWNERS = "owners"
IN_USE = "in-use"
KEEPER = "keeper"
SWEEPER = "sweeper"

OWN = (
    CONTROL,
    INDEX,
    INDEX_LOCK,
    REGION,
    OWNERS,
    KEEPER,
    SWEEPER,
)  # what goes when a store could not be made

_CHUNK = 256 << 20
_SAY_EVERY_SECONDS = 5.0
_THREADS = 4
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


def require_empty(directory: Path, setting: str) -> None:
    """Raise unless nothing of ours, nor of another program's by our names, is in the directory."""
    for name in OWN:
        if (directory / name).exists() and not (directory / f"{heads.FILE}.new").exists():
            raise ConfigError(
                setting,
                f"{directory / name} is no store's, or its {heads.FILE} is lost; give another "
                "directory, or delete it",
            )


def require_files(directory: Path, setting: str) -> None:
    """Raise when there is a directory where a store has a file; nothing was changed then."""
    for name in OWN:
        if (directory / name).is_dir():
            raise ConfigError(
                setting,
                f"{directory / name} is a directory, where a store has a file; move it away, or give "
                "another directory",
            )


def allocate(file: Path, size: int, setting: str) -> None:
    """Give a file this size and all of its space, whatever size it has.

    Raises:
        ConfigError: there is not so much room.
    """
    had = file.stat().st_size if file.exists() else 0
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError("path", f"cannot write {file}: {error.strerror}") from error
    try:
        if had > size:
            os.ftruncate(handle, size)
        _require_room(handle, size, file)
        _reserve(handle, size, file)
    except OSError as error:
        os.ftruncate(handle, had)
        raise _no_room(file, size, error, setting) from error
    finally:
        os.close(handle)


def _require_room(handle: int, size: int, file: Path) -> None:
    """Or the allocation would take all that there is, from everybody, before it fails."""
    missing = size - os.fstat(handle).st_blocks * 512
    if missing > shutil.disk_usage(file.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _reserve(handle: int, size: int, file: Path) -> None:
    """`posix_fallocate` in parts, several at once: on tmpfs each of them clears memory."""
    started = said = time.monotonic()
    starts = range(0, size, _CHUNK)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="lmcache-allocate") as pool:
        parts = [
            pool.submit(os.posix_fallocate, handle, start, min(_CHUNK, size - start))
            for start in starts
        ]
        for done, part in enumerate(parts, 1):
            part.result()
            if time.monotonic() - said > _SAY_EVERY_SECONDS:
                said = time.monotonic()
                share = 100 * done // len(parts)
                logger.info("lmcache: allocating %s: %d %% of %.1f GB", file, share, size / 1e9)
    if said > started:
        logger.info("lmcache: allocated %s in %.0f s", file, time.monotonic() - started)


def _no_room(file: Path, size: int, error: OSError, setting: str) -> ConfigError:
    if error.errno not in _NO_ROOM:
        return ConfigError("path", f"cannot allocate {file}: {error.strerror}")
    free = shutil.disk_usage(file.parent).free
    hint = (
        "; a container's /dev/shm is made larger with --shm-size, or shared with --ipc=host"
        if file.is_relative_to("/dev/shm")
        else ""
    )
    if error.errno == errno.EFBIG:
        hint = "; the process may not write files that large (ulimit -f)"
    return ConfigError(
        setting,
        f"{size} bytes cannot be allocated for {file} ({error.strerror}; {free} bytes are free); give "
        f"it less, or make room{hint}",
    )


def allocated(directory: Path) -> int:
    """Bytes that a store's files take there; 0 when there is none. Other programs' files do not count."""
    if not (directory / heads.FILE).is_file():
        return 0
    names = [directory / name for name in (heads.FILE, IN_USE, *OWN)]
    return sum(name.stat().st_blocks * 512 for name in names if name.is_file())


def remove_own(directory: Path) -> None:
    """Delete a store's files, the head last: without it the rest would be taken for another program's.

    For who has it alone.
    """
    for name in (*OWN, f"{heads.FILE}.new", heads.FILE):
        (directory / name).unlink(missing_ok=True)


def sizes_fit(directory: Path, plan: Plan) -> bool:
    """Whether region and control are as large as the plan says; they are mapped at that size."""
    wanted = {REGION: plan.region_bytes, CONTROL: plan.control_bytes}
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size >= size
        for name, size in wanted.items()
    )


def whole_slabs(directory: Path, head: Head) -> int:
    """How many slabs the region file still holds; fewer than it should when it was shortened by hand."""
    region = directory / REGION
    size = region.stat().st_size if region.is_file() else 0
    return min(head.slabs, size // head.slab_bytes)
