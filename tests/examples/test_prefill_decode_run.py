"""The example of a prefill and a decode engine, as it is run by hand: about a minute and a half."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from examples.demo.server import restorable

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("sglang") is None, reason="SGLang is not installed here"),
]

RUN = Path(__file__).parents[2] / "examples" / "prefill_decode" / "run.py"
SECONDS = 900.0  # longer than it takes on any machine


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it wrote with --json; it has ended well."""
    folder = tmp_path_factory.mktemp("prefill-decode")
    command = [sys.executable, str(RUN), "--json", str(folder / "json"), "--logs", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "from peer" in run.stdout
    found: dict[str, Any] = json.loads((folder / "json").read_text())
    return found


def test_documents_cross_in_whole_and_answers_are_the_same(result: dict[str, Any]) -> None:
    *crossed, _ = result["rows"]
    assert len(crossed) == 4
    for row in crossed:
        assert row["pair"]["outcome"] == "stored"
        assert row["pair"]["tokens"] == row["alone"]["tokens"]
        assert row["alone"]["cached"]["storage"] == 0
    for row in crossed[::2]:
        assert row["pair"]["cached"]["storage"] == restorable(row["pair"]["prompt_tokens"])
        assert row["pair"]["cached"]["device"] == 0


def test_without_the_prefill_engine_the_other_answers_the_same(result: dict[str, Any]) -> None:
    last = result["rows"][-1]
    assert last["pair"]["outcome"] == "failed"
    assert last["pair"]["cached"] == {"device": 0, "host": 0, "storage": 0}
    assert last["pair"]["tokens"] == last["alone"]["tokens"]
