"""What a process does to a store until it is killed, or while steps fail, and how the store is looked at
afterwards."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, Reason, TierError
from ..storage.base import Lookup
from ..storage.slab import opening
from ..storage.slab.tier import SlabTier
from .injection import FailingAt, Signalled, injected, killed_at_file_call
from .small_store import SmallStore, get, here, key_of, put
from .tier_suite import OTHER_NAMESPACE

NUMBERS = range(80)
FRESH = range(900, 905)  # put by `look`, to see that putting works

Operation = tuple[str, list[int]]
Errors = Mapping[int, int]  # number of a step -> what it fails with

_probe_in_a_process = opening._probe  # as it is before a job puts a quicker one there


def operations(seed: int) -> Iterator[Operation]:
    """Changes of every kind, the first of them each once; without end."""
    rng = random.Random(seed)
    kinds = ["put", "remove", "chain", "get", "pin", "clear", "quota", "repair"]
    first = iter(kinds)
    while True:
        kind = next(first, None) or rng.choices(kinds, [8, 3, 6, 2, 2, 1, 1, 1])[0]
        yield kind, rng.sample(NUMBERS, rng.randint(1, 8))


def apply(tier: SlabTier, operation: Operation) -> None:
    """Checked: what is said of each page is true, and none is corrupt."""
    kind, numbers = operation
    keys = [key_of(number) for number in numbers]
    match kind:
        case "put":
            _put(tier, numbers, [b""] * len(numbers))
        case "chain":
            _put(tier, numbers, None)
        case "remove":
            tier.remove(keys)
        case "get":
            assert Lookup.CORRUPT not in get(tier, numbers)
        case "pin":
            tier.pin(keys[:2], 3600 * (numbers[0] % 2))
        case "clear":
            tier.clear(OTHER_NAMESPACE)
        case "quota":
            tier.set_quota(OTHER_NAMESPACE, (numbers[0] % 3) * (256 << 10))
        case "repair":
            assert not tier.check(repair=True).corrupt


def _put(tier: SlabTier, numbers: Sequence[int], parents: Sequence[bytes] | None) -> None:
    outcome = put(tier, numbers, parents)
    kept = {n for n, stored in zip(numbers, outcome, strict=True) if stored.kept}
    assert kept == here(tier, numbers)


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
        return look_at(tier)


def look_at(tier: SlabTier) -> Seen:
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


def go_on_despite(
    store: SmallStore, saved: dict[str, bytes], script: list[Operation], trials: list[Errors]
) -> list[list[str]]:
    """Do all the operations anew for each trial, while those steps of it fail.

    Returns: the names of the steps that each of them had.
    Raises: AssertionError, naming the trial.
    """
    steps = []
    for errors in trials:
        store.restore(saved)
        try:
            steps.append(_go_on_despite(store, script, errors))
        except AssertionError as error:
            raise AssertionError(f"when these steps fail: {errors}: {error}") from error
    return steps


def _go_on_despite(store: SmallStore, script: list[Operation], errors: Errors) -> list[str]:
    hook = FailingAt(errors)
    with injected(hook):
        tier = open_despite_errors(store, len(errors))
        for operation in script:
            try:
                apply(tier, operation)
            except TierError as error:
                assert error.reason in (Reason.IO, Reason.FULL), f"{operation}: {error}"
    try:
        require_whole(look_at(tier))
    finally:
        tier.close()
    require_whole(look(store))
    return hook.names


def open_despite_errors(store: SmallStore, most: int) -> SlabTier:
    """Again after each error, as many as there may be."""
    for _ in range(most):
        try:
            return store.open()
        except ConfigError:
            continue
    return store.open()


def require_whole(seen: Seen) -> None:
    assert (seen.problems, seen.not_whole, seen.reserved, seen.works) == ([], set(), 0, True), seen


@dataclass(frozen=True, slots=True)
class Opening:
    """What it took to open a store."""

    calls: int  # that changed files
    steps: int
    seconds: float


def open_and_be_killed(
    store: SmallStore, *, at_call: int = 0, at_step: int = 0, after: float = 0.0
) -> Opening:
    """Args: when to be killed: at a call that changes files, at a step, or after seconds. 0: not so."""
    _compact_in_a_process()
    if after:  # its default action ends a process as SIGKILL does, and the kernel keeps the time
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, after)
        store.open()
        return Opening(0, 0, 0.0)
    started, hook = time.monotonic(), Signalled(at_step)
    with injected(hook), killed_at_file_call(at_call) as calls:
        store.open()
        return Opening(calls(), hook.seen, time.monotonic() - started)


def look_resizing(store: SmallStore) -> Seen:
    """As `look`, where it has another size than before."""
    _compact_in_a_process()
    return look(store)


def _compact_in_a_process() -> None:
    """The fork that jobs look at an index from cannot make one smaller; what they had before can."""
    look_in_a_fork = opening._probe

    def probe(task: str, index: Path, argument: str, keep: Sequence[int] = ()) -> dict[str, str]:
        if task == "look":
            return look_in_a_fork(task, index, argument)
        return _probe_in_a_process(task, index, argument, keep)

    opening._probe = probe


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
