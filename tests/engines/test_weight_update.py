"""Weights replaced while the engine serves find none of the pages of those before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Answer, Setup, ask, pages_on_disk, prompt, server, until
from lmcache_sglang.testing.server import SGLangServer
from lmcache_sglang.testing.tiny_model import make_tiny_llama

FIRST = prompt(1)
PAGES = len(FIRST) // 16


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return make_tiny_llama(folder / "other", seed=2, dtype="float32")


@pytest.fixture(scope="module")
def setup(folder: Path) -> Setup:
    return Setup(folder / "store", args=["--max-total-tokens", "2048"])


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, setup: Setup) -> Iterator[SGLangServer]:
    with server(model, setup, folder / "updated.log") as running:
        yield running


@pytest.fixture(scope="module")
def answers(engine: SGLangServer, setup: Setup, model: Path, other: Path) -> dict[str, Answer]:
    """The same prompt before an update, after it, and after the way back; each time stored."""
    found = {"before": ask(engine, FIRST)}
    until(lambda: pages_on_disk(setup) >= PAGES)
    update(engine, other)
    found["after"] = ask(engine, FIRST)
    until(lambda: pages_on_disk(setup) >= 2 * PAGES)
    update(engine, model)
    found["back"] = ask(engine, FIRST)
    return found


def update(engine: SGLangServer, model: Path) -> None:
    assert engine.post("/update_weights_from_disk", {"model_path": str(model)})["success"]


def test_new_weights_never_get_the_old_ones_pages(answers: dict[str, Answer]) -> None:
    assert answers["after"].storage == 0
    assert answers["after"].tokens != answers["before"].tokens


def test_the_way_back_trusts_nothing_either(answers: dict[str, Answer]) -> None:
    assert answers["back"].storage == 0
    assert answers["back"].tokens == answers["before"].tokens


def test_pages_of_replaced_weights_are_for_no_later_engine(
    folder: Path, setup: Setup, engine: SGLangServer, other: Path, answers: dict[str, Answer]
) -> None:
    """The last test of this file: it stops the server. The next one has the other weights' files."""
    engine.stop()
    with server(other, setup, folder / "later.log") as later:
        answer = ask(later, FIRST)
    assert answer.storage == 0
    assert answer.tokens == answers["after"].tokens
