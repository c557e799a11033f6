"""The folder that outlives the server."""

from __future__ import annotations

import shutil
from pathlib import Path

from examples.demo.errors import DemoFailed

MARKER = ".made-by-the-lmcache-sglang-demo"


class StoreFolder:
    """A folder for the store's pages that the demo may empty, because the demo made it."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.pages = self.root / "pages"

    def empty(self) -> None:
        """Begin with no pages. Raises `DemoFailed` on a folder that holds something of others."""
        if self.root.is_dir() and any(self.root.iterdir()) and not self._is_ours():
            raise DemoFailed(
                f"{self.root} holds files that are not the demo's: name another folder"
            )
        shutil.rmtree(self.pages, ignore_errors=True)
        self.pages.mkdir(parents=True)
        (self.root / MARKER).touch()

    def remove(self) -> None:
        if self._is_ours():
            shutil.rmtree(self.root)

    @property
    def size(self) -> int:
        """Bytes on disk: a sparse file counts for what it holds."""
        files = (path.stat() for path in self.pages.rglob("*") if path.is_file())
        return sum(stat.st_blocks * 512 for stat in files)

    def _is_ours(self) -> bool:
        return (self.root / MARKER).exists()
