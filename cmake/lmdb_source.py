"""Gets LMDB's C source for the build: `python lmdb_source.py DIR` leaves `DIR/{mdb.c,midl.c,lmdb.h}`.

The source comes out of py-lmdb's source distribution, by pip, so it obeys whatever index pip is set up
with. That copy carries patches that make LMDB refuse a damaged file instead of crashing on it; they are
applied here in py-lmdb's own order. Archive and version are pinned by checksum.

Why not the `lmdb` package itself: its extension hides LMDB's functions, and its Python calls take the GIL
back for each key (4 ms a key beside a busy thread, measured; 0.4 us here).
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.0.0"  # of py-lmdb; brings LMDB 0.9.36
SHA256 = "06dda0723545e14d56ac7dcd6f582d9922c2ed5e16f1c3f8d0e670a96ec2ee65"
FILES = ("mdb.c", "midl.c", "lmdb.h", "midl.h")


def main(target: Path) -> None:
    if all((target / name).is_file() for name in FILES):
        return
    with tempfile.TemporaryDirectory() as scratch:
        tree = _unpacked(_downloaded(Path(scratch)), Path(scratch))
        _patch(tree)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (tree / "lib" / name).replace(target / name)
        (tree / "LICENSE").replace(target / "LICENSE.OpenLDAP")


def _downloaded(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
    ]
    subprocess.run([*command, "--no-binary", "lmdb", f"lmdb=={VERSION}"], check=True)
    (archive,) = scratch.glob("lmdb-*.tar.gz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive.name} has SHA-256 {found}, wanted {SHA256}")
    return archive


def _unpacked(archive: Path, scratch: Path) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    return scratch / archive.name.removesuffix(".tar.gz")


def _patch(tree: Path) -> None:
    for name in _patches(tree / "setup.py"):
        with (tree / "lib" / "py-lmdb" / f"{name}.patch").open("rb") as patch:
            command = ["patch", "--quiet", "-N", "-p3", "-d", str(tree / "lib")]
            subprocess.run(command, stdin=patch, check=True)


def _patches(setup: Path) -> list[str]:
    """The names that py-lmdb's set-up lists for this series of LMDB, in the order it applies them."""
    for node in ast.walk(ast.parse(setup.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "patch_names":
            names: list[str] = ast.literal_eval(node.value)
            return names  # the first list is that of the 0.9 series
    raise SystemExit(f"{setup.name} lists no patches")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
