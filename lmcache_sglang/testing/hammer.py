"""One of several processes that use a store at once, as hard as they can, and check all that they see."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Set as AbstractSet
from ctypes import string_at
from dataclasses import dataclass, field

from ..errors import ConfigError, Reason, TierError
from ..storage.base import Lookup
from ..storage.slab.tier import SlabTier
from .injection import Flaky, Signalled, injected
from .small_store import SmallStore, get, here, key_of, page_of, put
from .tier_suite import OTHER_NAMESPACE

KINDS = ["put", "chain", "get", "exists", "show", "remove", "pin", "clear", "quota", "sweep"]
WEIGHTS = [8, 8, 16, 4, 4, 3, 2, 0.2, 0.2, 0.5]
MOST = 8  # pages of a batch


@dataclass
class Done:
    operations: int = 0
    slowest: float = 0.0  # seconds
    busy: int = 0  # operations that got no lock in time
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # operations that failed, by reason


def run(store: SmallStore, seed: int, seconds: float, numbers: range = range(120)) -> Done:
    """Raises: AssertionError, when a page is not the page of its key, or corrupt."""
    end = time.monotonic() + seconds
    with store.opened() as tier:
        return _work(tier, random.Random(seed), end, numbers, {Lookup.HIT, Lookup.MISS})


def run_flaky(
    store: SmallStore, seed: int, seconds: float, share: float, numbers: range = range(120)
) -> Done:
    """As `run`, but that share of its steps fail, those of opening the store too.

    Raises: AssertionError; TierError, for what no step that failed explains.
    """
    end, rng = time.monotonic() + seconds, random.Random(seed)
    flaky = Flaky(share, random.Random(seed))
    with injected(flaky):
        tier = _open_until(end, store)
        allowed = {Lookup.HIT, Lookup.MISS, Lookup.FAILED, Lookup.LATE}
        done = _work(tier, rng, end, numbers, allowed, {Reason.IO, Reason.FULL})
    tier.sweep()  # gives back what an error kept it from giving back
    tier.close()
    assert flaky.failed > 0, "no step failed"
    return done


def _open_until(end: float, store: SmallStore) -> SlabTier:
    while True:
        try:
            return store.open()
        except ConfigError:
            if time.monotonic() > end:
                raise


def _work(
    tier: SlabTier,
    rng: random.Random,
    end: float,
    numbers: range,
    found: AbstractSet[Lookup],
    errors: AbstractSet[Reason] = frozenset(),
) -> Done:
    """Args: found, errors: what may come of it."""
    done = Done()
    while time.monotonic() < end:
        started = time.monotonic()
        try:
            _step(tier, rng, numbers, done, found)
        except TierError as error:
            if error.reason is Reason.BUSY:
                done.busy += 1
            elif error.reason in errors:
                done.errors[error.reason.value] += 1
            else:
                raise
        done.operations += 1
        done.slowest = max(done.slowest, time.monotonic() - started)
    return done


def _step(
    tier: SlabTier, rng: random.Random, numbers: range, done: Done, found: AbstractSet[Lookup]
) -> None:
    """One operation, chosen at random."""
    some = rng.sample(numbers, rng.randint(1, MOST))
    keys = [key_of(number) for number in some]
    match rng.choices(KINDS, WEIGHTS)[0]:
        case "put":
            parents = [rng.choice([b"", key_of(rng.choice(numbers))]) for _ in some]
            done.outcomes.update(stored.value for stored in put(tier, some, parents))
        case "chain":
            done.outcomes.update(stored.value for stored in put(tier, sorted(some)))
        case "get":
            outcome = get(tier, some)
            assert set(outcome) <= found, outcome
            done.outcomes.update(lookup.value for lookup in outcome)
        case "exists":
            here(tier, some)
        case "show":
            _show(tier, some, rng.sample(numbers, MOST))
        case "remove":
            tier.remove(keys[:2])
        case "pin":
            tier.pin(keys[:2], rng.choice([0, 0, 1]))
        case "clear":
            tier.clear(OTHER_NAMESPACE)
        case "quota":
            tier.set_quota(OTHER_NAMESPACE, rng.choice([0, 200_000]))
        case "sweep":
            tier.sweep()


def _show(tier: SlabTier, numbers: list[int], others: list[int]) -> None:
    """Pages stay as they are in their places, whatever comes into the store and goes meanwhile."""
    pages = [page_of(number) for number in numbers]
    shown = tier.show([key for key, _ in pages], [len(content) for _, content in pages])
    try:
        for _ in range(2):
            for place, address, _ in shown.pages:
                assert string_at(address, len(pages[place][1])) == pages[place][1]
            put(tier, others, [b""] * len(others))
    finally:
        tier.unshow(shown)


def put_all(store: SmallStore, numbers: list[int]) -> list[str]:
    with store.opened() as tier:
        return [stored.value for stored in put(tier, numbers, [b""] * len(numbers))]


def put_and_stop(store: SmallStore, numbers: list[int], step: str) -> list[str]:
    """As `put_all`, but a SIGSTOP comes at the first step of that name."""
    with store.opened() as tier, injected(Signalled(1, signal.SIGSTOP, step)):
        return [stored.value for stored in put(tier, numbers, [b""] * len(numbers))]


def check_for_ever(store: SmallStore) -> None:
    with store.opened() as tier:
        while True:
            tier.check()
