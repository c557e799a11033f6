"""Look at an index file from a process of its own, before an engine trusts it.

LMDB trusts its file: a damaged one can end the process that maps it with SIGSEGV, SIGBUS or SIGABRT, or
keep it busy for ever. So before an engine opens one, this script walks every tree of it with
`lmdb.verify`, which reads it without LMDB, and then looks at the lengths of our records, which LMDB would
take at their word. Its verdict is one line of JSON on stdout; when it dies or hangs instead, that is the
verdict too.

    python probe.py look FILE EXPECTED      python probe.py compact FILE COPY

It is run by path with only LMDB importable, so it imports nothing of this package.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypedDict

import lmdb
from lmdb.verify import VerifyError, verify

WALK_SECONDS = 5.0  # a store too large to walk in this time is trusted beyond it
_LEAK = "a leak"  # room that no tree and no list knows of: wasted, but harmless

_FREE_LIST = struct.Struct("<40xIH")  # in each of LMDB's two headers: page size, flags of the tree
_DUPLICATES = 0x04  # a flag that the free list's tree never has, and that `verify` lets pass


class Expected(TypedDict):
    """What an index of ours looks like; opening.py has the values."""

    tables: list[str]
    lengths: dict[str, tuple[int, int]]  # of each key and value, of the tables where they are fixed


class _OutOfTime(Exception):
    pass


def verdict(state: str, detail: str = "") -> dict[str, str]:
    """state: ours, foreign or damaged."""
    return {"state": state, "detail": detail}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Leave the block, without an error, when its time is up."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def misfits(env: lmdb.Environment, expected: Expected) -> Iterator[str]:
    """Records that LMDB could not have got from us."""
    tables = {name: env.open_db(name.encode(), create=False) for name in expected["tables"]}
    with env.begin(buffers=True) as txn:
        for name, lengths in expected["lengths"].items():
            for key, value in txn.cursor(tables[name]):
                if (len(key), len(value)) != tuple(lengths):
                    yield f"a record of {name} has lengths {len(key)} and {len(value)}"


def free_list_has_duplicates(path: str) -> bool:
    with Path(path).open("rb") as file:
        page_size, flags = _FREE_LIST.unpack(file.read(_FREE_LIST.size))
        file.seek(page_size)
        _, other_flags = _FREE_LIST.unpack(file.read(_FREE_LIST.size))
    return bool((flags | other_flags) & _DUPLICATES)


def inspect(path: str, expected: Expected) -> dict[str, str]:
    found: list[str] = []
    try:
        with at_most(WALK_SECONDS):
            found = verify(path, subdir=False)  # type: ignore[no-untyped-call] # it has no types
    except VerifyError as error:
        return verdict("foreign", str(error))
    if damage := [problem for problem in found if _LEAK not in problem]:
        return verdict("damaged", damage[0])
    if free_list_has_duplicates(path):
        return verdict("damaged", "the list of free pages is marked as another kind of tree")
    env = lmdb.open(path, subdir=False, readonly=True, lock=False, max_dbs=len(expected["tables"]))
    if env.stat()["entries"] == 0:
        return verdict("ours")  # empty: the process that was making it was killed
    misfit = None
    with at_most(WALK_SECONDS):
        try:
            misfit = next(misfits(env, expected), None)
        except lmdb.NotFoundError:
            return verdict("foreign")
    return verdict("ours") if misfit is None else verdict("damaged", misfit)


def compact(path: str, copy: str) -> dict[str, str]:
    """Copy without the free pages."""
    with lmdb.open(path, subdir=False, readonly=True, lock=False, max_dbs=8) as env:
        env.copy(copy, compact=True)
    return verdict("ours")


def main() -> None:
    task, path, argument = sys.argv[1:]
    try:
        found = inspect(path, json.loads(argument)) if task == "look" else compact(path, argument)
    except (lmdb.Error, struct.error) as error:
        found = verdict("damaged", str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
