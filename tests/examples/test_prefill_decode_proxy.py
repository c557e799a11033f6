"""The proxy of examples/prefill_decode between engines that this file plays."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from examples.prefill_decode.prefill import LEAST_TOKENS
from examples.prefill_decode.proxy import Proxy, Settings
from examples.prefill_decode.stored_pages import block_names

PAGE = 16  # tokens
PROMPT = [3 + number * 7 % 500 for number in range(LEAST_TOKENS + 40)]
REQUEST = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 8}}
SOON = 30.0  # seconds: longer than anything here takes
AT_ONCE = 0.05  # seconds: a deadline that is to pass


@dataclass
class Asked:
    """A request that an engine got."""

    path: str
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Engine:
    """Answers as `behaviour` does; `given_up` is set when a request was cancelled under way."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.asked: list[Asked] = []
        self.was_asked, self.given_up = asyncio.Event(), asyncio.Event()
        self.app = web.Application()
        self.app.router.add_route("*", "/{path:.*}", self._answer)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(Asked(request.path, await request.read(), dict(request.headers)))
        self.was_asked.set()
        try:
            return await self.behaviour(request)
        except asyncio.CancelledError:
            self.given_up.set()
            raise


async def done(_: web.Request) -> web.StreamResponse:
    return web.json_response({"text": "the answer"})


async def prefilled(_: web.Request) -> web.StreamResponse:
    return web.json_response({"prompt_token_ids": PROMPT, "meta_info": {"cached_tokens": 0}})


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


def refuses(status: int) -> Behaviour:
    async def behaviour(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "no"}, status=status, headers={"X-Why": "because"})

    return behaviour


def stored(tokens: Sequence[int]) -> dict[str, Any]:
    """An event of the store's."""
    names = block_names(tokens, PAGE)
    return {"type": "BlockStored", "block_hashes": names, "block_size": PAGE, "medium": "DISK"}


class Publisher:
    """The prefill engine's events."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self._socket = context.socket(zmq.XPUB)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._number = 0

    async def has_listener(self) -> None:
        await self._socket.recv()

    async def publish(self, *events: dict[str, Any]) -> None:
        await self.send(msgspec.msgpack.encode([0.0, events]))

    def lose_one(self) -> None:
        self._number += 1

    async def send(self, batch: bytes) -> None:
        await self._socket.send_multipart([b"", self._number.to_bytes(8, "big"), batch])
        self._number += 1

    def close(self) -> None:
        self._socket.close(linger=0)


@dataclass
class Scene:
    """A proxy between two engines, and a client of it."""

    prefill: Engine
    decode: Engine
    events: Publisher
    client: aiohttp.ClientSession
    url: str
    settings: Settings

    async def ask(
        self, path: str = "/generate", body: object = REQUEST, **more: Any
    ) -> tuple[aiohttp.ClientResponse, str]:
        async with self.client.post(self.url + path, json=body, **more) as answer:
            return answer, await answer.text()


@asynccontextmanager
async def scene(prefill: Behaviour, decode: Behaviour, /, **changes: Any) -> AsyncIterator[Scene]:
    """Args: changes: of the proxy's settings."""
    async with AsyncExitStack() as undo:
        engines = Engine(prefill), Engine(decode)
        urls = await _serve(engines[0].app, undo), await _serve(engines[1].app, undo)
        context = zmq.asyncio.Context()
        undo.callback(context.term)
        events = Publisher(context)
        undo.callback(events.close)
        settings = Settings(
            *urls, events.address, patience=SOON, handover=SOON, word=0.0, rest=SOON
        )
        settings = replace(settings, **changes)
        url = await _serve(Proxy(settings).app, undo)
        await events.has_listener()
        client = await undo.enter_async_context(aiohttp.ClientSession())
        yield Scene(*engines, events, client, url, settings)


async def _serve(app: web.Application, undo: AsyncExitStack) -> str:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    undo.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    _, port = runner.addresses[0]
    return f"http://127.0.0.1:{port}"


def play(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SOON):
            await test

    asyncio.run(bounded())


# --- the hand-over


def test_the_prompt_is_computed_and_stored_before_the_decode_engine_is_asked() -> None:
    async def test() -> None:
        async with scene(prefilled, done) as at:
            asking = asyncio.create_task(at.ask())
            await at.prefill.was_asked.wait()
            await at.events.publish(stored(PROMPT[: 3 * PAGE]))
            assert not at.decode.asked
            await at.events.publish(stored(PROMPT))
            answer, text = await asking
            assert json.loads(text) == {"text": "the answer"}
            assert answer.headers["X-Prefill"] == "stored"
            assert answer.headers["Server-Timing"].startswith("prefill;dur=")
            (first,), (then,) = at.prefill.asked, at.decode.asked
            assert first.path == "/generate"
            assert first.json["input_ids"] == PROMPT
            assert first.json["sampling_params"]["max_new_tokens"] == 1
            assert (then.path, then.json) == ("/generate", REQUEST)

    play(test())


