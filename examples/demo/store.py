"""The folder that outlives the server, and the shared memory that does."""

from __future__ import annotations

import shutil
from pathlib import Path

from examples.demo.errors import DemoFailed
from lmcache_sglang.config import CpuConfig
from lmcache_sglang.storage.slab.filesystem import mount_of, why_not

MARKER = ".made-by-the-lmcache-sglang-demo"


class StoreFolder:
    """A folder for the store's pages that the demo may empty, because the demo made it."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.pages = self.root / "pages"

    @property
    def memory(self) -> Path:
        """Where the store's CPU tier lies; it belongs to this folder and to no other."""
        return CpuConfig().directory(self.pages)

    def require_usable(self) -> None:
        """Raises `DemoFailed` where the store would be refused, before a model is fetched for it."""
        if reason := why_not(mount_of(self.root)):
            raise DemoFailed(
                f"{self.root} cannot hold a store: {reason}. For the demo memory will do: "
                "--store /dev/shm/lmcache-demo"
            )

    def empty(self) -> None:
        """Begin with no pages. Raises `DemoFailed` on a folder that holds something of others."""
        if self.root.is_dir() and any(self.root.iterdir()) and not self._is_ours():
            raise DemoFailed(
                f"{self.root} holds files that are not the demo's: name another folder"
            )
        self._forget()
        self.pages.mkdir(parents=True)
        (self.root / MARKER).touch()

    def remove(self) -> None:
        if self._is_ours():
            self._forget()
            shutil.rmtree(self.root)

    def _forget(self) -> None:
        for folder in (self.pages, self.memory):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def size(self) -> int:
        """Bytes on disk: a sparse file counts for what it holds."""
        files = (path.stat() for path in self.pages.rglob("*") if path.is_file())
        return sum(stat.st_blocks * 512 for stat in files)

    def _is_ours(self) -> bool:
        return (self.root / MARKER).exists()
