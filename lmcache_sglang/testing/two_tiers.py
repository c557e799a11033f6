"""A chain of a store in memory over one on disk, opened in this process or in one that is to die."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Self

from ..storage.admission import Admission, All
from ..storage.base import Below
from ..storage.chain import Chain, Promotion
from ..storage.slab.opening import Place
from ..storage.slab.settings import SlabSettings
from ..storage.slab.tier import SlabTier
from .injection import injected
from .tier_suite import PAGE, ROOMY, EngineMemory, bytes_of

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

    def open(self) -> Chain:
        lower = None
        if self.disk is not None:
            lower = SlabTier(Place(self.disk, memory=False), self.lower_bytes, AT_ONCE)
        upper = None
        if self.memory is not None:
            place = Place(self.memory, True, "cpu.path", "cpu.size")
            below = self.admission.below(1 << 30, 1) if lower else Below.NEVER
            upper = SlabTier(place, self.upper_bytes, AT_ONCE, name="cpu", below=below)
        return Chain(upper, lower, admission=self.admission, promotion=self.promotion)

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
