"""A chain of a store in memory over one on disk, opened in this process or in one that is to die."""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Self

from ..storage.admission import Admission, All
from ..storage.base import Below, OuterTier
from ..storage.chain import Chain, Promotion
from ..storage.slab.opening import Place
from ..storage.slab.settings import SlabSettings
from ..storage.slab.tier import SlabTier
from .crash_script import Log
from .injection import Signalled, injected
from .small_store import OWN_NAMESPACE, SmallStore
from .tier_suite import PAGE, ROOMY, EngineMemory, a_key, bytes_of

SOON = 30.0  # seconds: longer than anything here takes, shorter than a person waits
AT_ONCE = SlabSettings(engine="threads")  # without a measurement at each start


@dataclass(frozen=True, slots=True)
class TwoTiers:
    """Where the tiers lie and how they are opened. None: there is no such tier."""

    memory: Path | None
    disk: Path | None
    upper_bytes: int = ROOMY
    lower_bytes: int = ROOMY
    admission: Admission = field(default_factory=All)
    promotion: Promotion = "always"

    def open(self, peers: OuterTier | None = None) -> Chain:
        lower = None
        if self.disk is not None:
            lower = SlabTier(Place(self.disk, memory=False), self.lower_bytes, AT_ONCE)
        upper = None
        if self.memory is not None:
            place = Place(self.memory, True, "cpu.path", "cpu.size")
            below = self.admission.below(1 << 30, 1) if lower else Below.NEVER
            upper = SlabTier(place, self.upper_bytes, AT_ONCE, name="cpu", below=below)
        return Chain(upper, lower, admission=self.admission, promotion=self.promotion, peers=peers)

    def files(self) -> list[SmallStore]:
        """To save and to restore them."""
        assert self.memory is not None and self.disk is not None
        upper = SmallStore(self.memory, True, self.upper_bytes)
        return [upper, SmallStore(self.disk, False, self.lower_bytes)]

    def but(self, **changed: object) -> Self:
        return replace(self, **changed)  # type: ignore[arg-type]


def put(
    chain: Chain, keys: Sequence[bytes], *, parent: bytes = b"", position: int = 0
) -> list[bool]:
    """`Chain.put`, checked: what it says is true."""
    memory = EngineMemory([bytes_of(key) for key in keys], 2)
    kept = chain.put(keys, memory.segments, parent=parent, position=position)
    assert chain.exists(keys) == kept
    return kept


def get(chain: Chain, keys: Sequence[bytes], *, parent: bytes = b"") -> list[bool]:
    """`Chain.get`, checked: a hit is the page of its key, and nothing beside the pages is touched."""
    memory = EngineMemory.blank([PAGE] * len(keys), 3)
    held = chain.get(keys, memory.segments, parent=parent)
    for i, key in enumerate(keys):
        assert not held[i] or memory.page(i) == bytes_of(key)
    assert memory.guards_hold()
    return held


@dataclass
class Held:
    """A hook of `injected`: steps of one name wait until they are let go."""

    name: str = "flush"
    reached: Event = field(default_factory=Event)
    may_pass: Event = field(default_factory=Event)

    def __call__(self, name: str, offset: int, size: int) -> int:
        if name == self.name:
            self.reached.set()
            assert self.may_pass.wait(2 * SOON), "nobody let go of this step"
        return 0


# Jobs of store_process.py. Each says by a file that it is where it is to be killed.


def put_and_hang_in_a_flush(tiers: TwoTiers, keys: Sequence[bytes], here: Path) -> None:
    """All pages are in memory, some are being written to the disk, none is there."""
    held = Held()
    with injected(held):
        chain = tiers.open()
        put(chain, keys)
        assert held.reached.wait(SOON)
        here.touch()
        time.sleep(2 * SOON)


def keep_open(tiers: TwoTiers, here: Path, child: Path | None = None) -> None:
    """With the background work in hand, if it is free. Args: child: gets the id of a forked process."""
    chain = tiers.open()
    keeper = chain._keeper
    assert keeper is not None
    if child is not None:
        assert keeper.elected.wait(SOON)
        pid = os.fork()
        if pid == 0:
            time.sleep(2 * SOON)
            os._exit(0)
        child.write_text(str(pid))
    here.touch()
    time.sleep(2 * SOON)


def put_and_close(tiers: TwoTiers, keys: Sequence[bytes], timeout: float) -> list[bool]:
    chain = tiers.open()
    kept = put(chain, keys)
    chain.close(timeout)
    return kept


