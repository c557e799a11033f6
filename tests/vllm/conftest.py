"""The real vLLM on CPU, in its own environment. Each start costs 10 to 30 seconds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from lmcache_sglang.testing import vllm

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(autouse=True, scope="session")
def installed() -> None:
    if not vllm.PYTHON.exists():
        pytest.fail(f"there is no {vllm.PYTHON}; `make venv-vllm` makes it")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 500) for _ in range(length)] for length in (600, 200, 333)]


@pytest.fixture(scope="session")
def plain(
    model: Path, prompts: Sequence[Sequence[int]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What vLLM answers to the prompts without a store."""
    log = tmp_path_factory.mktemp("plain") / "vllm.log"
    (answers,) = vllm.run(vllm.Setup(model, store=None), vllm.generate(*prompts), log=log)
    return [answer["tokens"] for answer in answers]
