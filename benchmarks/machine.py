"""Where it was measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path


def describe(directory: Path) -> dict[str, str]:
    """The machine, and the file system of a directory, in words."""
    device, kind, options = _mount(directory)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": _disk(device),
        "file system": f"{kind} ({options})",
        "load at start": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _mount(directory: Path) -> tuple[str, str, str]:
    """Device, type and options of the file system that a directory is on."""
    best = ("", "unknown", "unknown", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, point, kind, options = line.split()[:4]
        if directory.resolve().is_relative_to(point) and len(point) > len(best[0]):
            best = (point, device, kind, options)
    return best[1], best[2], best[3]


def _disk(device: str) -> str:
    block = Path("/sys/class/block") / Path(device).name
    if not block.exists():
        return device
    sectors = int((block / "size").read_text())
    spinning = block / "queue" / "rotational"
    turns = spinning.exists() and spinning.read_text().strip() == "1"
    kind = (
        "virtual disk" if device.startswith("/dev/vd") else "rotating" if turns else "solid state"
    )
    return f"{Path(device).name}, {kind}, {sectors * 512 / 2**30:.0f} GiB"
