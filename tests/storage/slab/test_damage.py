"""Whatever happens to a store's files: right bytes or none, no crash, and check repairs what is left."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_sglang.testing import crash_script, damage_trials
from lmcache_sglang.testing.damage_trials import KINDS, OLDER
from lmcache_sglang.testing.small_store import SmallStore, here, put
from lmcache_sglang.testing.store_process import Died, run

CAPACITY = 1 << 20
CASES = 5_000  # on each medium
AT_ONCE = 2
IN_A_PROCESS = 500


def populated(store: SmallStore) -> tuple[dict[str, bytes], list[int]]:
    """The files of a store, also as they were some changes ago; and the pages that are there."""
    crash_script.fill(store, 6)
    older = {OLDER + name: content for name, content in store.save().items()}
    with store.opened() as tier:
        put(tier, range(40, 60), [b""] * 20)
        numbers = sorted(here(tier, crash_script.NUMBERS))
    assert len(numbers) > 20
    return older | store.save(), numbers


@pytest.mark.parametrize("memory", [True, False])
def test_no_damage_gives_wrong_bytes_or_ends_the_process(shared_memory: Path, memory: bool) -> None:
    saved, numbers = populated(SmallStore(shared_memory / "sound", memory, CAPACITY))

    def work(part: int) -> Counter[str]:
        place, seen = shared_memory / str(part), Counter[str]()
        place.mkdir()
        store, last = SmallStore(place / "store", memory, CAPACITY), place / "last"
        for first in range(part * IN_A_PROCESS, CASES, AT_ONCE * IN_A_PROCESS):
            cases = range(first, first + IN_A_PROCESS)
            try:
                seen += run(damage_trials.try_cases, store, saved, numbers, cases, last)
            except Died as died:
                pytest.fail(f"case {last.read_text()} ended its process: {died}")
        return seen

    with ThreadPoolExecutor(AT_ONCE) as pool:
        seen = sum(pool.map(work, range(AT_ONCE)), Counter[str]())
    assert seen.total() == CASES
    assert {kind.partition(":")[0] for kind in seen} == set(KINDS)
