"""Engines that differ in anything that matters share a directory and no page."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    pages_on_disk,
    prompt,
    server,
    whole_pages,
)
from lmcache_sglang.testing.tiny_model import make_tiny_llama

FIRST = prompt(1)
POOL = ("--max-total-tokens", "2048")


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    return folder / "store"


@pytest.fixture(scope="module")
def first(model: Path, folder: Path, store: Path) -> Answer:
    setup = Setup(store, args=POOL)
    with server(model, setup, folder / "first.log") as engine:
        answer = ask(engine, FIRST)
    assert pages_on_disk(setup) >= len(FIRST) // setup.page_size
    return answer


def test_other_weights_under_the_same_name_never_share(
    folder: Path, store: Path, first: Answer
) -> None:
    """The same path would do too: only the bytes of the weights tell the two apart."""
    other = make_tiny_llama(folder / "other", seed=2, dtype="float32")
    with server(other, Setup(store, args=POOL), folder / "other.log") as engine:
        answer = ask(engine, FIRST)
    assert answer.storage == 0
    assert answer.tokens != first.tokens


def test_another_dtype_never_shares(model: Path, folder: Path, store: Path, first: Answer) -> None:
    setup = Setup(store, args=[*POOL, "--dtype", "bfloat16"])
    with server(model, setup, folder / "bfloat16.log") as engine:
        assert ask(engine, FIRST).storage == 0


def test_another_page_size_never_shares(
    model: Path, folder: Path, store: Path, first: Answer
) -> None:
    with server(model, Setup(store, args=POOL, page_size=32), folder / "page32.log") as engine:
        answer = ask(engine, FIRST)
        log = engine.log
    assert answer.storage == 0
    assert answer.tokens == first.tokens
    assert "cannot be read here: page_size 16, here 32" in log


def test_the_same_model_elsewhere_shares(folder: Path, store: Path, first: Answer) -> None:
    """The control: it is not the path that told the others apart."""
    copy = make_tiny_llama(folder / "copy", seed=1, dtype="float32")
    with server(copy, Setup(store, args=POOL), folder / "copy.log") as engine:
        answer = ask(engine, FIRST)
    assert answer.storage == whole_pages(FIRST)
    assert answer.tokens == first.tokens
