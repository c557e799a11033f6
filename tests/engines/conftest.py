"""Real SGLang servers on CPU. Each start costs 10 to 20 seconds, so a file shares what it can."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = find_spec("sglang") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if absent:
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed here"))
