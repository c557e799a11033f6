"""What a directory's file system can do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# LMDB maps its file and locks it: https://www.symas.com/lmdb "Do not use on remote filesystems".
REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "glusterfs"}
)


MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_ESCAPED = re.compile(r"\\([0-7]{3})")  # blanks and backslashes, in the table


@dataclass(frozen=True, slots=True)
class Mount:
    point: Path
    kind: str


def mount_of(path: Path, table: Path = Path("/proc/self/mountinfo")) -> Mount:
    """The mount that a path, which need not exist yet, lies in.

    Format of the table: proc_pid_mountinfo(5); a mount point is field 5, its type follows the dash.
    """
    there = Path(os.path.realpath(next(p for p in (path, *path.parents) if p.exists())))
    found = Mount(Path("/"), "unknown")
    for line in os.fsdecode(table.read_bytes()).splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_ESCAPED.sub(lambda digits: chr(int(digits[1], 8)), before.split()[4]))
        if there.is_relative_to(point) and len(point.parts) >= len(found.point.parts):
            found = Mount(point, after.split()[0])  # of several on one point, the last one shows
    return found


def why_not(mount: Mount) -> str | None:
    """Why no store can lie there; None when one can."""
    if mount.kind in REMOTE or mount.kind.startswith("fuse."):
        return (
            f"it is on a network file system ({mount.kind} at {mount.point}), where LMDB's memory map and "
            "locks do not hold; give a directory on a disk of this machine, and share pages by `peers`"
        )
    if mount.kind in ("overlay", "overlayfs"):
        return (
            f"it is on a container's own layer ({mount.kind} at {mount.point}), where LMDB's memory map "
            "does not hold and which goes with the container; give a directory on a volume"
        )
    if mount.kind == "hugetlbfs":
        return (
            f"it is on {mount.kind} (at {mount.point}), where files can be mapped but not written to; give "
            "a directory in /dev/shm, and set cpu.huge_pages"
        )
    return None
