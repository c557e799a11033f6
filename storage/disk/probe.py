"""Look at an LMDB file from a process that may die of it.

LMDB trusts its file: a damaged one can end the process that maps it with SIGSEGV or SIGBUS. So before
an engine opens a file, this script opens it in a child process and walks every tree, but no page's
bytes (those have checksums). Its verdict is one line of JSON on stdout; when it dies instead, that is
the verdict too.

It is run by path with only LMDB importable, so it imports nothing of this package.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from pathlib import Path

import lmdb

WALK_SECONDS = 5.0  # a store too large to walk in this time is trusted beyond it
CLOCK_EVERY = 4096  # keys between two looks at the clock


def verdict(state: str, detail: str = "") -> dict[str, str]:
    """state: ours, foreign, version, short (detail: the bytes it should have) or damaged."""
    return {"state": state, "detail": detail}


def walk(env: lmdb.Environment, table: lmdb._Database, deadline: float) -> None:
    with env.begin(db=table) as txn, txn.cursor() as cursor:
        for i, _ in enumerate(cursor.iternext(keys=True, values=False)):
            if i % CLOCK_EVERY == 0 and time.monotonic() > deadline:
                return


def inspect(path: str, magic: bytes, version: int, tables: list[bytes]) -> dict[str, str]:
    env = lmdb.open(path, subdir=False, readonly=True, lock=False, max_dbs=len(tables))
    info, page = env.info(), env.stat()["psize"]
    needed = (info["last_pgno"] + 1) * page
    if Path(path).stat().st_size < needed:
        return verdict("short", str(needed))
    with env.begin() as txn:
        try:
            meta = env.open_db(b"meta", txn=txn, create=False)
        except lmdb.NotFoundError:
            return verdict("foreign")
        found = txn.get(b"magic", db=meta)
        written_by = txn.get(b"format", db=meta)
    if found != magic or written_by is None:
        return verdict("foreign")
    if struct.unpack("<I", written_by)[0] != version:
        return verdict("version", str(struct.unpack("<I", written_by)[0]))
    deadline = time.monotonic() + WALK_SECONDS
    for name in tables:
        walk(env, env.open_db(name, create=False), deadline)
    return verdict("ours")


def main() -> None:
    path, magic, version, *tables = sys.argv[1:]
    try:
        found = inspect(path, magic.encode(), int(version), [name.encode() for name in tables])
    except (lmdb.Error, struct.error) as error:
        # InvalidError: no LMDB file at all. All others: one that does not hold together.
        state = "foreign" if isinstance(error, lmdb.InvalidError) else "damaged"
        found = verdict(state, str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
