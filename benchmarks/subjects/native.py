"""native/raw.c, compiled when first needed: what the machine can do without any store."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.subjects.base import Rows, SubjectError

SOURCE = Path(__file__).resolve().parents[1] / "native" / "raw.c"
LONGEST_REQUEST = 1 << 20  # bytes; what disks are asked for at once, as fio with bs=1M
BUILD = SOURCE.parents[2] / ".cache" / "bench"


def _library() -> ctypes.CDLL:
    """The compiled library; it is compiled under another name first, as workers may race."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = BUILD / f"raw-{digest}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, "-o", str(fresh), str(SOURCE)], check=True)
        fresh.replace(library)
    return ctypes.CDLL(str(library))


class Raw:
    """The two calls, with Python's types. Both give the GIL away."""

    def __init__(self) -> None:
        self._library = _library()

    def copy(self, target: Rows, source: Rows, threads: int) -> None:
        """memcpy each row."""
        self._check(
            self._library.raw_copy(
                ctypes.c_void_p(target.ctypes.data),
                ctypes.c_void_p(source.ctypes.data),
                ctypes.c_size_t(source.shape[1]),
                ctypes.c_size_t(len(source)),
                threads,
            )
        )

    def move(
        self, handle: int, rows: Rows, slots: Sequence[int], depth: int, *, write: bool
    ) -> None:
        """Read or write each row from or to its slot, `depth` requests in flight."""
        places = np.array(slots, dtype=np.int64)
        self._check(
            self._library.raw_io(
                handle,
                int(write),
                ctypes.c_void_p(rows.ctypes.data),
                ctypes.c_size_t(rows.shape[1]),
                ctypes.c_void_p(places.ctypes.data),
                ctypes.c_size_t(len(rows)),
                ctypes.c_size_t(min(rows.shape[1], LONGEST_REQUEST)),
                depth,
            )
        )

    def _check(self, error: int) -> None:
        if error:
            raise SubjectError(os.strerror(error))
