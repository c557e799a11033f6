"""A pass of the scheduler: what ranks agree on, and how often they talk."""

from __future__ import annotations

import pytest
import torch

from lmcache_sglang.hicache.admission import Pass


class Rank:
    def __init__(self, ready: set[str]) -> None:
        self.ready = ready
        self.said: list[tuple[str, str]] = []

    def is_ready(self, rid: str) -> bool:
        return rid in self.ready

    def held_up(self, rid: str) -> None:
        self.said.append(("held up", rid))

    def goes_on(self, rid: str) -> None:
        self.said.append(("goes on", rid))


def pass_of(rank: Rank, others: list[Rank], queue: list[str], talks: list[int]) -> Pass:
    def agree(answers: torch.Tensor) -> None:
        talks.append(len(answers))
        for other in others:
            theirs = torch.tensor([other.is_ready(rid) for rid in queue], dtype=torch.int)
            torch.minimum(answers, theirs, out=answers)

    return Pass(rank, lambda: list(queue), agree)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_goes_on_where_it_is_ready_on_all_ranks(rank: int) -> None:
    ranks = [Rank({"a", "b"}), Rank({"b", "c"})]
    talks: list[int] = []
    one = pass_of(ranks[rank], ranks, ["a", "b", "c"], talks)
    assert [one.may_go(rid) for rid in ("a", "b", "c")] == [False, True, False]
    assert ranks[rank].said == [("held up", "a"), ("goes on", "b"), ("held up", "c")]
    assert talks == [3]  # once for all


def test_only_who_is_reached_is_told_and_nobody_talks_where_nobody_is_asked() -> None:
    rank, talks, queue = Rank(set()), list[int](), ["a", "b"]
    one = pass_of(rank, [], queue, talks)
    assert talks == []
    queue.append("joined late")
    assert not one.may_go("joined late")
    assert rank.said == [("held up", "joined late")]
    assert talks == [3]


def test_a_request_that_nobody_knows_goes_on() -> None:
    assert pass_of(Rank(set()), [], ["a"], []).may_go("another")
