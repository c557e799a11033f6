"""Files that were read, and whether they are still the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """What of a file, or folder, changes when it is written or another one takes its place.

    Links are followed: Kubernetes changes a ConfigMap by a link to another folder. All zero: there is none.
    """

    device: int = 0
    inode: int = 0
    size: int = 0
    changed_ns: int = 0  # contents
    moved_ns: int = 0  # contents, name, owner or mode

    @classmethod
    def of(cls, path: Path) -> Stamp:
        try:
            now = path.stat()
        except (OSError, ValueError):  # why, whoever reads it is told
            return cls()
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


class Watched:
    """The files. Each is noted before it is read, so that no later change goes unseen."""

    def __init__(self) -> None:
        self._stamps: dict[Path, Stamp] = {}

    def note(self, path: Path) -> None:
        """It will be read now."""
        self._stamps.setdefault(path, Stamp.of(path))

    def has_changed(self) -> bool:
        return self.now() != self._stamps

    def now(self) -> dict[Path, Stamp]:
        """What they are like at this moment."""
        return {path: Stamp.of(path) for path in self._stamps}
