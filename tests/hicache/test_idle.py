"""Records in the order in which they may give way, beside a list that is kept in that order."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lmcache_sglang.hicache.idle import Idle


def array(slots: list[int]) -> np.ndarray:
    return np.array(slots, np.int64)


@pytest.mark.parametrize("records", [1, 7, 40, 9000])
def test_the_oldest_is_taken_first_however_often_records_come_and_go(records: int) -> None:
    rng = random.Random(records)
    idle, expected = Idle(records), list(range(records))
    held: list[int] = []
    for _ in range(400):
        wanted = rng.randint(0, records)
        match rng.choice(["take", "remove", "add", "add first"]):
            case "take":
                taken = idle.take(wanted).tolist()
                assert taken == expected[:wanted]
                expected = expected[wanted:]
                held += taken
            case "remove":
                chosen = set(rng.sample(range(records), wanted))
                idle.remove(array(list(chosen)))
                held += [slot for slot in expected if slot in chosen]
                expected = [slot for slot in expected if slot not in chosen]
            case "add":
                rng.shuffle(held)
                back, held = held[:wanted], held[wanted:]
                idle.add(array(back))
                expected += back
            case "add first" if expected:  # directly after a take there is room for what was taken
                taken = idle.take(wanted).tolist()
                back = taken[::2]
                idle.add(array(back), first=True)
                expected = back + expected[wanted:]
                held += taken[1::2]
    assert idle.take(records).tolist() == expected


def test_filled_anew_all_are_idle() -> None:
    idle = Idle(5)
    idle.take(3)
    idle.remove(array([4]))
    idle.fill()
    assert idle.take(9).tolist() == [0, 1, 2, 3, 4]
