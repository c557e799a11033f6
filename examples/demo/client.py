"""One streamed request to the OpenAI-compatible API, and what it measured.

The standard library is enough, and it keeps the clock next to the socket: the time to the first
token is from sending the request to the first piece of text that arrives.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from examples.demo.errors import DemoFailed

# A base model goes on with a question of its own once it has answered ours.
STOP = ["\nQuestion:"]


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Cached:
    """Prompt tokens the server did not compute, by where it had them."""

    device: int = 0
    host: int = 0
    storage: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    ttft: float  # seconds to the first piece of text
    prompt_tokens: int
    cached: Cached


class ChatClient:
    """Asks one server, greedily and one request at a time."""

    def __init__(self, host: str, port: int, *, timeout: float = 600.0) -> None:
        self._host = host
        self._port = port
        self._timeout = timeout

    def ask(self, messages: Sequence[Message], max_tokens: int) -> Reply:
        """Raises `DemoFailed` if the server refuses, goes away or leaves out its token counts."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        begun = time.perf_counter()
        with answered(
            connection, "/v1/chat/completions", self.request(messages, max_tokens)
        ) as answer:
            return read_reply(answer, begun)

    def request(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        """The body."""
        return {
            "model": "default",
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "stop": STOP,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_cached_tokens_details": True,  # SGLang's extension: a chunk with `sglext`
        }


@contextmanager
def answered(
    connection: http.client.HTTPConnection, path: str, request: Any
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, whose stream may still come; the connection is closed after the block.

    Raises:
        DemoFailed: the server refuses, or breaks off, also within the block.
    """
    try:
        connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise DemoFailed(f"HTTP {answer.status}: {answer.read().decode(errors='replace')}")
        yield answer
    except (OSError, http.client.HTTPException) as error:
        raise DemoFailed(f"the server broke off the answer: {error!r}") from error
    finally:
        connection.close()


def read_reply(lines: Iterable[bytes], begun: float) -> Reply:
    """Put together what a stream said; `begun` is when its request left, by `perf_counter`."""
    pieces: list[str] = []
    first: float | None = None
    prompt_tokens: int | None = None
    cached = Cached()
    for chunk in events(lines):
        if piece := _text(chunk):
            first = first or time.perf_counter()
            pieces.append(piece)
        if usage := chunk.get("usage"):
            prompt_tokens = usage["prompt_tokens"]
            details = usage.get("prompt_tokens_details")  # vLLM's, if asked for
            if details and cached == Cached():
                cached = Cached(device=details.get("cached_tokens") or 0)
        if details := (chunk.get("sglext") or {}).get("cached_tokens_details"):
            cached = _cached(details)
    if prompt_tokens is None:
        raise DemoFailed("the server's stream ended without its token counts")
    # An empty answer has no first token; its end is when that became known.
    ttft = (first or time.perf_counter()) - begun
    return Reply("".join(pieces), ttft, prompt_tokens, cached)


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON payloads of a server-sent event stream, up to its [DONE]."""
    for line in lines:
        field, _, value = line.decode().strip().partition(":")
        if field != "data":
            continue  # blank lines end events, a bare colon is a keep-alive
        if value.strip() == "[DONE]":
            return
        payload = json.loads(value)
        if "error" in payload:
            raise DemoFailed(f"the server answered: {payload['error']}")
        yield payload


def _text(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices") or ())


def _cached(details: dict[str, Any]) -> Cached:
    return Cached(details.get("device", 0), details.get("host", 0), details.get("storage") or 0)
