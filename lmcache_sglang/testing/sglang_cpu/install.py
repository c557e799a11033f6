"""Puts the stand-ins of `finder` into an environment, by a one-line .pth file in site-packages.

Python runs that line at each start, so SGLang's spawned children have them too, whatever their
command line. The line imports nothing unless SGLang runs on CPU, and does nothing once
lmcache_sglang is uninstalled.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

from lmcache_sglang.testing.sglang_cpu.config import IF_ACTIVE, VARIABLE

# Python reads .pth files in order of name; an editable install's, on which the import below
# depends, begins with an underscore and comes before.
PTH_NAME = "lmcache_sglang_cpu.pth"
PTH_LINE = (
    f"{IF_ACTIVE} and __import__('importlib.util').util.find_spec('lmcache_sglang')"
    " and __import__('lmcache_sglang.testing.sglang_cpu.finder', fromlist=['install']).install()\n"
)


def install(site: Path) -> str:
    """Write the file into `site`, and say what was done."""
    pth = site / PTH_NAME
    if _installed(pth):
        return f"{pth} is there already"
    pth.write_text(PTH_LINE)
    return f"wrote {pth}: with {VARIABLE}=1, SGLang runs on CPU in this environment"


def uninstall(site: Path) -> str:
    """Remove the file from `site`, and say what was done."""
    pth = site / PTH_NAME
    if not pth.exists():
        return f"{pth} is not there"
    pth.unlink()
    return f"removed {pth}"


def status(site: Path) -> str:
    pth = site / PTH_NAME
    if not pth.exists():
        return f"not installed: no {pth}"
    return f"installed: {pth}" if _installed(pth) else f"outdated, install again: {pth}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lmcache_sglang.testing.sglang_cpu",
        description="lets the real SGLang run on CPU in this Python environment",
    )
    parser.add_argument("action", choices=("install", "uninstall", "status"))
    parser.add_argument("--force", action="store_true", help="also outside a virtual environment")
    args = parser.parse_args()
    if args.action == "install" and not args.force and sys.prefix == sys.base_prefix:
        sys.exit(f"{sys.prefix} is not a virtual environment; use one, or say --force")
    act = {"install": install, "uninstall": uninstall, "status": status}[args.action]
    print(act(Path(sysconfig.get_path("purelib"))))


def _installed(pth: Path) -> bool:
    return pth.exists() and pth.read_text() == PTH_LINE
