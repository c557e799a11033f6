"""Weights replaced while the engine serves find none of the pages of those before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import Answer, Setup, ask, flush, prompt, server
from lmcache_sglang.testing.server import ServerRefused, SGLangServer
from lmcache_sglang.testing.tiny_model import make_tiny_llama

FIRST = prompt(1)


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
def answers(engine: SGLangServer, model: Path, other: Path) -> dict[str, Answer]:
    """The same prompt before an update, after it, and after the way back.

    Each update comes while the pages before it may still be on their way to the store.
    """
    found = {"before": ask(engine, FIRST)}
    update(engine, other)
    found["after"] = ask(engine, FIRST)
    update(engine, model)
    found["back"] = ask(engine, FIRST)
    return found


def update(engine: SGLangServer, model: Path) -> None:
    """SGLang refuses to flush while pages are being stored, and says to ask again."""
    try:
        engine.post("/update_weights_from_disk", {"model_path": str(model)})
    except ServerRefused as refusal:
        assert "the cache was not flushed" in refusal.body
    flush(engine)


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
