"""Cubins on disk.

A file is named by the architecture, the compiler and the source it was made from, so nothing in it is ever out of
date. It begins with a digest of the rest: one that is damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import sources

logger = logging.getLogger(__name__)

MAGIC = b"lmcache cubin 1\n"
DIGEST_BYTES = 32


class Cubins:
    """A folder of them; made when the first is kept. What is in it will be run, so its owner alone may write there.

    Args:
        directory: may be shared by all processes of a machine: whoever serves need not be who built it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, arch: str, compiler: str) -> Path:
        """Where the cubin of one compiler is, or would be."""
        return self._directory / f"copy-{arch}-{compiler}-{sources.digest()}.cubin"

    def find(self, arch: str, compiler: str) -> bytes | None:
        """The cubin of one compiler; None: there is none."""
        return next(self.find_all(arch, compiler), None)

    def find_all(self, arch: str, compiler: str) -> Iterator[bytes]:
        """Those of all compilers that are named so, by `*` in it; of the newest version first."""
        paths = self._directory.glob(self.path(arch, compiler).name)
        for path in sorted(paths, key=_version, reverse=True):
            cubin = _read(path)
            if cubin is not None:
                yield cubin

    def keep(self, arch: str, compiler: str, cubin: bytes) -> Path:
        """Under its name at once, or not at all.

        Raises:
            OSError: the folder cannot be made or written.
        """
        path = self.path(arch, compiler)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        handle, temporary = tempfile.mkstemp(dir=self._directory, prefix=".cubin-")
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o644)
                file.write(MAGIC + hashlib.sha256(cubin).digest() + cubin)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # it is gone once it has its name
        return path


def _version(path: Path) -> list[int]:
    found = re.search(r"-([\d.]+)-[^-]+$", path.name)
    return [int(number) for number in found[1].split(".")] if found else []


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
