"""Stores that were damaged at random while nobody had them open: thousands of them in a process.

Damage changes the saved files of a sound store (`SmallStore.save`). `try_cases` then opens what is left,
and raises AssertionError for all that must not come of it; of a crash the caller learns from the process's
end, and of the case from the file `last`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb

from ..errors import ConfigError, TierError
from ..kernels.pages import PageSegments
from ..storage.base import Lookup
from ..storage.slab import files, head, opening, probe
from ..storage.slab.tier import SlabTier
from .small_store import SmallStore, key_of, page_of, probe_in_a_fork

BLOCK = 4096

Saved = dict[str, bytes]
Damage = Callable[[random.Random, Saved], Saved]


def _flipped(rng: random.Random, content: bytes, most: int) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, most)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flips(name: str, most: int) -> Damage:
    return lambda rng, saved: {name: _flipped(rng, saved[name], most)}


def _flipped_index(rng: random.Random, saved: Saved) -> Saved:
    """Where something is: most of the file is room for more."""
    changed = bytearray(saved[files.INDEX])
    used = [at for at in range(0, len(changed), BLOCK) if any(changed[at : at + BLOCK])]
    for _ in range(rng.randint(1, 3)):
        block, size = rng.choice([(rng.choice(used), BLOCK), (rng.choice(used[:2]), 160)])
        changed[block + rng.randrange(size)] ^= 1 << rng.randrange(8)
    return {files.INDEX: bytes(changed)}


def _scribbled_control(rng: random.Random, saved: Saved) -> Saved:
    """In its header, or anywhere."""
    changed = bytearray(saved[files.CONTROL])
    start, size = (
        rng.randrange(rng.choice([400, len(changed)])),
        rng.choice([4, 8, 64, 1000, BLOCK]),
    )
    size = min(size, len(changed) - start)
    changed[start : start + size] = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size])
    return {files.CONTROL: bytes(changed)}


def _swapped_blocks(name: str) -> Damage:
    """Two ranges of whole blocks change places: in the region, slots and parts of them."""

    def damage(rng: random.Random, saved: Saved) -> Saved:
        changed, size = bytearray(saved[name]), BLOCK * rng.choice([1, 1, 2, 4])
        one, other = (BLOCK * rng.randrange((len(changed) - size) // BLOCK + 1) for _ in range(2))
        changed[one : one + size] = saved[name][other : other + size]
        changed[other : other + size] = saved[name][one : one + size]
        return {name: bytes(changed)}

    return damage


def _truncated(rng: random.Random, saved: Saved) -> Saved:
    name = rng.choice([files.REGION, files.CONTROL, files.INDEX, files.INDEX_LOCK, head.FILE])
    size = len(saved[name])
    return {
        name: saved[name][
            : rng.choice([0, size - 1, rng.randrange(size), size // BLOCK // 2 * BLOCK])
        ]
    }


def _lost(rng: random.Random, saved: Saved) -> Saved:
    return {rng.choice([files.REGION, files.CONTROL, files.INDEX_LOCK, files.OWNERS]): b""}


def _swapped_entries(rng: random.Random, saved: Saved) -> Saved:
    """Entries of the index under each other's key."""
    with TemporaryDirectory(dir="/dev/shm", prefix="lmcache-test-") as scratch:
        file = Path(scratch) / "index"
        file.write_bytes(saved[files.INDEX])
        _swap_entries(rng, file)
        return {files.INDEX: file.read_bytes()}


def _swap_entries(rng: random.Random, file: Path) -> None:
    size = file.stat().st_size
    env = lmdb.open(str(file), subdir=False, lock=False, max_dbs=8, map_size=size)
    table = env.open_db(b"index", create=False)
    with env, env.begin(write=True, db=table) as txn:
        entries = list(txn.cursor())
        for _ in range(rng.randint(1, 3)):
            (one, its), (other, others) = rng.sample(entries, 2)
            txn.put(one, others)
            txn.put(other, its)


def _older(rng: random.Random, saved: Saved) -> Saved:
    """A file from before the store's last changes."""
    name = rng.choice([files.REGION, files.CONTROL, files.INDEX])
    return {name: saved[OLDER + name]}


OLDER = "older "  # before the name of a file in what `try_cases` is given

