"""What goes down, comes up and stays, by the settings: a real engine, then another one from the disk alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang.testing.engine import (
    Answer,
    Setup,
    ask,
    pages_in_memory,
    pages_on_disk,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.server import SGLangServer

REQUESTS = {"used": prompt(1), "unused": prompt(2), "long": prompt(3) + prompt(4)}
PAGES = 1 + sum(len(request) // 16 for request in REQUESTS.values())  # with SGLang's own first one
POOL = ("--max-total-tokens", "4096")
BEYOND = 1 + len(REQUESTS["used"]) // 16  # pages: more than the short requests have
CASES: dict[str, tuple[str, Mapping[str, Mapping[str, Any]], set[str]]] = {
    # the CPU tier, the settings, and which requests the disk has afterwards
    "written back": (
        "64MiB",
        {
            "cpu": {"eviction": "lru"},
            "disk": {"mode": "write-back", "eviction": "s3-fifo", "promotion": "never"},
        },
        {"used", "unused", "long"},
    ),
    "second touch": (
        "64MiB",
        {
            "cpu": {"eviction": "s3-fifo"},
            "disk": {
                "admission": "second-touch",
                "promotion": "second-hit",
                "durability": "relaxed",
            },
        },
        {"used"},
    ),
    "long chains": ("64MiB", {"disk": {"minimum_prefix": BEYOND}}, {"long"}),
    "cramped": ("2MiB", {}, {"used", "unused", "long"}),
}


def answers_of(engine: SGLangServer) -> dict[str, Answer]:
    return {name: ask(engine, request) for name, request in REQUESTS.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_disk_has_what_the_policy_says_and_the_tokens_are_the_same(
    model: Path, folder: Path, case: str
) -> None:
    cpu, settings, kept = CASES[case]
    setup = Setup(folder / case, cpu=cpu, more=settings, args=POOL)
    with server(model, setup, folder / f"{case} cold.log") as engine:
        cold = answers_of(engine)
        counted = pages_on_disk if case == "cramped" else pages_in_memory
        until(lambda: counted(setup) >= PAGES)
        engine.post("/flush_cache")
        used = ask(engine, REQUESTS["used"])
    assert [answer.storage for answer in cold.values()] == [0, 0, 0]
    assert used.storage == whole_pages(REQUESTS["used"])
    assert used.tokens == cold["used"].tokens
    setup.forget_memory()
    with server(model, setup, folder / f"{case} warm.log") as engine:
        warm = answers_of(engine)
    for name, request in REQUESTS.items():
        assert warm[name].storage == (whole_pages(request) if name in kept else 0)
        assert warm[name].tokens == cold[name].tokens
