"""What the package offers by name, and how little it costs to import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lmcache_sglang

HEAVY = {"torch", "sglang", "vllm", "pydantic", "lmdb", "yaml"}
SOURCE = Path(lmcache_sglang.__file__)


def test_every_public_name_is_there_and_is_what_it_says() -> None:
    for name in lmcache_sglang.__all__:
        thing = getattr(lmcache_sglang, name)
        assert thing.__name__ == name
        assert thing.__module__.startswith("lmcache_sglang.")


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(lmcache_sglang) == sorted(lmcache_sglang.__all__)
    assert len(set(lmcache_sglang.__all__)) == len(lmcache_sglang.__all__)


def test_what_type_checkers_see_is_what_the_interpreter_gives() -> None:
    """The names stand in three places of the file: for checkers, in __all__, and for getattr."""
    blocks = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If)]
    for_checkers = {
        alias.name
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert for_checkers == set(lmcache_sglang.__all__) == set(lmcache_sglang._HOMES)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Stoer"):
        _ = lmcache_sglang.Stoer


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import lmcache_sglang", set()),
        ("from lmcache_sglang import ConfigError, TierError", set()),
        ("import lmcache_sglang.config", {"pydantic", "yaml"}),
        # What SGLang imports in each of its processes, also where the flag is not used.
        ("import lmcache_sglang.sglang_plugin", {"pydantic", "yaml"}),
        ("import lmcache_sglang.store", {"pydantic", "yaml", "lmdb"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement: str, allowed: set[str]) -> None:
    code = f"import sys\n{statement}\nprint(*({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == allowed
