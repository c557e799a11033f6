"""What a process does to a store until it is killed, and how the store is looked at afterwards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..storage.base import Lookup
from ..storage.slab.tier import SlabTier
from .injection import Signalled, injected
from .small_store import SmallStore, get, here, key_of, put
from .tier_suite import OTHER_NAMESPACE

NUMBERS = range(80)
FRESH = range(900, 905)  # put by `look`, to see that putting works

Operation = tuple[str, list[int]]


def operations(seed: int) -> Iterator[Operation]:
    """Changes of every kind, the first of them each once; without end."""
    rng = random.Random(seed)
    kinds = ["put", "remove", "chain", "get", "pin", "clear", "quota", "repair"]
    first = iter(kinds)
    while True:
        kind = next(first, None) or rng.choices(kinds, [8, 3, 6, 2, 2, 1, 1, 1])[0]
        yield kind, rng.sample(NUMBERS, rng.randint(1, 8))


def apply(tier: SlabTier, operation: Operation) -> None:
    kind, numbers = operation
    keys = [key_of(number) for number in numbers]
    match kind:
        case "put":
            put(tier, numbers, [b""] * len(numbers))
        case "chain":
            put(tier, numbers)
        case "remove":
            tier.remove(keys)
        case "get":
            get(tier, numbers)
        case "pin":
            tier.pin(keys[:2], 3600 * (numbers[0] % 2))
        case "clear":
            tier.clear(OTHER_NAMESPACE)
        case "quota":
            tier.set_quota(OTHER_NAMESPACE, (numbers[0] % 3) * (256 << 10))
        case "repair":
            tier.check(repair=True)


@dataclass(frozen=True, slots=True)
class Log:
    """What a process told of its operations before it was killed: files, which outlive it."""

    path: Path

    def begin(self, operation: Operation) -> None:
        self.path.write_bytes(b"")
        self.intend(operation)

    def intend(self, operation: Operation) -> None:
        """An operation is about to be done."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(operation))
        new.replace(self.path.with_suffix(".intent"))

    def tell(self, state: Iterable[int]) -> None:
        """An operation has returned, and these pages were there then."""
        with self.path.open("ab") as file:
            file.write(json.dumps(sorted(state)).encode() + b"\n")

    def intent(self) -> Operation:
        """What a killed process was at, or had just done."""
        kind, numbers = json.loads(self.path.with_suffix(".intent").read_text())
        return kind, numbers

    def states(self) -> list[set[int]]:
        lines = self.path.read_bytes().split(b"\n")[:-1]  # the last one may have been cut off
        return [set(json.loads(line)) for line in lines]


def run(store: SmallStore, script: list[Operation], log: Log, dies_at: int = 0) -> int:
    """Do the operations; be killed at that step. Returns: the number of steps, when it was not."""
    hook = Signalled(dies_at)
    with injected(hook), store.opened() as tier:
        log.tell(here(tier, NUMBERS))
        for operation in script:
            apply(tier, operation)
            log.tell(here(tier, NUMBERS))
    return hook.seen


@dataclass(frozen=True, slots=True)
class Seen:
    """A store, as the next process finds it."""

    here: set[int]
    not_whole: set[int]  # of these
    problems: list[str]
    reserved: int
    works: bool  # new pages can be put, and read back


def look(store: SmallStore) -> Seen:
    with store.opened() as tier:
        tier.sweep()
        report = tier.check()
        found = sorted(here(tier, NUMBERS))
        outcome = get(tier, found)
        whole = {n for n, lookup in zip(found, outcome, strict=True) if lookup is Lookup.HIT}
        reserved = tier.counts()["reserved"]
        kept = [stored.kept for stored in put(tier, FRESH, [b""] * len(FRESH))]
        back = [lookup is Lookup.HIT for lookup in get(tier, FRESH)]
        return Seen(
            here=set(found),
            not_whole=set(found) - whole,
            problems=[*report.problems, *(f"corrupt: {key.hex()}" for key in report.corrupt)],
            reserved=reserved,
            works=kept == back and any(kept) and tier.check().ok,
        )


def fill(store: SmallStore, seed: int) -> None:
    """A store in the middle of its life: pages of all sizes, chains, orphans, pins, and evictions."""
    script = operations(seed)
    with store.opened() as tier:
        for _ in range(40):
            apply(tier, next(script))
        tier.set_quota(OTHER_NAMESPACE, 0)


def work_for_ever(store: SmallStore, seed: int, log: Log) -> None:
    """Change things until killed; without quotas, so that a roomy store evicts nothing."""
    with store.opened() as tier:
        for operation in operations(seed):
            if operation[0] == "quota":
                continue
            log.intend(operation)
            apply(tier, operation)
            log.tell(here(tier, NUMBERS))


def changed_by(operation: Operation) -> tuple[set[int], set[int]]:
    """The pages that an operation may remove, and those that it may add."""
    kind, numbers = operation
    match kind:
        case "put" | "chain":
            return set(), set(numbers)
        case "remove":
            return set(numbers), set()
        case "clear":
            return {n for n in NUMBERS if key_of(n).startswith(OTHER_NAMESPACE)}, set()
    return set(), set()
