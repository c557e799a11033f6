"""What the lower tier is to get of a batch, by each policy."""

from __future__ import annotations

import pytest

from lmcache_sglang.storage.admission import Admission, All, MinimumPrefix, SecondTouch
from lmcache_sglang.storage.base import Below


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (All(), Below.NOW),
        (All("write-through"), Below.NOW),
        (All("write-back"), Below.ON_EVICT),
        (SecondTouch(), Below.ON_TOUCH),
    ],
    ids=str,
)
def test_a_policy_without_a_length_treats_all_batches_alike(
    policy: Admission, wanted: Below
) -> None:
    assert {policy.below(position, 1) for position in (0, 1, 10_000)} == {wanted}


@pytest.mark.parametrize("then", [All(), All("write-back"), SecondTouch()], ids=str)
@pytest.mark.parametrize(
    ("position", "pages", "long_enough"),
    [(0, 1, False), (0, 7, False), (0, 8, True), (3, 4, False), (3, 5, True), (8, 1, True)],
)
def test_a_chain_counts_from_its_start_and_not_from_the_batch(
    then: Admission, position: int, pages: int, long_enough: bool
) -> None:
    policy = MinimumPrefix(8, then)
    wanted = then.below(position, pages) if long_enough else Below.LATER
    assert policy.below(position, pages) is wanted


def test_only_a_policy_that_takes_all_holds_nothing_back() -> None:
    """What is held back is not written by a close either."""
    holds = [policy.holds_back for policy in (All(), SecondTouch(), MinimumPrefix(2, All()))]
    assert holds == [False, True, True]
