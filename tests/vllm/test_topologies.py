"""Engines cut in two, beside one another, behind HTTP, beside another connector, and of other kinds of attention."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import zmq

from lmcache_sglang.testing import vllm
from lmcache_sglang.testing.server import SGLangServer, free_port
from lmcache_sglang.testing.tiny_families import make_tiny
from tests.vllm.answers import HITS, LOADED, cached, tokens

Tokens = Sequence[Sequence[int]]


def test_two_ranks_find_what_two_and_what_one_stored(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    setup = vllm.Setup(model, folder / "ranks", ranks=2)
    for number, ranks in enumerate((2, 2, 1)):
        (answers,) = vllm.run(
            replace(setup, ranks=ranks), vllm.generate(*prompts), log=folder / f"ranks-{number}.log"
        )
        assert tokens(answers) == plain
        assert cached(answers) == ([576, 192, 320] if number else [0, 0, 0])


def test_two_engines_at_once_serve_each_other(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    """The first one has stored before the second asks, and the second one's pages are there for the first."""
    setup = vllm.Setup(model, folder / "both", processes=True)
    with (
        vllm.server(setup, folder / "one.log") as one,
        vllm.server(setup, folder / "two.log") as two,
    ):
        assert complete(one, prompts[0]) == (plain[0], 0)
        assert complete(two, prompts[0]) == (plain[0], 576)
        assert complete(two, prompts[1]) == (plain[1], 0)
        assert complete(one, prompts[1]) == (plain[1], 192)
        with ThreadPoolExecutor(2) as threads:
            done = list(threads.map(lambda server: complete(server, prompts[2]), (one, two)))
        assert [each for each, _ in done] == [plain[2]] * 2


def complete(server: SGLangServer, prompt: Sequence[int]) -> tuple[list[int], int]:
    """The continuation, and how many tokens of the prompt were cached."""
    said = server.post(
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": list(prompt),
            "max_tokens": vllm.NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    details = said["usage"].get("prompt_tokens_details") or {}
    return said["choices"][0]["token_ids"], details.get("cached_tokens") or 0


def test_a_server_that_starts_again_is_warm_and_says_so(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    setup = vllm.Setup(model, folder / "served", by_name=True)
    with vllm.server(setup, folder / "first.log") as server:
        assert complete(server, prompts[0]) == (plain[0], 0)
    with vllm.server(setup, folder / "second.log") as server:
        assert complete(server, prompts[0]) == (plain[0], 576)
        metrics = server.get("/metrics")
        server.post("/v1/completions", {"model": "tiny", "prompt": [5], "max_tokens": 1})
    counters = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    labels = '{engine="0",model_name="tiny"}'
    assert float(counters[f"vllm:lmcache_load_tokens_total{labels}"]) == 576
    assert float(counters[f"vllm:external_prefix_cache_hits_total{labels}"]) == 576
    assert float(counters[f"vllm:lmcache_load_missed_tokens_total{labels}"]) == 0


def test_beside_another_connector(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    setup = vllm.Setup(model, folder / "multi", by_name=True)
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "example")},
    }
    both = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [setup.transfer, other]},
    }
    setup = replace(
        setup, llm={"kv_transfer_config": both, "disable_hybrid_kv_cache_manager": True}
    )
    for name in ("cold", "warm"):
        answers, said = vllm.run(
            setup,
            vllm.generate(*prompts),
            vllm.step("metrics"),
            log=folder / f"multi-{name}.log",
        )
        assert tokens(answers) == plain
    assert said[HITS] == 576 + 192 + 320


@pytest.mark.parametrize("family", ["wide-mla", "swa"])
def test_other_kinds_of_attention(family: str, folder: Path, prompts: Tokens) -> None:
    model = make_tiny(family, folder / family, seed=3)
    setup = vllm.Setup(model, folder / f"store-{family}", kv_bytes=32 << 20)
    asks = vllm.generate(*prompts)
    (expected,) = vllm.run(replace(setup, store=None), asks, log=folder / f"{family}-plain.log")
    for name in ("cold", "warm"):
        answers, said = vllm.run(
            setup, asks, vllm.step("metrics"), log=folder / f"{family}-{name}.log"
        )
        assert tokens(answers) == tokens(expected)
    assert said[LOADED] == sum(cached(answers)) == 576 + 192 + 320


def test_listeners_hear_of_pages(model: Path, folder: Path, prompts: Tokens) -> None:
    """What was saved, and in the next engine what was loaded, page after page of one chain."""
    for name in ("cold", "warm"):
        port = free_port()
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
        setup = vllm.Setup(model, folder / "told", llm={"kv_events_config": events})
        with Listener(port) as listener:
            vllm.run(
                setup,
                vllm.generate(prompts[0]),
                vllm.generate(prompts[1]),  # by its steps the first one's saves are told of
                log=folder / f"told-{name}.log",
            )
        pages = listener.stored_under(prompts[0])
        assert pages == 600 // 32


class Listener:
    """Of vLLM's KV events: those of the store."""

    def __init__(self, port: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.subscribe(b"")
        self._socket.connect(f"tcp://127.0.0.1:{port}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_of: object) -> None:
        """Take what has come by now."""
        while self._socket.poll(1000):
            *_, payload = self._socket.recv_multipart()
            _, events, *_ = msgspec.msgpack.decode(payload)
            self.events += [event for event in events if event.get("medium") == "STORAGE"]
        self._socket.close(linger=0)

    def stored_under(self, prompt: Sequence[int]) -> int:
        """How many pages of a prompt were told of, each behind the one before."""
        parent, pages = None, 0
        for event in self.events:
            assert event["type"] == "BlockStored"
            start, size = pages * event["block_size"], len(event["token_ids"])
            if (
                event.get("parent_block_hash") != parent
                or event["token_ids"] != prompt[start : start + size]
            ):
                continue
            parent, pages = event["block_hashes"][-1], pages + len(event["block_hashes"])
        return pages