def test_what_was_published_before_is_not_waited_for() -> None:
    async def test() -> None:
        async with scene(prefilled, done) as at:
            await at.events.publish(stored(PROMPT))
            for _ in range(2):
                answer, _ = await at.ask()
                assert answer.headers["X-Prefill"] == "stored"

    play(test())


def test_what_was_published_before_a_gap_is_not_believed() -> None:
    async def test() -> None:
        async with scene(prefilled, done, handover=AT_ONCE) as at:
            await at.events.publish(stored(PROMPT))
            at.events.lose_one()
            await at.events.publish(stored([1] * PAGE))
            answer, _ = await at.ask()
            assert answer.headers["X-Prefill"] == "unsure"

    play(test())


def test_events_that_nobody_understands_do_not_end_the_listening() -> None:
    async def test() -> None:
        async with scene(prefilled, done) as at:
            await at.events.send(b"\xc1")
            await at.events.publish(stored(PROMPT))
            answer, _ = await at.ask()
            assert answer.headers["X-Prefill"] == "stored"

    play(test())


def test_pages_that_are_never_published_cost_one_deadline() -> None:
    async def test() -> None:
        async with scene(prefilled, done, handover=AT_ONCE) as at:
            await at.events.publish(stored(PROMPT[:PAGE]))
            answer, text = await at.ask()
            assert answer.headers["X-Prefill"] == "unsure"
            assert json.loads(text) == {"text": "the answer"}

    play(test())


@pytest.mark.parametrize("key", ["cache_salt", "extra_key", "lora_path"])
def test_a_tenants_prompt_is_computed_under_its_name_and_not_waited_for(key: str) -> None:
    """The engine publishes nothing of it; a wait would take the whole deadline, which is the test's here."""

    async def test() -> None:
        async with scene(prefilled, done) as at:
            answer, _ = await at.ask(body=REQUEST | {key: "tenant-a"})
            assert answer.headers["X-Prefill"] == "unsure"
            assert at.prefill.asked[0].json[key] == "tenant-a"

    play(test())


@pytest.mark.parametrize(
    ("path", "body", "prompt"),
    [
        ("/generate", {"text": "word " * 100}, {"text": "word " * 100}),
        ("/v1/completions", {"prompt": "word " * 100}, {"text": "word " * 100}),
        ("/v1/completions", {"prompt": PROMPT}, {"input_ids": PROMPT}),
    ],
)
def test_a_prompt_is_found_in_each_kind_of_request(
    path: str, body: dict[str, Any], prompt: dict[str, Any]
) -> None:
    async def test() -> None:
        async with scene(prefilled, done) as at:
            await at.events.publish(stored(PROMPT))
            await at.ask(path, body)
            ((key, value),) = prompt.items()
            assert at.prefill.asked[0].json[key] == value
            assert (at.decode.asked[0].path, at.decode.asked[0].json) == (path, body)

    play(test())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": PROMPT[: LEAST_TOKENS - 1]}),
        ("/generate", {"text": "short"}),
        ("/generate", {"input_ids": [PROMPT, PROMPT]}),
        ("/v1/completions", {"prompt": ["word " * 100] * 2}),
        ("/generate", ["no request"]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 100}]}),
    ],
)
def test_all_else_goes_to_the_decode_engine_as_it_came(path: str, body: object) -> None:
    async def test() -> None:
        async with scene(hangs, done) as at:
            answer, _ = await at.ask(path, body)
            assert answer.headers["X-Prefill"] == "not-asked"
            assert at.decode.asked[0].json == body
            assert not at.prefill.asked

    play(test())


def test_what_is_no_json_and_what_is_no_post_are_the_decode_engines() -> None:
    async def test() -> None:
        async with scene(hangs, done) as at:
            async with at.client.post(f"{at.url}/generate", data=b"{") as answer:
                assert answer.status == 200
            async with at.client.get(f"{at.url}/v1/models?of=all") as answer:
                assert await answer.json() == {"text": "the answer"}
            assert [each.body for each in at.decode.asked] == [b"{", b""]

    play(test())


