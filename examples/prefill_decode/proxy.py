"""A proxy before two engines: prompts are computed on one and continued on the other.

Of `/generate` and `/v1/completions` with one prompt, the prefill engine is asked for one token first. Its store then
takes the prompt's pages, which the engine publishes; the decode engine gets the request as it came, and restores the
prompt's prefix through the peers. Everything else goes to the decode engine at once, and so do all requests when the
prefill engine is down, refuses or is slow: the decode engine then computes the prompt itself.

An answer says what was done for it: `X-Prefill` is an `Outcome`, `Server-Timing` has the milliseconds that the prefill
engine and the wait for its store took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from examples.prefill_decode.prefill import (
    PrefillEngine,
    PrefillFailed,
    is_published,
    one_token_of,
)
from examples.prefill_decode.stored_pages import StoredPages, follow

logger = logging.getLogger(__name__)

BODY_MOST = 64 << 20  # bytes of a request
# Headers of one connection, not of the request or answer on it: never passed on (RFC 9110, 7.6.1).
HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "host", "content-length", "expect"}
)


class Outcome(StrEnum):
    """What became of a prompt on the prefill engine."""

    NOT_ASKED = "not-asked"  # no prompt, a short one, or several
    STORED = "stored"  # computed, and published as stored
    UNSURE = "unsure"  # computed; not published in time, or never to be
    FAILED = "failed"  # no answer, or an error
    RESTING = "resting"  # it failed a moment ago


@dataclass(frozen=True, slots=True)
class Settings:
    """Attributes: prefill, decode: URLs. events: where the prefill engine publishes. The others in seconds:
    patience: with the prefill engine. handover: for a computed prompt to be published as stored. word: that the word of
    it then takes from the one node to the other, which is published nowhere; some milliseconds where they are near.
    rest: after a failure of the prefill engine."""

    prefill: str
    decode: str
    events: str
    patience: float = 30.0
    handover: float = 1.0
    word: float = 0.01
    rest: float = 5.0


@dataclass(frozen=True, slots=True)
class Handover:
    """What was done before the decode engine was asked, and the seconds that it took."""

    outcome: Outcome
    computing: float = 0.0
    storing: float = 0.0

    @property
    def headers(self) -> dict[str, str]:
        times = f"prefill;dur={self.computing * 1e3:.1f}, handover;dur={self.storing * 1e3:.1f}"
        return {"X-Prefill": self.outcome, "Server-Timing": times}


class Proxy:
    """One pair of engines.

    `app` must run with `handler_cancellation`: then a request that its client gives up is given up here, its
    connections to the engines are closed, and they give it up, too.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._prefill = PrefillEngine(settings.prefill, settings.patience, settings.rest)
        self._pages = StoredPages()
        self._session: aiohttp.ClientSession
        self.app = web.Application(client_max_size=BODY_MOST)
        self.app.cleanup_ctx.append(self._running)
        self.app.router.add_route("*", "/{path:.*}", self._answer)

    async def _running(self, _: web.Application) -> AsyncIterator[None]:
        hearing = asyncio.create_task(follow(self._settings.events, self._pages))
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        async with self._session:
            yield
        hearing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await hearing

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        one_token = one_token_of(request.path, body) if request.method == "POST" else b""
        done = Handover(Outcome.NOT_ASKED)
        if one_token:
            done = await self._hand_over(one_token, request.headers.get("Authorization", ""))
        return await self._decode(request, body, done)

    async def _hand_over(self, one_token: bytes, authorization: str) -> Handover:
        if self._prefill.rests:
            return Handover(Outcome.RESTING)
        begun = time.monotonic()
        try:
            prefilled = await self._prefill.compute(self._session, one_token, authorization)
        except PrefillFailed as error:
            logger.warning("the prefill engine has failed, the decode engine computes: %s", error)
            return Handover(Outcome.FAILED, time.monotonic() - begun)
        computed = time.monotonic()
        stored = is_published(one_token) and await self._pages.wait(
            prefilled.prompt_token_ids, prefilled.meta_info.cached_tokens, self._settings.handover
        )
        if stored:
            await asyncio.sleep(self._settings.word)
        outcome = Outcome.STORED if stored else Outcome.UNSURE
        return Handover(outcome, computed - begun, time.monotonic() - computed)

    async def _decode(
        self, request: web.Request, body: bytes, done: Handover
    ) -> web.StreamResponse:
        """The decode engine's answer, piece by piece as it comes."""
        url = self._settings.decode + request.path_qs
        headers = _passed_on(request.headers)
        try:
            async with self._session.request(
                request.method, url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                return await _pass_back(answer, request, done)
        except aiohttp.ClientError as error:
            logger.error("the decode engine does not answer: %r", error)
            raise web.HTTPBadGateway(text=f"the decode engine does not answer: {error}") from error


async def _pass_back(
    answer: aiohttp.ClientResponse, request: web.Request, done: Handover
) -> web.StreamResponse:
    """Raises: aiohttp.ClientError: before anything was passed on."""
    response = web.StreamResponse(
        status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers)
    )
    response.headers.update(done.headers)
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
    except aiohttp.ClientConnectionResetError:  # the client has gone
        pass
    except aiohttp.ClientError as error:
        logger.error("the decode engine broke off an answer: %r", error)
        if request.transport is not None:
            request.transport.abort()  # the only way left to say so
    return response


def _passed_on(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, each) for name, each in headers.items() if name.lower() not in HOP)


def main() -> None:
    parser = argparse.ArgumentParser(prog="proxy.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--prefill", required=True, metavar="URL", help="of the prefill engine")
    add("--decode", required=True, metavar="URL", help="of the decode engine")
    events = "where the prefill engine publishes its KV events, as tcp://host:port"
    add("--events", required=True, metavar="ADDRESS", help=events)
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    patience = "with the prefill engine, for one prompt (default: 30)"
    add("--patience", type=float, default=30.0, metavar="SECONDS", help=patience)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    settings = Settings(options.prefill, options.decode, options.events, options.patience)
    web.run_app(
        Proxy(settings).app,
        host=options.host,
        port=options.port,
        handler_cancellation=True,
        access_log=None,
    )


if __name__ == "__main__":
    main()
