"""Damage to a store's control block under the hands of a process that has it open."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from ..errors import TierError
from ..storage.slab import files
from ..storage.slab.plan import BLOCK
from ..storage.slab.tier import SlabTier
from .small_store import OWN_NAMESPACE, SmallStore, get, put

# Ranges of the block (csrc/control.hpp): counters and the list of what waits; the classes; all that follows the
# header. Not what is read only when a store is opened, and not the mutex, which is glibc's.
COUNTERS = range(96, 176)
CLASSES = range(216, 3096)
AFTER_HEADER = 4096

SLOT_BYTES = 64
PREV = 40  # of a slot's neighbour towards newer ones

ROUNDS = 6  # of use after each damage


def use_while_damaged(store: SmallStore, numbers: Sequence[int], seeds: Sequence[int]) -> int:
    """Scribble, then put and get; how many calls said that the store is damaged. Wrong bytes raise."""
    told = 0
    for seed in seeds:
        rng = random.Random(seed)
        with store.opened() as tier:
            put(tier, numbers[: len(numbers) // 2])
            _scribble(tier, rng)
            for _ in range(ROUNDS):
                told += _use(tier, rng.sample(list(numbers), 5))
        with store.opened() as again:  # who comes first makes it anew
            get(again, numbers)
            again.remove(again.check().corrupt)
            assert again.check().ok
    return told


def put_against_a_circle(store: SmallStore) -> str:
    """Each slot's neighbour becomes itself; then a quota makes a put walk a list. What the put raised."""
    others, own = [3, 7, 11, 15], [0, 1, 2, 4, 5, 6]  # of the other namespace, and of this one
    with store.opened() as tier:
        put(tier, others, [b""] * len(others))
        put(tier, own, [b""] * len(own))
        tier.set_quota(OWN_NAMESPACE, tier.stats().bytes // 2)
        _tie(tier)
        try:
            put(tier, [8, 9, 10])
        except TierError as error:
            return error.detail
    return ""


def _tie(tier: SlabTier) -> None:
    plan = tier.head.plan
    file = os.open(tier.directory / files.CONTROL, os.O_RDWR)
    try:
        slots = plan.slabs * plan.slots_per_slab
        first = plan.control_bytes - -(-slots * SLOT_BYTES // BLOCK) * BLOCK
        for number in range(slots):
            os.pwrite(file, number.to_bytes(4, "little"), first + number * SLOT_BYTES + PREV)
    finally:
        os.close(file)


def _use(tier: SlabTier, numbers: list[int]) -> int:
    told = 0
    for call in (put, get):
        try:
            call(tier, numbers)
        except TierError:
            told += 1
    return told


def _scribble(tier: SlabTier, rng: random.Random) -> None:
    file = os.open(tier.directory / files.CONTROL, os.O_RDWR)
    try:
        size = os.fstat(file).st_size
        place = rng.choice([COUNTERS, CLASSES, range(AFTER_HEADER, size)])
        for _ in range(rng.randint(1, 8)):
            length = rng.choice([1, 4, 8, 64])
            start = rng.randrange(place.start, place.stop - length)
            content = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
            os.pwrite(file, content, start)
    finally:
        os.close(file)
