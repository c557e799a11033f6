"""Halves of a stage: nothing is read into one while it is copied from, and what goes wrong in a copy is heard of."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import pytest
import torch

from lmcache_sglang.vllm_connector import stage as stages
from lmcache_sglang.vllm_connector.stage import (
    HALVES,
    HUGE_PAGE,
    Copier,
    Copies,
    Stage,
    span_bytes,
    spans,
)


@pytest.fixture
def thread() -> Iterator[Copier]:
    made = Copier("copies")
    yield made
    made.close()


def test_halves_are_apart_and_lie_on_huge_pages() -> None:
    stage = Stage(3 * 1000, torch.device("cpu"))
    halves = [stage.records(half, 3, 1000) for half in range(HALVES)]
    assert all(half.data_ptr() % HUGE_PAGE == 0 for half in halves)
    for value, half in enumerate(halves, 1):
        half.fill_(value)
    assert [set(half.flatten().tolist()) for half in halves] == [{1}, {2}]
    assert stage.records(1, 2, 500).data_ptr() == halves[1].data_ptr(), "the same memory each time"


def test_a_half_is_given_out_again_only_when_it_was_copied_from(thread: Copier) -> None:
    goes_on, again = Event(), Event()
    with Copies(thread) as copies:
        assert copies.half() == 0
        copies.begin(lambda: goes_on.wait(30))
        assert copies.half() == 1
        copies.begin(lambda: None)

        def ask() -> None:
            assert copies.half() == 0
            again.set()

        asked = Thread(target=ask)
        asked.start()
        assert not again.wait(0.05)
        goes_on.set()
        assert again.wait(30)
        asked.join()


def test_the_end_waits_for_all_copies(thread: Copier) -> None:
    goes_on, copied = Event(), list[int]()
    thread.submit(lambda: goes_on.wait(30))
    with Copies(thread) as copies:
        copies.begin(lambda: copied.append(1))
        assert not copied
        goes_on.set()
    assert copied == [1]


def test_what_a_copy_raises_is_raised(thread: Copier) -> None:
    with pytest.raises(ZeroDivisionError), Copies(thread) as copies:
        copies.begin(lambda: divmod(1, 0))


def test_spans_are_runs_that_fit_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SPAN_BYTES", 3000)
    assert spans([0, 1, 2, 3, 5, 6, 9], 1000) == [range(3), range(3, 4), range(5, 7), range(9, 10)]
    assert spans([0, 1], 5000) == [range(1), range(1, 2)], "a page is never cut"
    assert (span_bytes(1000), span_bytes(1001), span_bytes(5000)) == (3000, 2002, 5000)
