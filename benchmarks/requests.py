"""Requests to an SGLang server: streams whose tokens are timed, and prompts beside them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

from lmcache_sglang.testing.server import SGLangServer

VOCABULARY = range(3, 500)  # of the tiny model, without its special tokens
STREAMS = 3
STREAM_PROMPT = 48  # tokens; too few for SGLang to ask a store


@dataclass(frozen=True)
class Mix:
    """Streams that decode, and prompts that come at fixed times beside them, whatever becomes of them."""

    stream_tokens: int
    prompt_tokens: int
    documents: int  # asked again in turn; more than device and host hold
    period: float  # seconds from one prompt to the next


@dataclass(frozen=True)
class Heard:
    """What the streams of one round showed."""

    gaps: list[float]  # seconds between tokens, all streams together
    restored: int  # tokens that prompts had from the store
    prompts: int


def tokens(seed: object, count: int) -> list[int]:
    """A prompt that shares no page with that of another seed."""
    return random.Random(str(seed)).choices(VOCABULARY, k=count)


def generate(
    server: SGLangServer, prompt: list[int], new_tokens: int
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each message of a streamed answer, with the time at which it came."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    for said in server.stream("/generate", {"input_ids": prompt, "sampling_params": sampling}):
        yield time.perf_counter(), said


def ask(server: SGLangServer, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """The last message's account of a request."""
    *_, (_, last) = generate(server, prompt, new_tokens)
    account: dict[str, Any] = last["meta_info"]
    return account


def restored(account: dict[str, Any]) -> int:
    """Tokens of a prompt that came from a store."""
    return int((account.get("cached_tokens_details") or {}).get("storage", 0))


def busy(server: SGLangServer, mix: Mix, name: str, first: int) -> Heard:
    """Streams with prompts beside them: in turn one that was stored before, and one that is new.

    Args:
        name: of the new prompts and the streams: another in each round.
        first: which of the documents comes first.
    """
    ended = Event()
    with ThreadPoolExecutor() as threads:
        beside = threads.submit(_prompts, server, mix, name, first, ended)
        streams = [
            threads.submit(_stream, server, tokens((name, "stream", i), STREAM_PROMPT), mix)
            for i in range(STREAMS)
        ]
        try:
            gaps = [gap for stream in streams for gap in stream.result()]
        finally:
            ended.set()
        accounts = beside.result()
    return Heard(gaps, sum(map(restored, accounts)), len(accounts))


def _stream(server: SGLangServer, prompt: list[int], mix: Mix) -> list[float]:
    times = [when for when, _ in generate(server, prompt, mix.stream_tokens)]
    return [after - before for before, after in itertools.pairwise(times)]


def _prompts(
    server: SGLangServer, mix: Mix, name: str, first: int, ended: Event
) -> list[dict[str, Any]]:
    start, asked = time.monotonic(), []
    with ThreadPoolExecutor() as threads:
        for number in itertools.count():
            if ended.wait(max(0.0, start + (number + 1) * mix.period - time.monotonic())):
                break
            turn, again = divmod(number, 2)
            seed = (name, turn) if again else document(mix, first + turn)
            asked.append(threads.submit(ask, server, tokens(seed, mix.prompt_tokens), 1))
        return [each.result() for each in asked]


def document(mix: Mix, number: int) -> tuple[str, int]:
    """The seed of a prompt that is asked again and again."""
    return ("document", number % mix.documents)


def all_new(
    server: SGLangServer, name: str, count: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Seconds for prompts that nothing has seen before, four at a time."""
    prompts = [tokens((name, i), prompt_tokens) for i in range(count)]
    started = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        accounts = list(threads.map(lambda prompt: ask(server, prompt, new_tokens), prompts))
    seconds = time.perf_counter() - started
    if any(account["cached_tokens"] for account in accounts):
        raise RuntimeError("a prompt that should be new was in a cache")
    return seconds
