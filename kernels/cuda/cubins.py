"""Cubins on disk.

A file is named by the architecture, the compiler and the source it was made from, so nothing in it is ever out of
date. It begins with a digest of the rest: one that is damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from . import sources

logger = logging.getLogger(__name__)

MAGIC = b"lmcache cubin 1\n"
DIGEST_BYTES = 32


class Cubins:
    """A folder of them; made when the first is kept, for its owner alone, since what is in it will be run.

    Args:
        directory: may be shared by all processes of a user.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, arch: str, compiler: str) -> Path:
        """Where the cubin of one compiler is, or would be."""
        return self._directory / f"copy-{arch}-{compiler}-{sources.digest()}.cubin"

    def find(self, arch: str, compiler: str) -> bytes | None:
        """The cubin of one compiler, or, by `*` in its name, one of such compilers; None: there is none."""
        paths = self._directory.glob(self.path(arch, compiler).name)
        for path in sorted(paths, reverse=True):
            cubin = _read(path)
            if cubin is not None:
                return cubin
        return None

    def keep(self, arch: str, compiler: str, cubin: bytes) -> Path:
        """Under its name at once, or not at all.

        Raises:
            OSError: the folder cannot be made or written.
        """
        path = self.path(arch, compiler)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=self._directory, prefix=".cubin-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + hashlib.sha256(cubin).digest() + cubin)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it is gone once it has its name
        return path


def _read(path: Path) -> bytes | None:
    try:
        whole = path.read_bytes()
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    head = len(MAGIC) + DIGEST_BYTES
    cubin = whole[head:]
    if whole[:head] != MAGIC + hashlib.sha256(cubin).digest():
        logger.warning("%s is damaged; the kernels are compiled again", path)
        return None
    return cubin
