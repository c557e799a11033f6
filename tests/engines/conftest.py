"""Real SGLang servers on CPU. Each start costs 10 to 20 seconds, so a file shares what it can."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmcache_sglang.testing.engine import MEMORY
from lmcache_sglang.testing.tiny_model import make_tiny_llama

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = find_spec("sglang") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if absent:
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed here"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "one", seed=1, dtype="float32")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A folder for the stores and logs of one test file, whose CPU tiers are removed after it."""
    yield tmp_path_factory.mktemp(Path(str(request.path)).stem)
    shutil.rmtree(MEMORY, ignore_errors=True)
