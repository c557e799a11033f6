"""The prefill engine, as the proxy asks it: for one token of a prompt, and for nothing while it rests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

# Of a request, by its path: what may hold the prompt, by SGLang's own name for it.
PROMPTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "/generate": {"text": ("text",), "input_ids": ("input_ids",)},
    "/v1/completions": {"prompt": ("text", "input_ids")},
}
NAMESPACE = ("cache_salt", "extra_key", "lora_path")  # keys that tell equal prompts apart
LEAST_TOKENS = 256  # SGLang asks its store for no shorter prefix (`prefetch_threshold`)


class PrefillFailed(Exception):
    """It has not computed the prompt; the message says why."""


class _MetaInfo(msgspec.Struct):
    cached_tokens: int


class Prefilled(msgspec.Struct):
    """The part of SGLang's answer that matters here.

    Attributes:
        prompt_token_ids: the prompt, as it was computed.
    """

    prompt_token_ids: list[int]
    meta_info: _MetaInfo


_decoder = msgspec.json.Decoder(Prefilled)


@dataclass(slots=True)
class PrefillEngine:
    """One engine.

    Attributes:
        patience: seconds for one prompt.
        rest: seconds after a failure, for which it is not asked, so that a hung engine costs few requests its patience.
    """

    url: str
    patience: float
    rest: float
    _rests_until: float = float("-inf")

    @property
    def rests(self) -> bool:
        return time.monotonic() < self._rests_until

    async def compute(
        self, session: aiohttp.ClientSession, one_token: bytes, authorization: str
    ) -> Prefilled:
        """Compute a prompt. When this is cancelled, SGLang gives the request up, too.

        Args:
            one_token: from `one_token_of`.
            authorization: the header of whoever asks; may be empty.

        Raises:
            PrefillFailed: it refuses this prompt, or is down or slow; then it rests.
        """
        try:
            async with asyncio.timeout(self.patience):
                status, said = await self._post(session, one_token, authorization)
            if status == 200:
                return _decoder.decode(said)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            self._rest()
            raise PrefillFailed(f"{type(error).__name__}: {error}") from error
        if status >= 500:
            self._rest()
        raise PrefillFailed(f"HTTP {status}: {said[:200].decode(errors='replace')}")

    async def _post(
        self, session: aiohttp.ClientSession, one_token: bytes, authorization: str
    ) -> tuple[int, bytes]:
        url, headers = f"{self.url}/generate", {"Content-Type": "application/json"}
        if authorization:
            headers["Authorization"] = authorization
        async with session.post(url, data=one_token, headers=headers) as answer:
            return answer.status, await answer.read()

    def _rest(self) -> None:
        self._rests_until = time.monotonic() + self.rest


def one_token_of(path: str, body: bytes) -> bytes:
    """The request to `/generate` that computes a request's prompt, and no more; empty: it has none that is worth it.

    Several prompts at once are not: engines fill their batches with them anyway.
    """
    try:
        asked = json.loads(body)
    except ValueError:  # the decode engine says what is wrong
        return b""
    found = _prompt(path, asked) if isinstance(asked, dict) else {}
    if not found:
        return b""
    names = {key: asked[key] for key in NAMESPACE if asked.get(key) is not None}
    sampling = {"max_new_tokens": 1, "temperature": 0}
    return json.dumps(
        {**found, **names, "sampling_params": sampling, "return_prompt_token_ids": True}
    ).encode()


def is_published(one_token: bytes) -> bool:
    """Whether the engine's events tell of such a prompt; they do not of one with a salt or an adapter."""
    return not any(key in json.loads(one_token) for key in NAMESPACE)


def _prompt(path: str, asked: Mapping[str, Any]) -> dict[str, object]:
    """The prompt under SGLang's own key, if there is one and it is long enough."""
    for key, names in PROMPTS.get(path, {}).items():
        match asked.get(key):
            case str(text) if "text" in names and len(text.encode()) >= LEAST_TOKENS:
                return {"text": text}
            case [int(), *_] as ids if "input_ids" in names and len(ids) >= LEAST_TOKENS:
                return {"input_ids": ids}
    return {}