def test_who_asks_is_told_to_both_engines() -> None:
    async def test() -> None:
        async with scene(prefilled, done, handover=AT_ONCE) as at:
            await at.ask(headers={"Authorization": "Bearer key"})
            for engine in (at.prefill, at.decode):
                assert engine.asked[0].headers["Authorization"] == "Bearer key"

    play(test())


# --- the answer


def test_an_answer_is_passed_on_piece_by_piece() -> None:
    heard = asyncio.Event()

    async def streams(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: one\n\n")
        await heard.wait()
        await response.write(b"data: two\n\n")
        return response

    async def test() -> None:
        async with (
            scene(prefilled, streams, handover=AT_ONCE) as at,
            at.client.post(f"{at.url}/generate", json=REQUEST) as answer,
        ):
            assert answer.content_type == "text/event-stream"
            assert await answer.content.readuntil(b"\n\n") == b"data: one\n\n"
            heard.set()
            assert await answer.content.read() == b"data: two\n\n"

    play(test())


def test_an_error_of_the_decode_engine_is_passed_on() -> None:
    async def test() -> None:
        async with scene(refuses(400), refuses(400)) as at:
            answer, text = await at.ask()
            assert (answer.status, answer.headers["X-Why"]) == (400, "because")
            assert json.loads(text) == {"error": "no"}

    play(test())


def test_a_decode_engine_that_is_down_is_a_bad_gateway() -> None:
    async def test() -> None:
        async with scene(prefilled, done, handover=AT_ONCE, decode="http://127.0.0.1:9") as at:
            answer, text = await at.ask()
            assert answer.status == 502
            assert "decode engine" in text

    play(test())


def test_an_answer_that_is_broken_off_is_not_taken_for_a_whole_one() -> None:
    async def breaks_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half of it")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def test() -> None:
        async with scene(prefilled, breaks_off, handover=AT_ONCE) as at:
            with pytest.raises(aiohttp.ClientError):
                await at.ask()

    play(test())


# --- a prefill engine that does not answer


def test_without_a_prefill_engine_the_decode_engine_answers_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with scene(prefilled, done, prefill="http://127.0.0.1:9") as at:
            outcomes = [(await at.ask())[0].headers["X-Prefill"] for _ in range(3)]
            assert outcomes == ["failed", "resting", "resting"]
            assert len(at.decode.asked) == 3

    with caplog.at_level(logging.WARNING):
        play(test())
    assert sum("the decode engine computes" in said for said in caplog.messages) == 1


def test_a_slow_prefill_engine_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with scene(hangs, done, patience=AT_ONCE) as at:
            answer, text = await at.ask()
            assert answer.headers["X-Prefill"] == "failed"
            assert json.loads(text) == {"text": "the answer"}
            await at.prefill.given_up.wait()

    play(test())
    assert "TimeoutError" in caplog.text


def test_a_prefill_engine_that_is_back_is_asked_again() -> None:
    async def test() -> None:
        async with scene(refuses(500), done, rest=0.0, handover=AT_ONCE) as at:
            answer, _ = await at.ask()
            assert answer.headers["X-Prefill"] == "failed"
            at.prefill.behaviour = prefilled
            await at.events.publish(stored(PROMPT))
            answer, _ = await at.ask()
            assert answer.headers["X-Prefill"] == "stored"

    play(test())


@pytest.mark.parametrize(("status", "then"), [(400, "failed"), (503, "resting")])
def test_only_its_own_troubles_make_a_prefill_engine_rest(status: int, then: str) -> None:
    async def test() -> None:
        async with scene(refuses(status), done) as at:
            outcomes = [(await at.ask())[0].headers["X-Prefill"] for _ in range(2)]
            assert outcomes == ["failed", then]

    play(test())


def test_an_answer_without_token_ids_is_no_answer() -> None:
    async def test() -> None:
        async with scene(done, done) as at:
            answer, _ = await at.ask()
            assert answer.headers["X-Prefill"] == "failed"

    play(test())


# --- a client that goes away


def test_a_request_given_up_on_the_prefill_engine_reaches_no_decode_engine() -> None:
    async def test() -> None:
        async with scene(hangs, done) as at:
            asking = asyncio.create_task(at.ask())
            await at.prefill.was_asked.wait()
            asking.cancel()
            await at.prefill.given_up.wait()
            assert not at.decode.asked

    play(test())


def test_a_request_given_up_on_the_decode_engine_is_given_up_there() -> None:
    async def test() -> None:
        async with scene(prefilled, hangs, handover=AT_ONCE) as at:
            asking = asyncio.create_task(at.ask())
            await at.decode.was_asked.wait()
            asking.cancel()
            await at.decode.given_up.wait()

    play(test())