def put_and_flush(tiers: TwoTiers, keys: Sequence[bytes]) -> bool:
    chain = tiers.open()
    put(chain, keys)
    done = chain.flush(SOON)
    chain.close()
    return done


PART = 6  # pages of a put


def promote_put_and_flush(
    tiers: TwoTiers, below: Sequence[int], new: Sequence[int], log: Log, dies_at: int = 0
) -> int:
    """What a chain does in its life; told is what was stored. On whatever thread step `dies_at` is, it is
    the last one. Returns: the number of steps, when it was not killed."""
    hook = Signalled(dies_at)
    with injected(hook):
        chain = tiers.open()
        get(chain, keys_of(below))
        for start in range(0, len(new), PART):
            _put_and_tell(chain, new[start : start + PART], log)
        assert chain.flush(SOON)
        chain.close()
    return hook.seen


def work_for_ever(tiers: TwoTiers, seed: int, numbers: Sequence[int], log: Log) -> None:
    """Put, get and clear until killed; told is what was stored since the last clear, and intended is that."""
    chain, rng = tiers.open(), random.Random(seed)
    log.tell([])
    while True:
        first = rng.randrange(len(numbers) - PART)
        some = numbers[first : first + rng.randint(1, PART)]
        match rng.choices(["put", "get", "clear"], [10, 5, 1])[0]:
            case "put":
                _put_and_tell(chain, some, log)
            case "get":
                get(chain, keys_of(some))
            case "clear":
                log.intend(("clear", []))
                chain.clear(OWN_NAMESPACE)
                log.begin(("cleared", []))


def _put_and_tell(chain: Chain, numbers: Sequence[int], log: Log) -> None:
    kept = put(chain, keys_of(numbers), parent=a_key(numbers[0] - 1) if numbers[0] else b"")
    log.tell(_those(numbers, kept))


def keys_of(numbers: Iterable[int]) -> list[bytes]:
    return [a_key(number) for number in numbers]


def _those(numbers: Sequence[int], chosen: Sequence[bool]) -> set[int]:
    return {number for number, is_it in zip(numbers, chosen, strict=True) if is_it}


@dataclass(frozen=True, slots=True)
class Left:
    """A chain as its next process found it, and what its keeper made of it."""

    here: set[int]  # before anything was done
    held: set[int]  # read back after that, byte for byte
    below: set[int]  # in the lower tier
    alone: set[int]  # read back from the lower tier, without the upper one
    problems: list[str]
    reserved: int
    waiting: tuple[int, int]
    faults: dict[str, int]


def take_over(tiers: TwoTiers, numbers: Sequence[int], *, asked: bool) -> Left:
    """Open what a killed process left, and let the keeper finish.

    Args:
        asked: to write all that is not below; else it finds what waits by itself.
    """
    keys = keys_of(numbers)
    chain = tiers.open()
    here = _those(numbers, chain.exists(keys))
    finish(chain, asked=asked)
    below = _those(numbers, chain.tiers[1].exists(keys))
    held = _those(numbers, get(chain, keys))
    reports = chain.check()
    left = Left(
        here=here,
        held=held,
        below=below,
        alone=set(),
        problems=[
            f"{name}: {what}"
            for name, report in reports.items()
            for what in (*report.problems, *(f"corrupt: {key.hex()}" for key in report.corrupt))
        ],
        reserved=reserved(chain),
        waiting=chain.waiting(),
        faults=chain.faults.counts(),
    )
    chain.close()
    lower = tiers.but(memory=None).open()
    alone = _those(numbers, get(lower, keys))
    lower.close()
    return replace(left, alone=alone)


def finish(chain: Chain, *, asked: bool) -> None:
    """Return when the keeper of this process has the work, and nothing waits any more."""
    keeper = chain._keeper
    assert keeper is not None
    assert keeper.elected.wait(SOON), "nobody took over"
    assert keeper.flush(SOON, held_back=asked), f"pages still wait: {chain.waiting()}"


def reserved(chain: Chain) -> int:
    """Slots of both tiers that are being written, or held by who died."""
    tiers = [tier for tier in chain.tiers if isinstance(tier, SlabTier)]
    for tier in tiers:
        tier.sweep()
    return sum(tier.counts()["reserved"] for tier in tiers)


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock of the keeper's kind on a file."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