# How often, and what. The control file is made anew by who comes first, so that a few cases of it will do;
# scribble.py damages it under an open store.
KINDS: dict[str, tuple[int, Damage]] = {
    "bits of the region": (32, _flips(files.REGION, 8)),
    "bits of the control file": (3, _flips(files.CONTROL, 8)),
    "bits of the index": (28, _flipped_index),
    "bits of the head": (6, _flips(head.FILE, 2)),
    "other bytes in the control file": (1, _scribbled_control),
    "swapped slots": (10, _swapped_blocks(files.REGION)),
    "swapped blocks of the index": (4, _swapped_blocks(files.INDEX)),
    "swapped entries": (6, _swapped_entries),
    "shorter files": (6, _truncated),
    "lost files": (2, _lost),
    "older files": (2, _older),
}


class Reader:
    """Reads all of some pages into one block of memory, again and again."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.keys = [key_of(number) for number in numbers]
        self._contents = [page_of(number)[1] for number in numbers]
        self._block = bytearray(sum(map(len, self._contents)))
        self._views, at = list[memoryview](), 0
        for content in self._contents:
            self._views.append(memoryview(self._block)[at : at + len(content)])
            at += len(content)
        self._into = PageSegments.of_buffers(self._views, writable=True)
        self._from = PageSegments.of_buffers(self._contents)

    def get(self, tier: SlabTier) -> list[Lookup]:
        self._block[:] = bytes(len(self._block))
        outcome = tier.get(self.keys, self._into)
        for lookup, view, content in zip(outcome, self._views, self._contents, strict=True):
            assert lookup is not Lookup.HIT or view == content, "wrong bytes"
        return outcome

    def put(self, tier: SlabTier) -> list[bool]:
        return [
            stored.kept for stored in tier.put(self.keys, self._from, None, [b""] * len(self.keys))
        ]


def try_cases(
    store: SmallStore, saved: Saved, numbers: list[int], cases: range, last: Path
) -> Counter[str]:
    """Damage the store anew for each case. Returns: how often what became of what."""
    sound = saved[files.INDEX]
    probe_in_a_fork()
    thorough = opening._probe

    def look(task: str, index: Path, argument: str, keep: Sequence[int] = ()) -> dict[str, str]:
        same = index.read_bytes() == sound
        return probe.verdict("ours") if same else thorough(task, index, argument)

    opening._probe = look
    whole = {name: content for name, content in saved.items() if not name.startswith(OLDER)}
    reader, seen = Reader(numbers), Counter[str]()
    names, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    for case in cases:
        last.write_text(str(case))
        rng = random.Random(case)
        name = rng.choices(names, weights)[0]
        damage = KINDS[name][1](rng, saved)
        try:
            outcome = _try(store, whole, damage, reader)
        except AssertionError as error:
            raise AssertionError(f"case {case}, {name}: {error}") from error
        seen[f"{name}: {outcome}"] += 1
    return seen


def _try(store: SmallStore, whole: Saved, damage: Saved, reader: Reader) -> str:
    store.restore({**whole, **damage})
    try:
        tier = store.open()
    except ConfigError:
        _require_as_it_was(store, {**whole, **damage})
        return "refused"
    try:
        return _use(tier, damage.keys(), reader)
    finally:
        tier.close()


def _require_as_it_was(store: SmallStore, left: Saved) -> None:
    now = store.save()
    for name, content in left.items():
        assert now[name] == content, f"a refused store's {name} was changed"


def _use(tier: SlabTier, damaged: Container[str], reader: Reader) -> str:
    outcome = "whole"
    try:
        found = reader.get(tier)
        if found != [Lookup.HIT] * len(found):
            outcome = "pages lost"
        tier.check(repair=True)
        report = tier.check()
        assert report.ok, report
        kept = reader.put(tier)
        assert any(kept), "nothing can be put"
        assert [lookup is Lookup.HIT for lookup in reader.get(tier)] == kept, "a page is not there"
        assert tier.check().ok, "putting pages broke it"
    except TierError as error:
        assert files.INDEX in damaged, f"{error}"
        outcome = f"error {error.reason.value}"
    if files.INDEX not in damaged and files.REGION not in damaged and head.FILE not in damaged:
        assert outcome == "whole", f"{outcome}, although pages and index are whole"
    return outcome
