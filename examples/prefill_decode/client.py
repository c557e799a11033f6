"""One streamed request to `/generate`, greedily, and what it measured."""

from __future__ import annotations

import http.client
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from examples.demo.client import Cached, answered, events
from examples.demo.errors import DemoFailed

SECONDS = 600.0  # without a byte of the answer


@dataclass(frozen=True, slots=True)
class Reply:
    """Attributes: ttft: seconds to the first token. prefill, handover: the seconds of it that the proxy says these took.
    outcome: of the prompt on the prefill engine, as the proxy says; empty without one."""

    tokens: list[int]
    ttft: float
    prompt_tokens: int
    cached: Cached
    outcome: str = ""
    prefill: float = 0.0
    handover: float = 0.0


def ask(url: str, prompt: str, new_tokens: int) -> Reply:
    """Raises: DemoFailed: the server refuses, or breaks off."""
    where = urlsplit(url)
    assert where.hostname is not None
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=SECONDS)
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    request = {"text": prompt, "sampling_params": sampling, "stream": True}
    begun = time.perf_counter()
    with answered(connection, "/generate", request) as answer:
        return _read(answer, begun)


def _read(answer: http.client.HTTPResponse, begun: float) -> Reply:
    ttft, last = 0.0, dict[str, Any]()
    for last in events(answer):  # each says all so far  # noqa: B007
        ttft = ttft or time.perf_counter() - begun
    if not last:
        raise DemoFailed("the server's stream ended without a token")
    about = last["meta_info"]
    cached = about.get("cached_tokens_details") or {}
    times = answer.headers.get("Server-Timing", "")
    return Reply(
        last["output_ids"],
        ttft,
        about["prompt_tokens"],
        Cached(cached.get("device", 0), cached.get("host", 0), cached.get("storage") or 0),
        answer.headers.get("X-Prefill", ""),
        _seconds("prefill", times),
        _seconds("handover", times),
    )


def _seconds(name: str, server_timing: str) -> float:
    found = re.search(rf"\b{name};dur=([\d.]+)", server_timing)
    return float(found[1]) / 1e3 if found else 0.0
